"""What the TPU kernels compute, interpreted: every option, against the float64 reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import NormalizedState, linear_attention
from pallas_kernels.linear_attention.cases import ACCURACY, SMALL, Case
from pallas_kernels.linear_attention.tpu import plan as tpu_plan
from tests.jaxprs import equations
from tests.pallas_kernels.accuracy import assert_close
from tests.pallas_kernels.linear_attention.tpu.checks import BOUND, check, interpreted
from tests.pallas_kernels.quick import quick

CASES = {case.name: case for case in SMALL}
HALF = ("one_token", "head_97", "token_300", "channel_150", "normalized_token")


QUICK = ("head_97", "grouped_token", "grouped_channel", "packed_normalized", "full_packed_cross")


@pytest.mark.parametrize("case", quick(SMALL, QUICK, lambda case: case.name))
def test_float32_in_blocks_of_one_chunk(case, errors):
    check(errors, case, "float32")


@pytest.mark.parametrize("name", quick(HALF, ("token_300",)))
def test_bfloat16_in_blocks_of_two_chunks(name, errors):
    check(errors, CASES[name], "bfloat16", tokens=256)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("case", ACCURACY, ids=lambda case: case.name)
def test_accuracy_at_the_lengths_where_it_is_promised(case, dtype, errors):
    check(errors, case, dtype, tokens=tpu_plan.BLOCK_TOKENS)


def test_a_state_is_decayed_by_the_tokens_that_exist(errors):
    check(errors, Case("short", 1, 3, decay="head", strength=1.0, initial_state=True), "float32")


@pytest.mark.parametrize("chunk_size", quick([32, 128], ("32",)))
def test_chunk_size_changes_nothing(chunk_size):
    arguments, options = CASES["channel_150"].arguments()
    want = linear_attention(**arguments, **options, implementation="xla")
    with interpreted():
        got = jax.jit(lambda a: linear_attention(**a, **options, chunk_size=chunk_size, implementation="tpu"))(
            arguments
        )
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


OPTIONS = [{"decay": "token"}, {"decay": "head", "normalize": True}, {"decay": "channel"}, {"causal": False}]


@pytest.mark.parametrize("options", quick(OPTIONS, (str(OPTIONS[0]),)))
def test_scale_and_its_gradient_at_zero_too(options):
    case = Case("scale", 1, 140, 2, 16, **options)
    arguments, options = case.arguments()
    weights = np.random.default_rng(0).standard_normal(arguments["v"].shape)

    def gradients(implementation):
        def loss(scale, q):
            y = linear_attention(**arguments | {"q": q}, **options, scale=scale, implementation=implementation)
            return jnp.sum(y * weights), y

        gradient = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
        return [gradient(jnp.float32(scale), arguments["q"]) for scale in (0.5, 0.0)]

    want = gradients("reference")
    with interpreted():
        got = gradients("tpu")
    for ((dscale, dq), y), ((want_dscale, want_dq), want_y) in zip(got, want, strict=True):
        np.testing.assert_allclose(y, want_y, rtol=1e-5, atol=1e-5)
        assert_close(dq, want_dq, tolerance=1e-6)
        if case.normalize:  # a normalised output does not depend on it
            assert dscale == 0 and abs(want_dscale) < 1e-3
        else:
            assert abs(want_dscale) > 1
            np.testing.assert_allclose(dscale, want_dscale, rtol=1e-4)


@pytest.mark.parametrize("options", quick([{"decay": "head"}, OPTIONS[0], *OPTIONS[2:]], (str(OPTIONS[0]),)))
def test_gradients_that_nobody_asks_for_are_not_written(options):
    arguments, options = Case("some", 1, 140, 2, 16, **options).arguments()
    arguments |= {"scale": jnp.float32(0.5)}

    def gradients(names):
        def loss(wanted):
            return jnp.sum(linear_attention(**arguments | wanted, **options, implementation="tpu") ** 2)

        wanted = {name: arguments[name] for name in names}
        run = jax.jit(jax.grad(loss))
        kernels = [x for x in equations(run, wanted) if x.primitive.name == "pallas_call"]
        return run(wanted), sum(x.aval.size for kernel in kernels for x in kernel.outvars)

    with interpreted():
        everything, all_numbers = gradients(arguments)
        tokens, some_numbers = gradients("qkv")
    for name in "qkv":
        np.testing.assert_array_equal(tokens[name], everything[name])
        assert np.any(tokens[name])
    assert some_numbers < all_numbers


def test_rows_that_read_nothing_are_zeros_with_zero_gradients():
    arguments, options = CASES["normalized"].arguments()
    arguments["q"] = arguments["q"].at[:, 3:90].set(0)

    def loss(q):
        y = linear_attention(**arguments | {"q": q}, **options, implementation="tpu")
        return jnp.sum(y**2), y

    with interpreted():
        dq, y = jax.jit(jax.grad(loss, has_aux=True))(arguments["q"])
    assert not np.any(y[:, 3:90]) and not np.any(dq[:, 3:90])
    assert np.all(np.isfinite(dq)) and np.all(np.abs(y[:, 90:]).max(-1) > 0)


@pytest.mark.slow
def test_float16_does_not_overflow_in_states():
    arguments, options = CASES["token_300"].arguments(jnp.float16)
    factors = {"k": 100, "v": 100, "q": 1e-3, "log_decay": 1e-3}  # states pass float16's 65504
    arguments = {name: (x * factors.get(name, 1)).astype(x.dtype) for name, x in arguments.items()}

    def gradient(implementation):
        def loss(arguments):
            y, state = linear_attention(**arguments, **options, return_state=True, implementation=implementation)
            return jnp.sum(1e-7 * y.astype(jnp.float32) ** 2), (y, state)

        return jax.jit(jax.grad(loss, has_aux=True))(arguments)

    want, (want_y, want_state) = gradient("reference")
    with interpreted():
        got, (y, state) = gradient("tpu")
    assert y.dtype == got["q"].dtype == jnp.float16 and state.dtype == jnp.float32
    assert np.abs(state).max() > 65504
    np.testing.assert_allclose(y, want_y, rtol=2e-3, atol=1e-2)
    np.testing.assert_allclose(state, want_state, rtol=1e-4, atol=1)
    assert np.abs(got["q"]).max() > 1 and all(np.all(np.isfinite(got[name])) for name in "qkv")
    np.testing.assert_allclose(got["q"], want["q"], rtol=2e-3, atol=1e-2)


def test_a_padded_state_is_cut_to_its_size():
    arguments, options = Case("state", 1, 20, 3, 20, 24, normalize=True, initial_state=True).arguments()
    want = linear_attention(**arguments, **options, return_state=True, implementation="reference")[1]
    with interpreted():
        got = jax.jit(lambda a: linear_attention(**a, **options, return_state=True, implementation="tpu")[1])(arguments)
    assert isinstance(got, NormalizedState) and got.kv.shape == (1, 3, 20, 24)
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-5), got, want)


@pytest.mark.slow
def test_vmap_is_a_loop():
    arguments, options = Case("vmap", 1, 40, decay="token", initial_state=True).arguments()
    stacked = jax.tree.map(lambda x: jnp.stack([x, 0.5 * x]), arguments)

    def grads(arguments):
        return jax.grad(lambda a: jnp.sum(linear_attention(**a, **options, implementation="tpu") ** 2))(arguments)

    with interpreted():
        got = jax.jit(jax.vmap(grads))(stacked)
        one = jax.jit(grads)
        want = [one(jax.tree.map(lambda x, i=i: x[i], stacked)) for i in range(2)]
    for i in range(2):
        jax.tree.map(lambda g, w, i=i: np.testing.assert_allclose(g[i], w, rtol=1e-4, atol=1e-5), got, want[i])
