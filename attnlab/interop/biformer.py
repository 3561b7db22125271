"""Weights of rayleizhu/BiFormer (arXiv:2303.08810): its attention, its block and its backbone.

    model = biformer_tiny(rngs=nnx.Rngs(0))
    load_biformer(model, read_state_dict("biformer_tiny_best.pth"))

where the authors' files keep the state dict below the name `model`.
"""

from collections.abc import Mapping

from jax.typing import ArrayLike

from attnlab.attention.sparse.biformer_bra import BiLevelRoutingAttention, RegionalRoutingAttention
from attnlab.interop import official
from attnlab.interop.official import StateDict
from attnlab.models.biformer import BiFormer, BiFormerBlock, ConvMixer, Downsample, PlainAttention


def load_routing_attention(module: BiLevelRoutingAttention, weights: StateDict) -> None:
    """Loads `BiLevelRoutingAttention` of ops/bra_legacy.py."""
    official.linear(module.qkv, weights, "qkv.qkv")
    if module.lepe is not None:
        official.conv(module.lepe, weights, "lepe")
    if module.router is not None:
        official.linear(module.router, weights, "router.emb")
    if module.out is not None:
        official.linear(module.out, weights, "wo")


def load_regional_routing_attention(module: RegionalRoutingAttention, weights: StateDict) -> None:
    """Loads `nchwBRA` of ops/bra_nchw.py."""
    official.linear(module.qkv, weights, "qkv_linear")
    if module.lepe is not None:
        official.conv(module.lepe, weights, "lepe")
    official.linear(module.out, weights, "output_linear")


def load_plain_attention(module: PlainAttention, weights: StateDict) -> None:
    """Loads `Attention` or `AttentionLePE` of models/_common.py."""
    official.linear(module.qkv, weights, "qkv")
    official.linear(module.out, weights, "proj")
    if module.local is not None:
        official.conv(module.local, weights, "lepe")


def load_block(module: BiFormerBlock, weights: StateDict) -> None:
    """Loads `Block` of models/biformer.py."""
    if module.position is not None:
        official.conv(module.position, weights, "pos_embed")
    attention = weights.sub("attn")
    if isinstance(module.attention, BiLevelRoutingAttention):
        load_routing_attention(module.attention, attention)
    elif isinstance(module.attention, PlainAttention):
        load_plain_attention(module.attention, attention)
    else:
        _load_conv_mixer(module.attention, attention)
    official.norm(module.norm1, weights, "norm1")
    official.norm(module.norm2, weights, "norm2")
    official.linear(module.mlp.fc1, weights, "mlp.0")
    if module.mlp.conv is not None:
        official.conv(module.mlp.conv, weights, "mlp.1.dwconv")
    official.linear(module.mlp.fc2, weights, "mlp.3")
    if module.scale1 is not None:
        official.param(module.scale1.scale, weights, "gamma1")
        official.param(module.scale2.scale, weights, "gamma2")


def load_biformer(module: BiFormer, arrays: Mapping[str, ArrayLike]) -> None:
    """Loads a state dict of `BiFormer` of models/biformer.py.

    Args:
      module: of the same configuration.
      arrays: the official state dict.

    Raises:
      StateDictError: if the two do not fit.
    """
    with StateDict(arrays, into=module) as weights:
        _load_downsample(module.stem, weights.sub("downsample_layers.0"), 0)
        for i, downsample in enumerate(module.downsamples):
            _load_downsample(downsample, weights.sub(f"downsample_layers.{i}"), 0 if i else 3)
        for i, stage in enumerate(module.stages):
            for j, block in enumerate(stage):
                load_block(block, weights.sub(f"stages.{i}.{j}"))
        official.batch_norm(module.norm, weights, "norm")
        if module.head is not None:
            official.linear(module.head, weights, "head")


def _load_downsample(module: Downsample, weights: StateDict, first: int) -> None:
    official.conv(module.conv, weights, f"{first}")
    official.batch_norm(module.norm, weights, f"{first + 1}")


def _load_conv_mixer(module: ConvMixer, weights: StateDict) -> None:
    for place, conv in enumerate((module.conv_in, module.conv, module.conv_out), 1):
        official.conv(conv, weights, f"{place}")
