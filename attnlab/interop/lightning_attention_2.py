"""Lightning Attention-2: the op of OpenNLPLab/lightning-attention, and MiniMax's module of huggingface/transformers."""

from typing import Any

import jax

from attnlab.attention.linear.lightning_attention_2 import lightning_attention
from attnlab.interop.names import Interleaved
from attnlab.interop.official import Given, Inputs, Official, Only, decode, options
from attnlab.nn.position_bias import alibi_slopes


def _slopes(slopes: Any, inputs: Inputs, given: Given) -> dict[str, jax.Array]:
    return jax.jit(lambda: {f"slopes_h{heads}": slopes(heads) for heads in range(1, 129)})()


def _minimax(module: Any, inputs: Inputs, given: Given) -> dict[str, jax.Array]:
    """The result, the state after it, and the result of decoding the last five tokens one by one."""
    x, mask = inputs["x"], inputs.get("attention_mask")
    mask = None if mask is None else mask > 0
    _, state = module.prefill(x, module.init_state(x.shape[0]), mask=mask)
    return {"y": module(x, mask=mask), "kv_state": state.memory, "y_decode": decode(module, x, x.shape[1] - 5)[0]}


_MINIMAX = options(hidden_size="features", num_attention_heads="num_heads", num_hidden_layers="num_layers")
_MINIMAX |= options(layer_idx="layer", norm_eps="eps", block_size=None, hidden_act=Only("silu"))
_NAMES = {("query", "key", "value"): Interleaved("qkv_proj"), "gate": "output_gate", "out": "out_proj"}
_TABLES = ("slope_rate",)  # follows from heads and layer

OFFICIAL = [
    Official("_build_slope_tensor", alibi_slopes, call=_slopes),
    Official("linear_attn", lightning_attention, {"s": "slopes"}),
    Official("MiniMaxLightningAttention", "lightning_attention_2", _MINIMAX, _NAMES, _minimax, ignore=_TABLES),
]
