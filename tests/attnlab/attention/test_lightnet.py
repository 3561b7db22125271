"""LightNet: short convolutions wherever tokens come in parts, extreme logits, and padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab.attention.linear.lightnet import LightNetAttention, additive_recurrence
from tests.accuracy import relative_rms


def build(**options):
    sizes = {"num_heads": 2, "head_dim": 5, "gate_rank": 3, "conv_size": 3, "conv_bias": True}
    return LightNetAttention(8, **(sizes | options), rngs=nnx.Rngs(0))


def draw(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize(
    "cross", [pytest.param(c, marks=() if c == "no" else pytest.mark.slow) for c in ("no", "whole", "causal")]
)
def test_decoding_with_convolutions_equals_the_whole(cross):
    mixer, x = build(causal=cross != "whole", context_features=None if cross == "no" else 4), draw(2, 9, 8)
    context = () if cross == "no" else (draw(2, 9, 4),)
    mask = jnp.arange(6) >= jnp.array([[2], [0]])  # the first prompt is two tokens shorter
    x = np.where(np.pad(mask, ((0, 0), (0, 3)), constant_values=True)[..., None], x, 7)
    state = mixer.init_state(2, **({"context": context[0]} if context else {}))
    y, state = mixer.prefill(x[:, :6], state, mask=mask)
    for t in range(6, 9):
        row, state = mixer.step(x[:, t], state)
        y = jnp.concatenate([y, row[:, None]], 1)
    assert relative_rms(y[1], mixer(x, *context)[1]) < 1e-5
    shorter = mixer(x[:, 2:], *(c[:, :7] if cross == "causal" else c for c in context))
    assert relative_rms(y[0, 2:], shorter[0]) < 1e-5


@pytest.mark.slow
def test_packed_segments_with_convolutions():
    mixer, x, ids = build(), draw(1, 9, 8), jnp.asarray([[4] * 4 + [1] * 2 + [2] * 3])
    packed = mixer(x, segment_ids=ids)
    for start, stop in ((0, 4), (4, 6), (6, 9)):
        assert relative_rms(packed[:, start:stop], mixer(x[:, start:stop])) < 1e-5


@pytest.mark.parametrize("causal", [False, True])
def test_logits_of_any_size(causal):
    """The recurrence is a softmax, at ±300 too, where exp alone is 0 or infinite."""
    q, k, v, g = draw(1, 12, 1, 3), draw(1, 12, 1, 3) + 2, draw(1, 12, 1, 4), 300 * draw(1, 12, 1, 3)
    seen = np.tri(12)[None, :, :, None, None] if causal else np.ones((1, 12, 12, 1, 1))
    wide = np.where(seen > 0, g[:, None].astype(np.float64), -np.inf)
    weights = np.exp(wide - wide.max(2, keepdims=True))
    weights /= weights.sum(2, keepdims=True)
    want = np.einsum("bnhd,bnmhd,bmhd,bmhe->bnhe", q, weights, k, v)
    assert relative_rms(additive_recurrence(q, k, v, g, causal=causal), want) < 1e-5


def test_gradients_under_padding_are_finite():
    mixer, x, mask = build(), draw(2, 6, 8), jnp.arange(6) >= jnp.array([[3], [6]])
    gradient = jax.grad(lambda x: (mixer(x, mask=mask) ** 2).sum())(x)
    assert jnp.isfinite(gradient).all() and gradient[0, 3:].all() and not gradient[1].any()
