"""Mixture-of-head attention: SkyworkAI/MoH."""

from collections.abc import Mapping
from typing import Any

import jax

from attnlab.attention.dense.moh import CosineMixtureOfHeadAttention, MixtureOfHeadAttention, NormRoutedAttention
from attnlab.interop.names import Squeezed
from attnlab.interop.official import Inputs, Official, options


def _trained(module: Any, x: jax.Array) -> dict[str, jax.Array]:
    """The result and, if heads are routed, the load's loss, of a call in training."""
    y = module(x, deterministic=False)
    routed = module.router.routed
    return {"y": y.reshape(x.shape)} | ({} if routed is None else {"l_aux": routed.balance[...]})


def _tokens(module: MixtureOfHeadAttention, inputs: Inputs, given: Mapping[str, Any]) -> dict[str, jax.Array]:
    return _trained(module, inputs["x"])


def _image(module: CosineMixtureOfHeadAttention, inputs: Inputs, given: Mapping[str, Any]) -> dict[str, jax.Array]:
    x = inputs["x"]
    outputs = _trained(module, x.reshape(x.shape[0], given["H"], given["W"], x.shape[-1]))
    return outputs | {"y": outputs["y"].reshape(x.shape)}


_SIZES = options("num_heads", "qkv_bias", dim="features", shared_head="shared_heads", routed_head="active_heads")
_NAMES = {
    ("query", "key", "value"): "qkv",
    "query_norm": "q_norm",
    "key_norm": "k_norm",
    "out": "proj",
    "router.routed.logits": "wg",
    "router.balance": "wg_0",
    "router.shared": "wg_1",
}

OFFICIAL = [
    Official(
        "MoHAttention",
        MixtureOfHeadAttention,
        _SIZES | options("qk_norm", "head_dim"),
        _NAMES,
        _tokens,
        defaults={"qkv_bias": False, "shared_head": 0},
        always={"balance_factor": 1.0},
    ),
    Official(
        "Attention",
        CosineMixtureOfHeadAttention,
        _SIZES | options(input_resolution="grid", H=None, W=None),
        {name: official for name, official in _NAMES.items() if not str(name).endswith("_norm")}
        | {
            "core.temperature": Squeezed("temperature", 1, 2),
            "core.query_vectors": Squeezed("query_embedding", 1),
            "core.bias.network.fc1": "cpb_fc1",
            "core.bias.network.fc2": "cpb_fc2",
        },
        _image,
        defaults={"shared_head": 0},
        always={"balance_factor": 1.0},
        ignore=("seq_length_scale",),
    ),
    Official(
        "LlamaAttention",
        NormRoutedAttention,
        options(
            "causal",
            hidden_size="features",
            num_attention_heads="num_heads",
            num_key_value_heads="num_kv_heads",
            rope_theta="rotary",
            shared_head="shared_heads",
            routed_head="active_heads",
        ),
        {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "o_proj"},
    ),
]
