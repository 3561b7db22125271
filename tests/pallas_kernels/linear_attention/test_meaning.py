"""What a user relies on: chaining, decoding, packing, empty rows, scale, feature maps, dtypes, extreme decays."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import NormalizedState, init_state, linear_attention, linear_attention_step
from pallas_kernels.linear_attention.cases import Case

DECAYS = (None, "head", "token", "channel")


def close(got, want, tolerance=2e-6):
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        scale = max(float(jnp.max(jnp.abs(w))), 1e-6)
        np.testing.assert_allclose(np.asarray(g) / scale, np.asarray(w) / scale, rtol=0, atol=tolerance)


def part(arguments, tokens):
    """The arguments of some of the tokens: everything that has a token axis, cut."""
    cut = {name: x[:, tokens] for name, x in arguments.items() if name in ("q", "k", "v")}
    decay = arguments.get("log_decay")
    return cut | ({} if decay is None else {"log_decay": decay if decay.ndim == 1 else decay[:, tokens]})


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("decay", DECAYS)
def test_two_halves_chained_by_the_state_are_the_whole(decay, normalize):
    arguments, options = Case("chain", length=150, heads=4, kv_heads=2, decay=decay, normalize=normalize).arguments()
    want = linear_attention(**arguments, **options, return_state=True)
    first, state = linear_attention(**part(arguments, slice(0, 67)), **options, return_state=True)
    second, state = linear_attention(
        **part(arguments, slice(67, None)), **options, initial_state=state, return_state=True
    )
    close((jnp.concatenate([first, second], axis=1), state), want)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("decay", DECAYS)
def test_steps_are_the_whole(decay, normalize):
    case = Case("steps", length=9, heads=4, kv_heads=2, value_size=5, decay=decay, normalize=normalize)
    arguments, options = case.arguments()
    arguments["scale"] = 0.3
    want, want_state = linear_attention(**arguments, **options, return_state=True)
    state = init_state(2, 4, 16, 5, normalize=normalize)
    outputs = []
    for t in range(9):
        token = {name: x[:, 0] if name != "log_decay" or x.ndim > 1 else x
                 for name, x in part(arguments, slice(t, t + 1)).items()}  # fmt: skip
        q_t, k_t, v_t = (token.pop(name) for name in "qkv")
        y, state = linear_attention_step(q_t, k_t, v_t, state, **token, scale=0.3, normalize=normalize)
        outputs.append(y)
    close((jnp.stack(outputs, axis=1), state), (want, want_state))


@pytest.mark.parametrize("decay", DECAYS)
def test_packed_segments_are_separate_runs(decay):
    case = Case("packing", batch=1, length=120, decay=decay, initial_state=True)
    arguments, _ = case.arguments()
    first = arguments.pop("initial_state")
    borders = [0, 1, 37, 90, 120]
    ids = np.repeat([4, 7, 4, 0], np.diff(borders))[None]  # an id that comes back is a new segment
    got = linear_attention(**arguments, segment_ids=ids, initial_state=first, return_state=True)
    outputs, state = [], None
    for start, stop in itertools.pairwise(borders):
        initial = first if start == 0 else None
        y, state = linear_attention(**part(arguments, slice(start, stop)), initial_state=initial, return_state=True)
        outputs.append(y)
    close(got, (jnp.concatenate(outputs, axis=1), state))


def test_packed_segments_have_no_gradient_across_borders():
    arguments, _ = Case("leak", batch=1, length=90, decay="token").arguments()
    ids = jnp.repeat(jnp.arange(3), 30)[None]

    def middle(k):
        return jnp.sum(linear_attention(**{**arguments, "k": k}, segment_ids=ids)[:, 30:60])

    gradient = np.asarray(jax.grad(middle)(arguments["k"]))[0]
    assert np.all(gradient[:30] == 0) and np.all(gradient[60:] == 0)
    assert np.all(np.any(gradient[30:60] != 0, axis=(1, 2)))


def test_causality():
    arguments, _ = Case("causality", batch=1, length=200, decay="channel").arguments()
    gradient = np.asarray(jax.grad(lambda v: jnp.sum(linear_attention(**{**arguments, "v": v})[:, 99]))(arguments["v"]))
    assert np.all(gradient[0, 100:] == 0)
    assert np.any(gradient[0, 99] != 0)


def test_non_causal_segments_need_not_be_contiguous():
    arguments, _ = Case("scattered", batch=1, length=40, kv_length=60, causal=False).arguments()
    query_ids, key_ids = np.arange(40)[None] % 3, np.arange(60)[None] % 3
    got = linear_attention(**arguments, causal=False, segment_ids=(query_ids, key_ids))
    for segment in range(3):
        own, keys = query_ids[0] == segment, key_ids[0] == segment
        want = linear_attention(arguments["q"][:, own], arguments["k"][:, keys], arguments["v"][:, keys], causal=False)
        close(got[:, own], want)


@pytest.mark.parametrize("normalize", [False, True])
def test_a_query_without_keys_gives_zeros_and_zero_gradients(normalize):
    arguments, _ = Case("no_keys", batch=1, length=30, causal=False, normalize=normalize).arguments()
    ids = jnp.zeros((1, 30), int).at[0, 11].set(9), jnp.zeros((1, 30), int)

    def run(q):
        return linear_attention(q, arguments["k"], arguments["v"], causal=False, segment_ids=ids, normalize=normalize)

    y, pullback = jax.vjp(run, arguments["q"])
    (gradient,) = pullback(jnp.ones_like(y))
    assert np.all(np.asarray(y[0, 11]) == 0) and np.all(np.asarray(gradient[0, 11]) == 0)
    assert np.all(np.isfinite(y)) and np.all(np.isfinite(gradient)) and np.all(np.asarray(y[0, 12]) != 0)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_normalised_rows_of_zero_features_are_zero_with_zero_gradients(implementation):
    arguments, options = Case("dead", batch=1, length=20, normalize=True).arguments()
    arguments["k"] = arguments["k"].at[:, :5].set(0)  # the first five rows have nothing to read

    def run(arguments):
        return linear_attention(**arguments, **options, implementation=implementation)

    y, pullback = jax.vjp(run, arguments)
    (gradients,) = pullback(jnp.ones_like(y))
    assert np.all(np.asarray(y[:, :5]) == 0) and np.all(np.asarray(gradients["q"][:, :5]) == 0)
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(gradients))


def test_normalising_by_a_negative_sum_keeps_the_mean():
    ones = jnp.ones((1, 70, 2, 3))
    y = linear_attention(-ones, ones, 5 * ones, normalize=True)
    np.testing.assert_allclose(y, 5.0, rtol=1e-6)


@pytest.mark.parametrize("decay", ["head", "token", "channel"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_extreme_decays_stay_finite(decay, dtype):
    case = Case("extreme", length=150, decay=decay, normalize=True)
    arguments, options = case.arguments(jnp.dtype(dtype))
    choices = jnp.asarray([0.0, -20.0, -1e4, -1e38, -1e-30])
    arguments["log_decay"] = choices[jnp.arange(arguments["log_decay"].size) % 5].reshape(arguments["log_decay"].shape)

    def run(arguments):
        return linear_attention(**arguments, **options).astype(jnp.float32)

    y, pullback = jax.vjp(run, arguments)
    assert np.all(np.isfinite(y))
    assert all(np.all(np.isfinite(np.asarray(g, np.float32))) for g in jax.tree.leaves(pullback(y)))


def test_a_complete_decay_forgets_everything():
    arguments, _ = Case("forget", batch=1, length=100).arguments()
    y = linear_attention(**arguments, log_decay=jnp.full((1, 100, 2), -jnp.inf))
    own = jnp.sum(arguments["q"] * arguments["k"], axis=-1, keepdims=True) * arguments["v"]
    close(y, own)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_positive_log_decay_is_read_as_zero(implementation):
    arguments, _ = Case("growth", length=40).arguments()
    got = linear_attention(**arguments, log_decay=jnp.full((2,), 0.5), implementation=implementation)
    close(got, linear_attention(**arguments))


def test_scale_multiplies_scores_and_has_a_gradient():
    arguments, _ = Case("scale", length=40).arguments()
    close(linear_attention(**arguments, scale=0.25), 0.25 * linear_attention(**arguments))
    gradient = jax.grad(lambda s: jnp.sum(linear_attention(**arguments, scale=s)))(0.25)
    np.testing.assert_allclose(gradient, jnp.sum(linear_attention(**arguments)), rtol=1e-4)


def test_feature_maps():
    arguments, _ = Case("features", length=40).arguments()
    q, k, v = arguments["q"], arguments["k"], arguments["v"]

    def double(x):
        return jnp.concatenate([jnp.exp(x), jnp.exp(-x)], axis=-1)

    want, state = linear_attention(double(q), double(k), v, normalize=True, return_state=True)
    got, got_state = linear_attention(q, k, v, normalize=True, feature_map=double, return_state=True)
    close((got, got_state), (want, state))
    assert got_state.kv.shape == (2, 2, 32, 16)
    got = linear_attention(q, k, v, feature_map=(jnp.square, jnp.abs))
    close(got, linear_attention(q**2, jnp.abs(k), v))


def test_feature_maps_are_computed_in_float32_and_rounded_to_the_inputs():
    seen = []

    def note(x):
        seen.append(x.dtype)
        return x

    x = jnp.ones((1, 2, 1, 2), jnp.bfloat16)
    y = linear_attention(x, x, x, feature_map=note)
    assert seen == [jnp.float32, jnp.float32] and y.dtype == jnp.bfloat16


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("options", [{}, {"normalize": True}, {"causal": False}])
def test_outputs_have_the_dtype_of_the_inputs_and_states_are_float32(dtype, options):
    x = jnp.ones((1, 5, 2, 3), dtype)
    y, state = linear_attention(x, x, x, **options, return_state=True)
    assert y.dtype == dtype and all(s.dtype == jnp.float32 for s in jax.tree.leaves(state))
    token = init_state(1, 2, 3, 3)
    y, state = linear_attention_step(x[:, 0], x[:, 0], x[:, 0], token)
    assert y.dtype == dtype and state.dtype == jnp.float32


def test_float64_is_accumulated_in_float64():
    with jax.enable_x64(True):
        arrays, options = Case("double", length=200, decay="token", initial_state=True).arrays()
        got = linear_attention(**arrays, **options, return_state=True)
        want = linear_attention(**arrays, **options, return_state=True, implementation="reference")
        assert got[1].dtype == jnp.float64
        close(got, want, 1e-14)


def test_the_state_is_a_pytree():
    state = init_state(2, 3, 4, 5, normalize=True)
    assert isinstance(jax.tree.map(lambda x: x + 1, state), NormalizedState)
    assert state.kv.shape == (2, 3, 4, 5) and state.k.shape == (2, 3, 4)


@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    length=st.integers(1, 70),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    key_size=st.integers(1, 9),
    value_size=st.integers(1, 9),
    decay=st.sampled_from(DECAYS),
    normalize=st.booleans(),
    segments=st.integers(0, 4),
    chunk_size=st.one_of(st.none(), st.integers(1, 40)),
)
def test_random_shapes(length, kv_heads, group, key_size, value_size, decay, normalize, segments, chunk_size):
    case = Case("random", 1, length, kv_heads * group, key_size, value_size, kv_heads, None, decay, 1.0,
                normalize=normalize, segments=segments, initial_state=True)  # fmt: skip
    arguments, options = case.arguments()

    def run(arguments, **how):
        return linear_attention(**arguments, **options, return_state=True, **how)

    def both(**how):
        outputs, pullback = jax.vjp(lambda a: run(a, **how), arguments)
        return outputs, pullback(jax.tree.map(jnp.ones_like, outputs))

    close(both(chunk_size=chunk_size), both(implementation="reference"), 2e-5)
