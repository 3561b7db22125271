"""TransNormerLLM: OpenNLPLab/TransnormerLLM, Doraemonzzz/nanoTransNormer and OpenNLPLab/lightning-attention."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab.interop.names import Part, Squeezed
from attnlab.interop.official import Given, Inputs, Official, Only, masked, options
from attnlab.models.block import MLPS
from attnlab.nn.norms import RMSNorm
from attnlab.nn.rotary import initial_theta, lrpe


class _Lrpe(nnx.Module):
    def __init__(self, num_heads: int, embed_dim: int, *, offset: int = 0, rngs: nnx.Rngs):
        self.theta, self.offset = nnx.Param(initial_theta(num_heads, embed_dim), weight_decay=False), offset


def _lrpe(module: _Lrpe, inputs: Inputs, given: Given) -> dict[str, jax.Array]:
    positions = jnp.arange(inputs["x"].shape[1])[None] + module.offset
    theta = initial_theta(given["num_heads"], given["embed_dim"])
    return {"y": lrpe(inputs["x"], module.theta[...], positions), "theta_init": theta[:, None]}


def _loss(model: Any, inputs: Inputs, given: Given) -> dict[str, jax.Array]:
    logits = model(inputs["idx"])
    likelihood = jnp.take_along_axis(jax.nn.log_softmax(logits), inputs["targets"][..., None], axis=-1)
    return {"logits": logits, "loss": -likelihood.mean()}


def _layers(name: str) -> Any:
    return lambda given: {"lrpe_layers": [layer for layer, on in enumerate(given[name]) if on]}


def _glu(given: Given) -> dict[str, float]:
    return {"mlp_ratio": 1.0 if given["glu_dim"] == -1 else given["glu_dim"] / given["decoder_embed_dim"]}


_NANO = options(n_embd="features", n_head="num_heads", bias="use_bias")
_GLA_CONFIG = _NANO | options(layer_idx="layer", act=Only("silu"))
_GLA_CONFIG |= {"use_lrpe": lambda given: {"lrpe_layers": (given["layer_idx"],) if given["use_lrpe"] else ()}}
_GLA_NAMES = {("query", "key", "value", "gate"): "qkvu_proj", "out": "out_proj", "theta": Squeezed("lrpe.theta", 1)}
_CONSTANT = ("slope_rate", "slopes", "_attn_mask", "_linear_attn_mask", "lm_head.weight")  # the last is the embedding
_ATTENTION = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "o_proj"}
_ATTENTION |= {"gate_down": "output_gate.0", "gate_up": "output_gate.1"}
_MASKED = masked("attn_padding_mask")
_GLA = Official("NormLinearAttention", "tnl", _GLA_CONFIG, _GLA_NAMES, _MASKED, {"use_lrpe": False}, ignore=_CONSTANT)
_SGLU_NAMES = {"gate": "l1", "up": "l2", "down": "l3"}
_SGLU_CONFIG = options(n_embd="features", bias="use_bias", hidden="hidden_features")
_SGLU = Official("SGLU", MLPS["sglu"], _SGLU_CONFIG, _SGLU_NAMES)
_ALONE = options(embed_dim="features", bias="use_bias", layer_idx="layer")
_MODEL = _NANO | options(n_layer="depth", lrpe_layers=_layers("lrpe_layers"))
_PUBLISHED = options(decoder_embed_dim="features", decoder_layers="depth", decoder_attention_heads="num_heads")
_PUBLISHED |= options(hidden_dim="hidden", bias="use_bias", linear_act_fun=Only("silu"), init_std=None, glu_dim=_glu)
_PUBLISHED |= options(norm_type=Only("simplermsnorm"), linear_use_lrpe_list=_layers("linear_use_lrpe_list"))
_PUBLISHED |= {"no_scale_embedding": lambda given: {"embed_scale": 1.0 if given["no_scale_embedding"] else None}}


def _names(table: str, layers: str) -> dict[str, Any]:
    mixer, mlp = Part(f"{layers}.*.token_mixer", _GLA), Part(f"{layers}.*.channel_mixer", _SGLU)
    return {"embedding": f"{table}.weight", "blocks.blocks.*.mixer": mixer, "blocks.blocks.*.mlp": mlp}


_NANO_NAMES = _names("transnormer.wte", "transnormer.h")
_PUBLISHED_NAMES = _names("model.embed_tokens", "model.layers")
_NET = "tnl.transnormer"

OFFICIAL = [
    Official("SimpleRMSNormTorch", functools.partial(RMSNorm, use_scale=False), {"dim": "features"}),
    Official("Lrpe", _Lrpe, names={"theta": Squeezed("theta", 1)}, call=_lrpe),
    _SGLU,
    _GLA,
    Official("TnlAttention", "tnl.attention", _ALONE, _ATTENTION, ignore=_CONSTANT),
    Official("TransNormer", _NET, _MODEL, _NANO_NAMES, _loss, always={"embed_scale": 1.0}, ignore=_CONSTANT),
    Official("TransnormerForCausalLM", _NET, _PUBLISHED, _PUBLISHED_NAMES, ignore=_CONSTANT),
]
