"""Channel group attention to a context and under masks, and what it refuses."""

import numpy as np
import pytest
from flax import nnx

from attnlab.attention.linear.davit import ChannelGroupAttention, channel_attention
from tests.accuracy import relative_rms


def test_absent_tokens_make_no_scores():
    left, right, value = np.random.default_rng(0).normal(size=(3, 2, 5, 2, 3)).astype(np.float32)
    mask = np.array([[1, 1, 0, 1, 0], [0] * 5], bool)
    scores = 0.7 * np.einsum("mhc,mhd->hcd", left[0, mask[0]], right[0, mask[0]])
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    y = channel_attention(left, right, value[:, :4], scale=0.7, mask=mask)
    assert relative_rms(y[0], np.einsum("hcd,nhd->nhc", weights, value[0, :4])) < 1e-6 and not y[1].any()


def test_refusals():
    for options in ({"causal": True}, {"value_dim": 3}):
        with pytest.raises(ValueError, match="not causally"):
            ChannelGroupAttention(8, num_heads=2, **options, rngs=nnx.Rngs(0))
    x = np.ones((1, 4, 8), np.float32)
    with pytest.raises(ValueError, match="does not take context"):
        ChannelGroupAttention(8, num_heads=2, version=2, rngs=nnx.Rngs(0))(x, x[:, :3])
