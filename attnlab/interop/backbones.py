"""Weights of the papers' vision backbones: PVT, Swin, CSwin and DeiT with softmax, agent or InLine attention.

    model = agent_transformer("agent_swin_tiny", rngs=nnx.Rngs(0))
    load_backbone(model, read_state_dict("agent_swin_t.pth"))

`load_mixer` loads one attention module of these models, by its class. Official names are those of
LeapLabTHU/Agent-Attention and LeapLabTHU/InLine, which keep those of PVT, Swin, CSwin and DeiT.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from attnlab.attention.dense.softmax_attention import SoftmaxAttention
from attnlab.attention.dense.spatial_reduction_attention import SpatialReductionAttention
from attnlab.attention.linear.agent_attention import AgentAttention, AgentCore
from attnlab.attention.linear.inline_attention import InlineCore
from attnlab.attention.local.cross_shaped_windows import CrossShapedWindowAttention, StripeAttention
from attnlab.contract import TokenMixer
from attnlab.interop import official
from attnlab.models.block import Block
from attnlab.models.cswin import CSwinTransformer
from attnlab.models.deit import DeiT
from attnlab.models.inline_transformers import NormedInlineAttention
from attnlab.models.pvt import PyramidVisionTransformer
from attnlab.models.swin import SwinTransformer
from attnlab.nn.dense_mixer import Core
from attnlab.nn.grid_mixer import GridMixer

BUFFERS = ("attn_mask", "relative_position_index")
"""Tables that the authors' modules store and that are computed here."""


def load_backbone(model: nnx.Module, arrays: Mapping[str, ArrayLike]) -> None:
    """Loads an official state dict into a backbone, by its class.

    Args:
      model: a `PyramidVisionTransformer`, `SwinTransformer`, `CSwinTransformer` or `DeiT`.
      arrays: from official names to arrays.

    Raises:
      TypeError: for another class.
      StateDictError: if the state dict and the model do not fit.
    """
    with official.StateDict(arrays, into=model, ignore=BUFFERS) as weights:
        for cls, load in _BACKBONES.items():
            if isinstance(model, cls):
                load(model, weights)
                break
        else:
            raise TypeError(
                f"load_backbone takes {', '.join(c.__name__ for c in _BACKBONES)}, got {type(model).__name__}"
            )
        official.linear(model.head, weights, "head")


def load_block(block: Block, weights: official.StateDict, mixer: str = "attn") -> None:
    """Loads a block; `mixer` is what stands before the names of its attention, "" if nothing does."""
    inside = isinstance(block.mixer, NormedInlineAttention)
    official.norm(block.mixer.norm if inside else block.norm1, weights, "norm1")
    load_mixer(block.mixer, weights.sub(mixer))
    official.norm(block.norm2, weights, "norm2")
    official.linear(block.mlp.fc1, weights, "mlp.fc1")
    official.linear(block.mlp.fc2, weights, "mlp.fc2")


def load_mixer(mixer: TokenMixer, weights: official.StateDict) -> None:
    """Loads an attention module with its projections, by its class.

    Raises:
      TypeError: for a class that these backbones do not have.
      StateDictError: if the state dict and the module do not fit.
    """
    for cls, load in _MIXERS.items():
        if isinstance(mixer, cls):
            load(mixer, weights)
            return
    raise TypeError(f"load_mixer takes {', '.join(cls.__name__ for cls in _MIXERS)}, got {type(mixer).__name__}")


def load_agent_core(core: AgentCore, weights: official.StateDict) -> None:
    """Loads the biases of agent attention."""

    def table(variable: nnx.Variable, name: str, *squeezed: int) -> None:
        official.param(variable, weights, name, lambda a: jnp.squeeze(a, squeezed) if squeezed else a)

    table(core.aggregate_table, "an_bias")
    table(core.broadcast_table, "na_bias")
    table(core.aggregate_row, "ah_bias", 0, 4)
    table(core.aggregate_column, "aw_bias", 0, 3)
    table(core.broadcast_row, "ha_bias", 0, 3)
    table(core.broadcast_column, "wa_bias", 0, 2)
    if core.prefix:
        table(core.aggregate_prefix, "ac_bias", 0)
        table(core.broadcast_prefix, "ca_bias", 0)


def load_inline_core(core: InlineCore, weights: official.StateDict) -> None:
    """Loads what computes the kernels of InLine attention."""
    official.within_heads(core.describe, weights, "residual.0")
    official.within_heads(core.kernels, weights, "residual.2")


def load_stripe(branch: StripeAttention, weights: official.StateDict) -> None:
    """Loads one branch of CSwin's attention."""
    _load_core(branch.core, weights)
    official.depthwise(branch.position, weights, "get_v")


