"""Names of what torch.nn calls MultiheadAttention, TransformerEncoderLayer and TransformerDecoderLayer.

Tables for `names.Part`: `"attention": Part("self_attn", MULTIHEAD)`. DETR's layers have the same names.
"""

from typing import Any

from attnlab.interop.names import Name, Part

_QKV = ("query", "key", "value")

MULTIHEAD: dict[Any, Any] = {
    _QKV: Name("", leaves={"weight": "in_proj_weight", "bias": "in_proj_bias"}),
    "out": "out_proj",
}
"""A `CrossAttention` whose queries, keys and values have one width."""

MULTIHEAD_APART: dict[Any, Any] = {
    _QKV: Name("", leaves={"weight": ("q_proj_weight", "k_proj_weight", "v_proj_weight"), "bias": "in_proj_bias"}),
    "out": "out_proj",
}
"""A `CrossAttention` whose keys or values have another width than its queries (`kdim`, `vdim` there)."""

_FEED_FORWARD = {"mlp.fc1": "linear1", "mlp.fc2": "linear2"}

ENCODER_LAYER: dict[Any, Any] = {"attention": Part("self_attn", MULTIHEAD), **_FEED_FORWARD}
"""An `EncoderLayer`."""

DECODER_LAYER: dict[Any, Any] = {
    "attention": Part("self_attn", MULTIHEAD),
    "cross_attention": Part("multihead_attn", MULTIHEAD),
    **_FEED_FORWARD,
}
"""A `DecoderLayer` whose memory has the width of its tokens."""
