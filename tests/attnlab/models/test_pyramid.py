"""Pyramids of images of any size, with other mixers, and what their families hand over."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab.attention.linear.hedgehog import HedgehogAttention
from attnlab.interop.davit import OFFICIAL
from attnlab.models.block import Block
from attnlab.models.davit import DaViT
from attnlab.nn.mlp import LayerScale

SMALL = {"features": (8, 16), "num_heads": (2, 2), "depths": (1, 2), "window": 3, "num_classes": 5}


class Doubling(nnx.Module):
    accepts = frozenset()

    def __call__(self, x):
        return 2 * x


def test_sides_are_rounded_up_and_mixers_replaced():
    options = SMALL | {"mixers": "hedgehog", "replaced": (1, None)}
    model = nnx.eval_shape(lambda: DaViT(**options, image_size=(30, 37), rngs=nnx.Rngs(0)))
    assert [isinstance(block.mixer, HedgehogAttention) for block in model.blocks] == [True, False, *[True] * 4]
    images = jax.ShapeDtypeStruct((2, 30, 37, 3), jnp.float32)
    maps = nnx.eval_shape(lambda m, x: m.stages(x), model, images)
    assert [part.shape for part in maps] == [(2, 8, 10, 8), (2, 4, 5, 16)]
    assert nnx.eval_shape(lambda m, x: m(x), model, images).shape == (2, 5)
    with pytest.raises(ValueError, match="kinds must be some of spatial, channel"):
        DaViT(**SMALL, kinds=("spatial", "temporal"), rngs=nnx.Rngs(0))


@pytest.mark.slow
@pytest.mark.parametrize("named", [False, True])
def test_official_names_of_both_kinds_of_towers(named):
    """What is dumped under the names of Florence-2's towers, or of the others, is loaded from them."""
    config = {
        "depths": (1, 1),
        "embed_dims": (8, 16),
        "num_heads": (2, 2),
        "num_classes": 3,
        "cpe_act": True,
        "ffn": False,
    }
    config |= {"down_kernel_size": 3, "channel_attn_v2": True, "head_norm_first": True, "window_size": 2}
    official = OFFICIAL[-1 if named else -2]
    one, other = (official.build(config | {"named_blocks": named}, rngs=nnx.Rngs(seed)) for seed in (0, 1))
    arrays = official.dump(one)
    assert f"stages.1.blocks.0.{'channel_block' if named else 1}.attn.qkv.weight" in arrays
    assert {"norm_pre.weight", "head.fc.weight", "stages.1.downsample.conv.weight", "stem.norm.bias"} <= set(arrays)
    assert not any("mlp" in name for name in arrays) and any("cpe2" in name for name in arrays)
    official.load(other, arrays)
    x = np.random.default_rng(0).normal(size=(1, 19, 22, 3)).astype(np.float32)
    np.testing.assert_array_equal(one(x), other(x))


def test_a_scale_stands_on_the_branch_or_beside_it():
    x, scale = jnp.ones((1, 2, 2, 4)), LayerScale(4, init=0.5, use_bias=True, rngs=nnx.Rngs(0))
    scale.bias[...] = jnp.full(4, 3.0)
    for scaled, expected in (("branch", 1 + 0.5 * 2 + 3), ("skip", 0.5 * 1 + 3 + 2)):
        block = Block(Doubling(), None, None, None, scale1=scale, scaled=scaled)
        np.testing.assert_allclose(block(x), np.full(x.shape, expected))
    with pytest.raises(ValueError, match="scaled must be"):
        Block(Doubling(), None, None, None, scaled="both")
