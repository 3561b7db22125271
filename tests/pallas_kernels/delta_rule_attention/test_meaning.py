"""What a user relies on: chaining, decoding, packing, blocking, strengths, scale, dtypes, extreme decays."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import delta_rule_attention, delta_rule_attention_step, linear_attention
from pallas_kernels.delta_rule_attention import init_state
from pallas_kernels.delta_rule_attention.cases import Case

DECAYS = (None, "head", "token")
TOKENS = ("q", "k", "v", "beta")


def close(got, want, tolerance=2e-6):
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        scale = max(float(jnp.max(jnp.abs(w))), 1e-6)
        np.testing.assert_allclose(np.asarray(g) / scale, np.asarray(w) / scale, rtol=0, atol=tolerance)


def part(arguments, tokens):
    """The arguments of some of the tokens: everything that has a token axis, cut."""
    cut = {name: arguments[name][:, tokens] for name in TOKENS}
    decay = arguments.get("log_decay")
    return cut | ({} if decay is None else {"log_decay": decay if decay.ndim == 1 else decay[:, tokens]})


@pytest.mark.parametrize("decay", DECAYS)
def test_two_halves_chained_by_the_state_are_the_whole(decay):
    arguments, _ = Case("chain", length=150, heads=4, kv_heads=2, decay=decay).arguments()
    first, state = delta_rule_attention(**part(arguments, slice(0, 67)), return_state=True)
    second, state = delta_rule_attention(**part(arguments, slice(67, None)), initial_state=state, return_state=True)
    close((jnp.concatenate([first, second], axis=1), state), delta_rule_attention(**arguments, return_state=True))


@pytest.mark.parametrize("decay", DECAYS)
def test_steps_are_the_whole(decay):
    arguments, _ = Case("steps", length=9, heads=4, kv_heads=2, value_size=5, decay=decay).arguments()
    want = delta_rule_attention(**arguments, scale=0.3, return_state=True)
    state, outputs = init_state(2, 4, 16, 5), []
    for t in range(9):
        token = [arguments[name][:, t] for name in TOKENS]
        g = arguments.get("log_decay")
        g = g[:, t] if decay == "token" else g
        y, state = delta_rule_attention_step(*token, state, log_decay=g, scale=0.3)
        outputs.append(y)
    close((jnp.stack(outputs, axis=1), state), want)


@pytest.mark.parametrize("decay", DECAYS)
def test_packed_segments_are_separate_runs(decay):
    arguments, _ = Case("packing", batch=1, length=120, decay=decay, initial_state=True).arguments()
    first = arguments.pop("initial_state")
    borders = [0, 1, 37, 90, 120]
    ids = np.repeat([4, 7, 4, 0], np.diff(borders))[None]  # an id that comes back is a new segment
    got = delta_rule_attention(**arguments, segment_ids=ids, initial_state=first, return_state=True)
    outputs = []
    for start, stop in itertools.pairwise(borders):
        initial = first if start == 0 else None
        y, state = delta_rule_attention(**part(arguments, slice(start, stop)), initial_state=initial, return_state=True)
        outputs.append(y)
    close(got, (jnp.concatenate(outputs, axis=1), state))


def test_packed_segments_have_no_gradient_across_borders_nor_tokens_from_later_ones():
    arguments, _ = Case("leak", batch=1, length=90, decay="token").arguments()
    ids = jnp.repeat(jnp.arange(3), 30)[None]

    def middle(k):
        return jnp.sum(delta_rule_attention(**{**arguments, "k": k}, segment_ids=ids)[:, 30:50])

    gradient = np.asarray(jax.grad(middle)(arguments["k"]))[0]
    assert np.all(gradient[:30] == 0) and np.all(gradient[50:] == 0)
    assert np.all(np.any(gradient[30:50] != 0, axis=(1, 2)))


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_a_value_that_is_already_predicted_writes_nothing(implementation):
    """Blocking: with β = 1 the second pass over the same pairs of key and value finds no error to correct."""
    k = jnp.eye(8)[None, :, None]
    v = jax.random.normal(jax.random.key(0), (1, 8, 1, 5))
    ones = jnp.ones((1, 8, 1))
    _, once = delta_rule_attention(k, k, v, ones, return_state=True, implementation=implementation)
    twice = jax.tree.map(lambda x: jnp.concatenate([x, x], axis=1), (k, k, v, ones))
    y, state = delta_rule_attention(*twice, return_state=True, implementation=implementation)
    np.testing.assert_array_equal(state, once)
    np.testing.assert_array_equal(y, twice[2])
    # A compound of two known cues predicts the sum of their values: a third value for it is written as the difference.
    both = (k[:, :1] + k[:, 1:2]) / 2**0.5
    _, blocked = delta_rule_attention(both, both, (v[:, :1] + v[:, 1:2]) / 2**0.5, ones[:, :1], initial_state=once,
                                      return_state=True, implementation=implementation)  # fmt: skip
    close(blocked, once)


def test_the_last_value_of_a_repeated_key_is_remembered_where_linear_attention_sums_them():
    arguments, _ = Case("recall", batch=1, length=60, repeat=1, beta=1.0).arguments()
    k, v = arguments["k"], arguments["v"]
    close(delta_rule_attention(k, k, v, arguments["beta"]), v)
    close(linear_attention(k, k, v), jnp.cumsum(v, axis=1), 1e-5)


def test_tokens_of_strength_zero_write_nothing():
    arguments, _ = Case("idle", batch=1, length=100, initial_state=True, beta=0.0).arguments()
    y, state = delta_rule_attention(**arguments, return_state=True)
    close(state, arguments["initial_state"])
    close(y, jnp.einsum("bihd,bhde->bihe", arguments["q"], arguments["initial_state"]))


def test_orthogonal_keys_and_strength_one_are_linear_attention():
    k = jnp.eye(16)[None, :, None]
    q, v = jax.random.normal(jax.random.key(1), (2, 1, 16, 1, 16))
    g = -jax.random.uniform(jax.random.key(2), (1, 16, 1))
    close(delta_rule_attention(q, k, v, jnp.ones((1, 16, 1)), log_decay=g), linear_attention(q, k, v, log_decay=g))


@pytest.mark.parametrize("decay", ["head", "token"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_extreme_decays_stay_finite(decay, dtype):
    arguments, _ = Case("extreme", length=150, decay=decay, beta="wide").arguments(jnp.dtype(dtype))
    choices = jnp.asarray([0.0, -20.0, -1e4, -1e38, -1e-30])
    arguments["log_decay"] = choices[jnp.arange(arguments["log_decay"].size) % 5].reshape(arguments["log_decay"].shape)
    y, pullback = jax.vjp(lambda a: delta_rule_attention(**a).astype(jnp.float32), arguments)
    assert np.all(np.isfinite(y))
    assert all(np.all(np.isfinite(np.asarray(g, np.float32))) for g in jax.tree.leaves(pullback(y)))


def test_a_complete_decay_forgets_everything_and_a_positive_one_is_read_as_zero():
    arguments, _ = Case("forget", batch=1, length=100).arguments()
    y = delta_rule_attention(**arguments, log_decay=jnp.full((1, 100, 2), -jnp.inf))
    own = jnp.sum(arguments["q"] * arguments["k"], axis=-1, keepdims=True) * arguments["v"]
    close(y, arguments["beta"][..., None] * own)
    close(delta_rule_attention(**arguments, log_decay=jnp.full((2,), 0.5)), delta_rule_attention(**arguments))


def test_scale_multiplies_outputs_and_has_a_gradient():
    arguments, _ = Case("scale", length=40).arguments()
    y = delta_rule_attention(**arguments)
    close(delta_rule_attention(**arguments, scale=0.25), 0.25 * y)
    for scale in (0.25, 0.0):
        gradient = jax.grad(lambda s: jnp.vdot(delta_rule_attention(**arguments, scale=s), y))(scale)
        np.testing.assert_allclose(gradient, jnp.vdot(y, y), rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_outputs_have_the_dtype_of_the_inputs_and_states_are_float32(dtype):
    x, beta = jnp.ones((1, 5, 2, 3), dtype), jnp.ones((1, 5, 2), dtype)
    y, state = delta_rule_attention(x, x, x, beta, return_state=True)
    assert y.dtype == dtype and state.dtype == jnp.float32
    y, state = delta_rule_attention_step(x[:, 0], x[:, 0], x[:, 0], beta[:, 0], init_state(1, 2, 3, 3))
    assert y.dtype == dtype and state.dtype == jnp.float32
    assert jax.grad(lambda b: jnp.sum(delta_rule_attention(x, x, x, b).astype(jnp.float32)))(beta).dtype == dtype


def test_float64_is_accumulated_in_float64():
    with jax.enable_x64(True):
        arrays, options = Case("double", length=200, decay="token", initial_state=True).arrays()
        got = delta_rule_attention(**arrays, **options, return_state=True)
        want = delta_rule_attention(**arrays, **options, return_state=True, implementation="reference")
        assert got[1].dtype == jnp.float64
        close(got, want, 1e-14)


@settings(max_examples=5, deadline=None, derandomize=True)
@given(
    length=st.integers(1, 70),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    key_size=st.integers(1, 9),
    value_size=st.integers(1, 9),
    decay=st.sampled_from(DECAYS),
    segments=st.integers(0, 4),
    chunk_size=st.one_of(st.none(), st.integers(1, 40)),
)
def test_random_shapes(length, kv_heads, group, key_size, value_size, decay, segments, chunk_size):
    case = Case("random", 1, length, kv_heads * group, key_size, value_size, kv_heads, "uniform", decay, 1.0,
                segments=segments, initial_state=True)  # fmt: skip
    arguments, options = case.arguments()

    def both(**how):
        def run(arguments):
            outputs = delta_rule_attention(**arguments, **options, return_state=True, **how)
            return sum(jnp.sum(x) for x in outputs), outputs

        return jax.jit(jax.value_and_grad(run, has_aux=True))(arguments)

    close(both(chunk_size=chunk_size), both(implementation="reference"), 2e-5)
