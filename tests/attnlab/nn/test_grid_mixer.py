"""What mixers of images promise at their points, in windows and with a prefix."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import Layout
from attnlab.attention.dense.spatial_reduction_attention import SpatialReductionAttention
from attnlab.attention.linear.agent_attention import AgentAttention, AgentCore
from attnlab.attention.linear.inline_attention import InlineAttention
from attnlab.attention.local.cross_shaped_windows import CrossShapedWindowAttention
from attnlab.attention.local.neighborhood_attention import NeighborhoodAttention
from attnlab.attention.local.window_attention import WindowAttention
from attnlab.attention.sparse.biformer_bra import BiLevelRoutingAttention, RegionalRoutingAttention
from attnlab.points import Attachment, Edits, Intervention

GRID = (4, 6)
AGENTS = {"num_agents": 4}
MIXERS = {
    "window": functools.partial(WindowAttention, window=2, shift=1),
    "cross-shaped": functools.partial(CrossShapedWindowAttention, grid=GRID, split=2),
    "cross-shaped agents": functools.partial(
        CrossShapedWindowAttention, grid=GRID, split=2, core=functools.partial(AgentCore, **AGENTS)
    ),
    "spatial reduction": functools.partial(SpatialReductionAttention, reduction=2),
    "agent": functools.partial(AgentAttention, grid=GRID, **AGENTS),
    "agent, reduced": functools.partial(AgentAttention, grid=GRID, reduction=2, **AGENTS),
    "agent, windows": functools.partial(AgentAttention, window=2, shift=1, **AGENTS),
    "agent, prefix": functools.partial(AgentAttention, grid=GRID, prefix=2, **AGENTS),
    "inline": functools.partial(InlineAttention, grid=GRID),
    "inline, windows": functools.partial(InlineAttention, window=2, shift=1),
    "inline, prefix": functools.partial(InlineAttention, grid=GRID, prefix=2),
    "routing": functools.partial(BiLevelRoutingAttention, n_win=2, topk=2),
    "routing, padded": functools.partial(BiLevelRoutingAttention, n_win=4, topk=2, auto_pad=True),
    "regional routing": functools.partial(RegionalRoutingAttention, n_win=2, topk=2),
    "neighborhood": functools.partial(NeighborhoodAttention, kernel_size=3),
}


class FirstHeadOfToken(Intervention):
    """Keeps of all heads the first, and that at one token alone."""

    def __init__(self, token: int):
        self.token = token

    def heads(self, y, at, memory):
        return jnp.zeros_like(y).at[:, self.token, 0].set(y[:, self.token, 0]), memory


class WithoutValues(Intervention):
    """Sets the values of one token to zero."""

    def __init__(self, token: int):
        self.token = token

    def qkv(self, heads, at, memory):
        return heads._replace(v=heads.v.at[:, self.token].set(0)), memory


def edited(mixer, x, intervention):
    return mixer(x, edits=Edits([Attachment(intervention)], 0)).reshape(x.shape[0], -1, x.shape[-1])


@pytest.mark.parametrize("name", MIXERS)
def test_points_have_whole_heads_of_tokens_in_their_order(name):
    mixer = MIXERS[name](8, num_heads=2, rngs=nnx.Rngs(0))
    prefix = mixer.prefix
    x = jax.random.normal(jax.random.key(0), (2, prefix + 24, 8) if prefix else (2, *GRID, 8))
    y, seen = nnx.capture(mixer, nnx.Intermediate)(x)
    heads = seen["heads"][0]
    assert mixer.points == {"qkv", "heads"}
    assert heads.shape == seen["qkv"][0].q.shape == (2, prefix + 24, 2, 4)
    np.testing.assert_allclose(mixer.out(heads).reshape(y.shape), y, atol=1e-6)
    alone = edited(mixer, x, FirstHeadOfToken(7))
    np.testing.assert_allclose(alone[:, 7], mixer.out(heads.at[:, :, 1].set(0))[:, 7], atol=1e-6)
    np.testing.assert_allclose(alone[:, 8], jnp.broadcast_to(mixer.out.bias[...], (2, 8)), atol=1e-6)
    if seen["qkv"][0].v.shape[1] == heads.shape[1]:
        weights = seen["attention"][0]
        changed = jnp.abs(edited(mixer, x, WithoutValues(9)) - y.reshape(2, -1, 8)).max((0, 2)) > 1e-6
        reads = (weights[:, :, :, 9] != 0).any((0, 1))
        assert (changed | ~reads).all(), "who reads the token notices"


@pytest.mark.parametrize("cls", [functools.partial(AgentAttention, **AGENTS), InlineAttention])
def test_one_window_of_the_grid_is_the_image_and_a_prefix_makes_a_sequence(cls):
    image = cls(8, num_heads=2, grid=GRID, rngs=nnx.Rngs(0))
    window = cls(8, num_heads=2, window=GRID, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, *GRID, 8))
    np.testing.assert_array_equal(image(x), window(x))
    behind = cls(8, num_heads=2, grid=GRID, prefix=1, rngs=nnx.Rngs(0))
    assert behind.layout is Layout.SEQUENCE
    with pytest.raises(ValueError, match=r"built for tokens \(25,\), got x of shape \(2, 24, 8\)"):
        behind(x.reshape(2, 24, 8))
