"""What a user relies on beside `test_recurrences.py`: blocking, strengths, recall, any shape."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import delta_rule_attention, linear_attention
from pallas_kernels.delta_rule_attention.cases import Case
from tests.pallas_kernels.accuracy import assert_close

DECAYS = (None, "head", "token")


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
    assert_close(blocked, once)


def test_the_last_value_of_a_repeated_key_is_remembered_where_linear_attention_sums_them():
    arguments, _ = Case("recall", batch=1, length=60, repeat=1, beta=1.0).arguments()
    k, v = arguments["k"], arguments["v"]
    assert_close(delta_rule_attention(k, k, v, arguments["beta"]), v)
    assert_close(linear_attention(k, k, v), jnp.cumsum(v, axis=1), 1e-5)


def test_tokens_of_strength_zero_write_nothing():
    arguments, _ = Case("idle", batch=1, length=100, initial_state=True, beta=0.0).arguments()
    y, state = delta_rule_attention(**arguments, return_state=True)
    assert_close(state, arguments["initial_state"])
    assert_close(y, jnp.einsum("bihd,bhde->bihe", arguments["q"], arguments["initial_state"]))


def test_orthogonal_keys_and_strength_one_are_linear_attention():
    k = jnp.eye(16)[None, :, None]
    q, v = jax.random.normal(jax.random.key(1), (2, 1, 16, 1, 16))
    g = -jax.random.uniform(jax.random.key(2), (1, 16, 1))
    assert_close(
        delta_rule_attention(q, k, v, jnp.ones((1, 16, 1)), log_decay=g), linear_attention(q, k, v, log_decay=g)
    )


@pytest.mark.slow
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

    assert_close(both(chunk_size=chunk_size), both(implementation="reference"), 2e-5)