def _load_core(core: Core, weights: official.StateDict) -> None:
    if isinstance(core, AgentCore):
        load_agent_core(core, weights)
    elif isinstance(core, InlineCore):
        load_inline_core(core, weights)
    elif core.bias is not None:
        official.param(core.bias.table, weights, "relative_position_bias_table")


def _load_mixer(mixer: GridMixer | SpatialReductionAttention | SoftmaxAttention, weights: official.StateDict) -> None:
    if "qkv.weight" in weights:
        official.to_heads((mixer.query, mixer.key, mixer.value), weights, "qkv")
    else:
        official.to_heads((mixer.query,), weights, "q")
        official.to_heads((mixer.key, mixer.value), weights, "kv")
    _load_core(mixer.core, weights)
    if isinstance(mixer, AgentAttention):
        official.depthwise(mixer.local, weights, "dwc")
    if (reduce := getattr(mixer, "reduce", None)) is not None:
        official.conv(reduce.conv, weights, "sr")
        official.norm(reduce.norm, weights, "norm")
    official.from_heads(mixer.out, weights, "proj")


def _load_cross_shaped(mixer: CrossShapedWindowAttention, weights: official.StateDict) -> None:
    official.to_heads((mixer.query, mixer.key, mixer.value), weights, "qkv")
    for index, branch in enumerate(mixer.branches):
        load_stripe(branch, weights.sub(f"attns.{index}"))
    official.from_heads(mixer.out, weights, "proj")


def _load_pvt(model: PyramidVisionTransformer, weights: official.StateDict) -> None:
    for number, stage in enumerate(model.stage, 1):
        shape = stage.position.table.shape

        def grid(table: jax.Array, shape: tuple[int, ...] = shape) -> jax.Array:
            return table.reshape(shape)

        official.param(stage.position.table, weights, f"pos_embed{number}", grid)
        embed = model.stem if stage.down is None else stage.down
        official.conv(embed.conv, weights, f"patch_embed{number}.proj")
        official.norm(embed.norm, weights, f"patch_embed{number}.norm")
        for index, block in enumerate(stage.blocks):
            load_block(block, weights.sub(f"block{number}.{index}"))


def _load_swin(model: SwinTransformer, weights: official.StateDict) -> None:
    official.conv(model.stem.conv, weights, "patch_embed.proj")
    if model.stem.norm is not None:
        official.norm(model.stem.norm, weights, "patch_embed.norm")
    if (position := model.stage[0].position) is not None:
        shape = position.table.shape
        official.param(position.table, weights, "absolute_pos_embed", lambda table: table.reshape(shape))
    for number, stage in enumerate(model.stage):
        for index, block in enumerate(stage.blocks):
            load_block(block, weights.sub(f"layers.{number}.blocks.{index}"))
        if stage.down is not None:
            official.norm(stage.down.norm, weights, f"layers.{number - 1}.downsample.norm")
            official.linear(stage.down.reduction, weights, f"layers.{number - 1}.downsample.reduction")
    official.norm(model.norm, weights, "norm")


def _load_cswin(model: CSwinTransformer, weights: official.StateDict) -> None:
    for number, stage in enumerate(model.stage):
        entry = stage.down if number else model.stem
        conv, norm = (f"merge{number}.conv", f"merge{number}.norm") if number else _CSWIN_STEM
        official.conv(entry.conv, weights, conv)
        official.norm(entry.norm, weights, norm)
        for index, block in enumerate(stage.blocks):
            load_block(block, weights.sub(f"stage{number + 1}.{index}"), mixer="")
    official.norm(model.norm, weights, "norm")


def _load_deit(model: DeiT, weights: official.StateDict) -> None:
    official.conv(model.stem.conv, weights, "patch_embed.proj")
    official.param(model.stage[0].prefix.tokens, weights, "cls_token", lambda a: a[0])
    official.param(model.stage[0].position.table, weights, "pos_embed", lambda a: a[0])
    for index, block in enumerate(model.blocks):
        load_block(block, weights.sub(f"blocks.{index}"))
    official.norm(model.norm, weights, "norm")


_CSWIN_STEM = ("stage1_conv_embed.0", "stage1_conv_embed.2")
_BACKBONES = {
    PyramidVisionTransformer: _load_pvt,
    SwinTransformer: _load_swin,
    CSwinTransformer: _load_cswin,
    DeiT: _load_deit,
}
_MIXERS = {
    GridMixer: _load_mixer,
    SoftmaxAttention: _load_mixer,
    SpatialReductionAttention: _load_mixer,
    CrossShapedWindowAttention: _load_cross_shaped,
}
