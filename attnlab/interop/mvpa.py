"""Multi-variate parallel attention and MVPFormer: IBM/multi-variate-parallel-transformer."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab.attention.dense.mvpa import MultiVariateParallelAttention, channel_shift, time_shift
from attnlab.interop.names import Mapped
from attnlab.interop.official import Given, Inputs, Official, Only, options
from attnlab.models.mvpformer import MVPFormer, MVPFormerBlock
from attnlab.nn.lora import Adapted, with_adapter

ADAPTER = "lora"
IGNORE = ("ln_2.weight", "time_bias", "masked_bias")
"""A norm that is not used, and buffers."""


def _shifted(shift: Any, inputs: Inputs, given: Given) -> dict[str, jax.Array]:
    return {"time": time_shift(inputs["time_raw"]), "chan": channel_shift(inputs["chan_raw"])}


def _attended(mixer: MultiVariateParallelAttention, inputs: Inputs, given: Given) -> dict[str, jax.Array]:
    return {"y": mixer(*inputs.values()), "attn": mixer.with_weights(*inputs.values())[1]}


def _with_lora(model: Any, rank: int, alpha: float, rngs: nnx.Rngs) -> Any:
    return with_adapter(model, ADAPTER, rank=rank, alpha=alpha, where=("query", "value"), rngs=rngs)


def adapted_attention(*, rank: int, alpha: float, rngs: nnx.Rngs, **arguments: Any) -> MultiVariateParallelAttention:
    """Attention with low-rank adapters beside the maps to queries and values."""
    return _with_lora(MultiVariateParallelAttention(**arguments, rngs=rngs), rank, alpha, rngs)


def adapted_block(*, rank: int, alpha: float, rngs: nnx.Rngs, **arguments: Any) -> MVPFormerBlock:
    """A block with such attention."""
    return _with_lora(MVPFormerBlock(**arguments, rngs=rngs), rank, alpha, rngs)


def adapted_model(*, rank: int, alpha: float, rngs: nnx.Rngs, **arguments: Any) -> MVPFormer:
    """A model of such blocks."""
    return _with_lora(MVPFormer(**arguments, rngs=rngs), rank, alpha, rngs)


def _flat(rows: jax.Array) -> jax.Array:
    return rows.reshape(-1)


def _up(rows: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return rows.T.reshape(shape)


def _rows(up: jax.Array) -> jax.Array:
    return up.reshape(up.shape[0], -1).T


def _names(mixer: MultiVariateParallelAttention, base: str = "", there: str = "") -> dict[Any, Any]:
    """What stands where in one attention, below `base` here and `there` in the state dict."""
    shape = mixer.biases.shape
    lora = isinstance(mixer.query, Adapted)
    names: dict[Any, Any] = {
        f"{base}query": f"{there}q_attn",
        (f"{base}key", f"{base}value.base" if lora else f"{base}value"): f"{there}c_attn",
        f"{base}time_key": f"{there}position_net",
        f"{base}channel_key": f"{there}channel_net",
        f"{base}out": f"{there}c_proj",
        f"{base}biases": Mapped(f"{there}attn_bias", lambda a: a.reshape(shape), _flat),
    }
    if lora:
        del names[f"{base}query"]
        names[f"{base}query.base"] = f"{there}q_attn"
        for ours, theirs in (("query", "q_attn"), ("value", "c_attn")):
            path, up = f"{base}{ours}.adapters.{ADAPTER}", getattr(mixer, ours).adapters[ADAPTER].up.shape
            names[f"{path}.down"] = Mapped(f"{there}{theirs}.lora_A", jnp.transpose, jnp.transpose)
            names[f"{path}.up"] = Mapped(f"{there}{theirs}.lora_B", functools.partial(_up, shape=up), _rows)
    return names


_MLP = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}


def _block_names(block: MVPFormerBlock, base: str = "", there: str = "") -> dict[Any, Any]:
    names = {f"{base}mlp.{ours}": f"{there}mlp.{theirs}" for ours, theirs in _MLP.items()}
    return {f"{base}norm": f"{there}ln_1"} | names | _names(block.attention, f"{base}attention.", f"{there}attn.")


def _model_names(model: MVPFormer) -> dict[Any, Any]:
    names: dict[Any, Any] = {
        "norm": "ln_f",
        "time_table": "positional_embedding.weight",
        "channel_table": "channel_embedding.weight",
    }
    for i, block in enumerate(model.blocks):
        names |= _block_names(block, f"blocks.{i}.", f"h.{i}.")
    return names


def _lora(given: Given) -> Mapping[str, Any]:
    return {"rank": given["lora_rank"], "alpha": given["lora_alpha"]} if given["lora"] else {}


_DEFAULTS = {"lora": False, "lora_rank": 8, "lora_alpha": 16, "causal": True}
_ATTENTION = options(
    hidden_size="features",
    n_embd="features",
    num_attention_heads="num_heads",
    n_head="num_heads",
    n_head_kv="num_kv_heads",
    global_att="content",
    scale_attn_weights="scaled",
    scale_attn_by_inverse_layer_idx="scale_by_layer",
    layer_idx=lambda given: {} if given["layer_idx"] is None else {"layer": given["layer_idx"]},
    causal=Only(True),
    is_cross_attention=Only(False),
    add_cross_attention=Only(False),
    reorder_and_upcast_attn=None,  # not read
    attn_pdrop="attention_dropout",
    resid_pdrop="projection_dropout",
    lora=_lora,
    **dict.fromkeys(("lora_rank", "lora_alpha", "lora_dropout", "lora_merge", "initializer_range", "use_cache")),
)
_UNUSED = dict.fromkeys(
    ("max_position_embeddings", "n_positions", "max_channel_embeddings", "n_channels", "num_hidden_layers", "n_layer")
)
_BLOCK = _ATTENTION | options(
    n_inner="hidden_features",
    intermediate_size="hidden_features",
    layer_norm_epsilon="eps",
    activation_function=Only("silu"),
    hidden_act=Only("silu"),
    mlp_bias=Only(False),
)
_MODEL = _BLOCK | options(
    max_position_embeddings="max_times",
    n_positions="max_times",
    max_channel_embeddings="max_channels",
    n_channels="max_channels",
    num_hidden_layers="depth",
    n_layer="depth",
    initializer_range="init_std",
    embd_pdrop="dropout",
    gradient_checkpointing=None,
)
_ALONE = _ATTENTION | _UNUSED | options(**dict.fromkeys(("n_inner", "layer_norm_epsilon", "activation_function")))


def _adapted(given: Given) -> bool:
    return bool(given["lora"])


def _of(symbol: str, plain: Any, adapted: Any, config: Any, names: Any, **more: Any) -> list[Official]:
    """A class without adapters, and with them."""
    both: dict[str, Any] = {"config": config, "names": names, "defaults": _DEFAULTS, "ignore": IGNORE, **more}
    return [Official(symbol, plain, **both), Official(symbol, adapted, **both, when=_adapted)]


_ATTENTION_CLASS = "MVPFormerGQAAttention"
OFFICIAL = [
    Official(_ATTENTION_CLASS, time_shift, options(T=None, C=None), call=_shifted, when="T"),
    *_of(_ATTENTION_CLASS, MultiVariateParallelAttention, adapted_attention, _ALONE, _names, call=_attended),
    *_of("MVPFormerBlock", MVPFormerBlock, adapted_block, _BLOCK | _UNUSED, _block_names),
    *_of("MVPFormerModel", MVPFormer, adapted_model, _MODEL, _model_names),
]
