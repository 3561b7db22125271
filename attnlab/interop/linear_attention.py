"""Official weights of the linear attention mechanisms: Lightning Attention-2, TransNormerLLM, Hedgehog."""

from collections.abc import Mapping

from jax.typing import ArrayLike

from attnlab.attention.linear.hedgehog import HedgehogFeatureMap
from attnlab.attention.linear.lightning_attention_2 import LightningAttention
from attnlab.attention.linear.tnl import NormLinearAttention, TnlAttention
from attnlab.interop import official
from attnlab.interop.official import StateDict
from attnlab.models.tnl import TransNormerLLM
from attnlab.nn.mlp import GatedMLP


def load_lightning_attention(module: LightningAttention, weights: StateDict) -> None:
    """From `MiniMaxLightningAttention` of transformers; its `slope_rate` is a constant here."""
    official.to_heads((module.query, module.key, module.value), weights, "qkv_proj", heads_first=True)
    official.to_heads((module.gate,), weights, "output_gate")
    official.norm(module.norm, weights, "norm")
    official.from_heads(module.out, weights, "out_proj")


def load_norm_linear_attention(module: NormLinearAttention, weights: StateDict) -> None:
    """From `NormLinearAttention` of TransNormerLLM and its ports, with `qkvu_proj` in one."""
    official.to_heads((module.query, module.key, module.value, module.gate), weights, "qkvu_proj")
    official.from_heads(module.out, weights, "out_proj")
    if module.theta is not None:
        official.param(module.theta, weights, "lrpe.theta", lambda theta: theta[:, 0])


def load_tnl_attention(module: TnlAttention, weights: StateDict) -> None:
    """From `TnlAttention` of OpenNLPLab/lightning-attention; its `slope_rate` is a constant here."""
    for layer, name in ((module.query, "q_proj"), (module.key, "k_proj"), (module.value, "v_proj")):
        official.to_heads((layer,), weights, name)
    official.from_heads(module.out, weights, "o_proj")
    official.linear(module.gate_down, weights, "output_gate.0")
    official.to_heads((module.gate_up,), weights, "output_gate.1")
    official.norm(module.norm, weights, "norm")


def load_sglu(module: GatedMLP, weights: StateDict) -> None:
    """From `SGLU` or `GLU` of TransNormerLLM."""
    for layer, name in ((module.gate, "l1"), (module.up, "l2"), (module.down, "l3")):
        official.linear(layer, weights, name)


def load_transnormer(model: TransNormerLLM, arrays: Mapping[str, ArrayLike]) -> None:
    """From a whole TransNormerLLM: the published weights (`model.layers.…`), or those of nanoTransNormer.

    Args:
      model: of the same sizes and `lrpe_layers`.
      arrays: state dict by official names, such as `attnlab.interop.torch_files.read_state_dict` returns.

    Raises:
      StateDictError: if the two do not fit.
    """
    nano = any(name.startswith("transnormer.") for name in arrays)
    table, layer = ("transnormer.wte", "transnormer.h.{}") if nano else ("model.embed_tokens", "model.layers.{}")
    tied_or_constant = ("lm_head.weight", "slopes", "slope_rate", "_attn_mask", "_linear_attn_mask")
    with StateDict(arrays, into=model, ignore=tied_or_constant) as weights:
        official.param(model.embedding, weights, f"{table}.weight")
        for index, block in enumerate(model.blocks.blocks):
            part = weights.sub(layer.format(index))
            load_norm_linear_attention(block.mixer, part.sub("token_mixer"))
            load_sglu(block.mlp, part.sub("channel_mixer"))


def load_hedgehog_feature_map(module: HedgehogFeatureMap, weights: StateDict) -> None:
    """From `FeatureMap(FeatureMapMLP)` of LoLCATs, or from `HedgehogFeatureMap` of flash-linear-attention."""
    if "layer.weight" in weights:
        official.param(module.kernel, weights, "layer.weight", lambda weight: weight.T)
        official.param(module.bias, weights, "layer.bias")
        return
    official.param(module.kernel, weights, "mlp.layer")
    if module.bias is not None:
        official.param(module.bias, weights, "mlp.bias", lambda bias: bias[0, :, 0])
