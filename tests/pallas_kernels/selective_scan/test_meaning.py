"""What a user relies on: chaining, decoding, packing, causality, dtypes, extreme step sizes, any shape."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import selective_scan, selective_scan_step
from pallas_kernels.selective_scan import init_state
from pallas_kernels.selective_scan.cases import TOKENS, Case
from tests.pallas_kernels.accuracy import assert_close
from tests.pallas_kernels.quick import quick


def part(arguments, tokens):
    """The arguments of some of the tokens."""
    return {name: x[:, tokens] if name in TOKENS else x for name, x in arguments.items()}


@pytest.mark.parametrize("groups", quick([None, 2], ["2"]))
def test_two_halves_chained_by_the_state_are_the_whole(groups):
    arguments, options = Case("chain", length=150, groups=groups, gate=True).arguments()
    want = selective_scan(**arguments, **options, return_state=True)
    first, state = selective_scan(**part(arguments, slice(0, 67)), **options, return_state=True)
    rest = part(arguments, slice(67, None))
    second, state = selective_scan(**rest, **options, initial_state=state, return_state=True)
    assert_close((jnp.concatenate([first, second], axis=1), state), want)


@pytest.mark.parametrize("groups", quick([None, 2], ["2"]))
def test_steps_are_the_whole(groups):
    arguments, options = Case("steps", length=9, groups=groups, gate=True).arguments()
    want = selective_scan(**arguments, **options, return_state=True, return_states=True)
    state, outputs, states = init_state(2, 8, 4), [], []
    for t in range(9):
        token = part(arguments, t)
        first = [token.pop(name) for name in ("x", "delta", "a", "b", "c")]
        y, state = selective_scan_step(*first, state, **token, **options)
        outputs.append(y)
        states.append(state)
    assert_close((jnp.stack(outputs, axis=1), state, jnp.stack(states, axis=1)), want)


def test_packed_segments_are_separate_runs():
    arguments, options = Case("packing", batch=1, length=120, initial_state=True).arguments()
    first = arguments.pop("initial_state")
    borders = [0, 1, 37, 90, 120]
    ids = np.repeat([4, 7, 4, 0], np.diff(borders))[None]  # an id that comes back is a new segment
    got = selective_scan(**arguments, **options, segment_ids=ids, initial_state=first, return_state=True)
    outputs = []
    for start, stop in itertools.pairwise(borders):
        tokens = part(arguments, slice(start, stop))
        y, state = selective_scan(**tokens, **options, initial_state=None if start else first, return_state=True)
        outputs.append(y)
    assert_close(got, (jnp.concatenate(outputs, axis=1), state))


def test_no_gradient_from_later_tokens_nor_across_borders_of_segments():
    arguments, options = Case("leak", batch=1, length=90, initial_state=True).arguments()
    ids = jnp.repeat(jnp.arange(3), 30)[None]

    def middle(x):
        return jnp.sum(selective_scan(**{**arguments, "x": x}, **options, segment_ids=ids)[:, 30:50])

    gradient = np.asarray(jax.grad(middle)(arguments["x"]))[0]
    assert np.all(gradient[:30] == 0) and np.all(gradient[50:] == 0)
    assert np.all(np.any(gradient[30:50] != 0, axis=1))


@pytest.mark.parametrize("dtype", quick(["float32", "bfloat16"], ["bfloat16"]))
def test_extreme_step_sizes_stay_finite(dtype):
    arguments, options = Case("extreme", length=150, gate=True).arguments(jnp.dtype(dtype))
    choices = jnp.asarray([0.0, 1e4, -1e4, 1e20, -1e20], jnp.dtype(dtype))
    arguments["delta"] = choices[jnp.arange(2 * 150 * 8) % 5].reshape(2, 150, 8)
    y, pullback = jax.vjp(lambda a: selective_scan(**a, **options).astype(jnp.float32), arguments)
    assert np.all(np.isfinite(y))
    assert all(np.all(np.isfinite(np.asarray(g, np.float32))) for g in jax.tree.leaves(pullback(jnp.ones_like(y))))


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_a_state_never_grows_by_itself(implementation):
    x = jnp.zeros((1, 5, 2)).at[:, 0].set(1.0)
    ones = jnp.ones((1, 5, 1))

    def run(a):
        return selective_scan(x, jnp.ones_like(x), a, ones, ones, implementation=implementation)

    np.testing.assert_array_equal(run(jnp.ones((2, 1))), jnp.ones((1, 5, 2)))
    np.testing.assert_array_equal(jax.grad(lambda a: jnp.sum(run(a)))(jnp.ones((2, 1))), jnp.zeros((2, 1)))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_outputs_have_the_dtype_of_the_inputs_and_states_are_float32(dtype):
    arguments, options = Case("dtypes", length=5, gate=True).arguments(jnp.dtype(dtype))

    def outputs(arguments):
        return selective_scan(**arguments, **options, return_state=True, return_states=True)

    y, *states = jax.eval_shape(outputs, arguments)
    assert y.dtype == dtype and {state.dtype for state in states} == {jnp.dtype(jnp.float32)}
    gradients = jax.eval_shape(jax.grad(lambda a: jnp.sum(outputs(a)[0].astype(jnp.float32))), arguments)
    assert jax.tree.map(lambda g: g.dtype, gradients) == jax.tree.map(lambda x: x.dtype, arguments)


def test_float64_is_accumulated_in_float64():
    with jax.enable_x64(True):
        arrays, options = Case("double", length=200, initial_state=True).arrays()
        got = selective_scan(**arrays, **options, return_state=True)
        assert got[1].dtype == jnp.float64
        assert_close(got, selective_scan(**arrays, **options, return_state=True, implementation="reference"), 1e-14)


@pytest.mark.slow
@settings(max_examples=5, deadline=None, derandomize=True)
@given(
    length=st.integers(1, 70),
    groups=st.integers(1, 3),
    share=st.integers(1, 3),
    state_size=st.integers(1, 5),
    softplus=st.booleans(),
    gate=st.booleans(),
    segments=st.integers(0, 4),
    chunk_size=st.one_of(st.none(), st.integers(1, 40)),
)
def test_random_shapes(length, groups, share, state_size, softplus, gate, segments, chunk_size):
    case = Case("random", 1, length, groups * share, state_size, groups, softplus, 0.5, gate=gate, segments=segments,
                initial_state=True)  # fmt: skip
    arguments, options = case.arguments()

    def both(**how):
        def run(arguments):
            outputs = selective_scan(**arguments, **options, return_state=True, **how)
            return sum(jnp.sum(x) for x in outputs), outputs

        return jax.jit(jax.value_and_grad(run, has_aux=True))(arguments)

    assert_close(both(chunk_size=chunk_size), both(implementation="reference"), 2e-5)
