"""What a user relies on beside `test_recurrences.py`: calls without order, empty rows, feature maps, any shape."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import NormalizedState, init_state, linear_attention
from pallas_kernels.linear_attention.cases import Case
from tests.pallas_kernels.accuracy import assert_close

DECAYS = (None, "head", "token", "channel")


def test_non_causal_segments_need_not_be_contiguous():
    arguments, _ = Case("scattered", batch=1, length=40, kv_length=60, causal=False).arguments()
    query_ids, key_ids = np.arange(40)[None] % 3, np.arange(60)[None] % 3
    got = linear_attention(**arguments, causal=False, segment_ids=(query_ids, key_ids))
    for segment in range(3):
        own, keys = query_ids[0] == segment, key_ids[0] == segment
        want = linear_attention(arguments["q"][:, own], arguments["k"][:, keys], arguments["v"][:, keys], causal=False)
        assert_close(got[:, own], want)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_non_causal_outputs_have_the_dtype_of_the_inputs_and_states_are_float32(dtype):
    x = jnp.ones((1, 5, 2, 3), dtype)
    y, state = linear_attention(x, x, x, causal=False, return_state=True)
    assert y.dtype == dtype and state.dtype == jnp.float32


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


def test_feature_maps():
    arguments, _ = Case("features", length=40).arguments()
    q, k, v = arguments["q"], arguments["k"], arguments["v"]

    def double(x):
        return jnp.concatenate([jnp.exp(x), jnp.exp(-x)], axis=-1)

    want, state = linear_attention(double(q), double(k), v, normalize=True, return_state=True)
    got, got_state = linear_attention(q, k, v, normalize=True, feature_map=double, return_state=True)
    assert_close((got, got_state), (want, state))
    assert got_state.kv.shape == (2, 2, 32, 16)
    got = linear_attention(q, k, v, feature_map=(jnp.square, jnp.abs))
    assert_close(got, linear_attention(q**2, jnp.abs(k), v))


def test_feature_maps_are_computed_in_float32_and_rounded_to_the_inputs():
    seen = []

    def note(x):
        seen.append(x.dtype)
        return x

    x = jnp.ones((1, 2, 1, 2), jnp.bfloat16)
    y = linear_attention(x, x, x, feature_map=note)
    assert seen == [jnp.float32, jnp.float32] and y.dtype == jnp.bfloat16


def test_the_state_is_a_pytree():
    state = init_state(2, 3, 4, 5, normalize=True)
    assert isinstance(jax.tree.map(lambda x: x + 1, state), NormalizedState)
    assert state.kv.shape == (2, 3, 4, 5) and state.k.shape == (2, 3, 4)


@pytest.mark.slow
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

    assert_close(both(chunk_size=chunk_size), both(implementation="reference"), 2e-5)
