"""TransNormerLLM: OpenNLPLab/TransnormerLLM, Doraemonzzz/nanoTransNormer and OpenNLPLab/lightning-attention."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab.attention.linear.tnl import NormLinearAttention, TnlAttention
from attnlab.interop.names import Part, Squeezed
from attnlab.interop.official import Official, Only, options
from attnlab.models.block import MLPS
from attnlab.models.tnl import TransNormerLLM
from attnlab.nn.norms import RMSNorm
from attnlab.nn.positions import initial_theta, lrpe

Inputs = dict[str, jax.Array]
Given = Mapping[str, Any]


class _Lrpe(nnx.Module):
    def __init__(self, num_heads: int, head_dim: int, *, offset: int = 0, rngs: nnx.Rngs):
        self.theta, self.offset = nnx.Param(initial_theta(num_heads, head_dim)), offset

    def __call__(self, x: jax.Array) -> jax.Array:
        return lrpe(x, self.theta[...], jnp.arange(x.shape[1])[None] + self.offset)


def _lrpe(module: _Lrpe, inputs: Inputs, given: Given) -> dict[str, jax.Array]:
    theta = initial_theta(given["num_heads"], given["embed_dim"])
    return {"y": module(inputs["x"]), "theta_init": theta[:, None]}


def _masked(module: NormLinearAttention, inputs: Inputs, given: Given) -> jax.Array:
    mask = inputs.get("attn_padding_mask")
    return module(inputs["x"], mask=None if mask is None else mask > 0)


def _transnormer(module: TransNormerLLM, inputs: Inputs, given: Given) -> dict[str, jax.Array]:
    logits = module(inputs["idx"])
    likelihood = jnp.take_along_axis(jax.nn.log_softmax(logits), inputs["targets"][..., None], axis=-1)
    return {"logits": logits, "loss": -likelihood.mean()}


def _lrpe_layers(name: str) -> Any:
    return lambda given: {"lrpe_layers": [layer for layer, on in enumerate(given[name]) if on]}


_CONSTANT = ("slope_rate", "slopes", "_attn_mask", "_linear_attn_mask")  # follow from heads, layer and length
_GLA = Official(
    "NormLinearAttention",
    NormLinearAttention,
    options(
        n_embd="features",
        n_head="num_heads",
        bias="use_bias",
        layer_idx="layer",
        num_layers="num_layers",
        act=Only("silu"),
        use_lrpe=lambda given: {"lrpe_layers": (given["layer_idx"],) if given["use_lrpe"] else ()},
    ),
    {("query", "key", "value", "gate"): "qkvu_proj", "out": "out_proj", "theta": Squeezed("lrpe.theta", 1)},
    _masked,
    defaults={"use_lrpe": False},
    ignore=_CONSTANT,
)
_SGLU = Official(
    "SGLU",
    MLPS["sglu"],
    options(n_embd="features", hidden="hidden_features", bias="use_bias"),
    {"gate": "l1", "up": "l2", "down": "l3"},
)


def _model(table: str, layers: str) -> dict[str, Any]:
    return {
        "embedding": f"{table}.weight",
        "blocks.blocks.*.mixer": Part(f"{layers}.*.token_mixer", _GLA),
        "blocks.blocks.*.mlp": Part(f"{layers}.*.channel_mixer", _SGLU),
    }


OFFICIAL = [
    Official("SimpleRMSNormTorch", functools.partial(RMSNorm, use_scale=False), options(dim="features", eps="eps")),
    Official(
        "Lrpe",
        _Lrpe,
        options("num_heads", "offset", embed_dim="head_dim"),
        {"theta": Squeezed("theta", 1)},
        _lrpe,
    ),
    _SGLU,
    _GLA,
    Official(
        "TnlAttention",
        TnlAttention,
        options("num_heads", "num_layers", embed_dim="features", bias="use_bias", layer_idx="layer"),
        {
            "query": "q_proj",
            "key": "k_proj",
            "value": "v_proj",
            "out": "o_proj",
            "gate_down": "output_gate.0",
            "gate_up": "output_gate.1",
        },
        ignore=_CONSTANT,
    ),
    Official(
        "TransNormer",
        TransNormerLLM,
        options(
            "vocab_size",
            n_embd="features",
            n_layer="depth",
            n_head="num_heads",
            bias="use_bias",
            lrpe_layers=_lrpe_layers("lrpe_layers"),
        ),
        _model("transnormer.wte", "transnormer.h"),
        _transnormer,
        always={"embed_scale": 1.0},
        ignore=("lm_head.weight", *_CONSTANT),  # the first is the embedding itself
    ),
    Official(
        "TransnormerForCausalLM",
        TransNormerLLM,
        options(
            "vocab_size",
            decoder_embed_dim="features",
            decoder_layers="depth",
            decoder_attention_heads="num_heads",
            hidden_dim="hidden",
            glu_dim=lambda given: {
                "mlp_ratio": 1.0 if given["glu_dim"] == -1 else given["glu_dim"] / given["decoder_embed_dim"]
            },
            bias="use_bias",
            linear_act_fun=Only("silu"),
            norm_type=Only("simplermsnorm"),
            linear_use_lrpe_list=_lrpe_layers("linear_use_lrpe_list"),
            no_scale_embedding=lambda given: {"embed_scale": 1.0 if given["no_scale_embedding"] else None},
            init_std=None,
        ),
        _model("model.embed_tokens", "model.layers"),
        ignore=("lm_head.weight", *_CONSTANT),
    ),
]
