"""Lightning Attention-2: the op of OpenNLPLab/lightning-attention, and MiniMax's module of huggingface/transformers."""

from collections.abc import Mapping
from typing import Any

import jax

from attnlab.attention.linear.lightning_attention_2 import LightningAttention, lightning_attention
from attnlab.interop.names import Interleaved
from attnlab.interop.official import Official, Only, decode, options
from attnlab.nn.positions import alibi_slopes


def _slopes(module: Any, inputs: Any, given: Any) -> dict[str, jax.Array]:
    return jax.jit(lambda: {f"slopes_h{heads}": module(heads) for heads in range(1, 129)})()


def _minimax(
    module: LightningAttention, inputs: dict[str, jax.Array], given: Mapping[str, Any]
) -> dict[str, jax.Array]:
    """The result, the state after it, and the result of decoding the last five tokens one by one."""
    x, mask = inputs["x"], inputs.get("attention_mask")
    mask = None if mask is None else mask > 0
    _, state = module.prefill(x, module.init_state(x.shape[0]), mask=mask)
    y, _ = decode(module, x, x.shape[1] - 5)
    return {"y": module(x, mask=mask), "kv_state": state.memory, "y_decode": y}


OFFICIAL = [
    Official("_build_slope_tensor", alibi_slopes, call=_slopes),
    Official("linear_attn", lightning_attention, options(s="slopes")),
    Official(
        "MiniMaxLightningAttention",
        LightningAttention,
        options(
            hidden_size="features",
            num_attention_heads="num_heads",
            head_dim="head_dim",
            num_hidden_layers="num_layers",
            layer_idx="layer",
            norm_eps="eps",
            block_size=None,
            hidden_act=Only("silu"),
        ),
        {("query", "key", "value"): Interleaved("qkv_proj"), "gate": "output_gate", "out": "out_proj"},
        _minimax,
        ignore=("slope_rate",),  # follows from heads and layer
    ),
]
