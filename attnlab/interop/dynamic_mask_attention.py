"""Dynamic mask attention: Doge in transformers, and the reference of SmallDoges/flash-dmattn."""

from typing import Any

import jax

from attnlab.attention.sparse.dynamic_mask_attention import DynamicMaskAttention
from attnlab.contract import Given as NoArguments
from attnlab.interop.official import ConfigError, Given, Inputs, Official, Only, options
from attnlab.models.doge import Doge, DogeLayer
from attnlab.nn.dynamic_mask import dynamic_mask_attention


def _attend(mixer: DynamicMaskAttention, inputs: Inputs, given: Given) -> dict[str, jax.Array]:
    x = inputs["x"]
    heads, view = mixer.project(x, x, NoArguments()), mixer._view(x.shape[1:2], None, NoArguments())
    return {"y": mixer(x), "attn": mixer.core.attention(heads, view)}


def _layer(block: Any, inputs: Inputs, given: Given) -> jax.Array:
    return block(inputs["x"])


def _core(attend: Any, inputs: Inputs, given: Given) -> jax.Array:
    return attend(inputs["q"], inputs["k"], inputs["v"], inputs["bias"])


def _rope(given: Given) -> dict[str, Any]:
    """Theta, which stands alone or among the parameters of the rotary positions."""
    parameters = given.get("rope_parameters") or {}
    kind = parameters.get("rope_type", "default")
    if kind != "default":
        raise ConfigError(f"rope_parameters must be of type 'default' here, got {kind!r}")
    return {"rotary": parameters.get("rope_theta", given["rope_theta"])}


def _rope_base(given: Given) -> dict[str, Any]:
    return {"rotary_base": _rope(given)["rotary"]}


_SHARED = options(
    "head_dim",
    hidden_size="features",
    num_attention_heads="num_heads",
    num_key_value_heads="num_kv_heads",
    keep_window_size="window",
    rms_norm_eps="norm_eps",
    attention_dropout=None,
    hidden_dropout=None,
    initializer_range=None,
    max_position_embeddings=None,
    sliding_window=Only(None),
    attn_implementation=None,
    layer_idx=None,
    use_cache=None,
    cos=None,
    sin=None,
)
_ATTENTION = _SHARED | options("causal", attention_bias="use_bias", rope_theta=_rope, rope_parameters=None)
# The mixture of experts in place of the feed-forward is not part of this library.
_MLP = options(
    "mlp_bias", intermediate_size="mlp_features", hidden_act=Only("silu"), is_moe=Only(False), num_experts=None,
    num_experts_per_tok=None, norm_topk_prob=None, output_router_logits=None, router_aux_loss_coef=None,
)  # fmt: skip
_GIVEN: dict[str, Any] = {"rope_theta": 10000.0}
_NAMES: dict[Any, Any] = {
    "query": "q_proj",
    "key": "k_proj",
    "value": "v_proj",
    "out": "o_proj",
    "query_norm": "q_norm",
    "key_norm": "k_norm",
    "sharpness": "A",
    "importance": "dt_proj",
}


def _in_layer(ours: str, theirs: str) -> dict[Any, Any]:
    """The names of a layer that stands at `ours` here."""
    names = {f"{ours}mixer.{part}": f"{theirs}self_attn.{name}" for part, name in _NAMES.items()}
    names |= {f"{ours}mlp.{part}": f"{theirs}mlp.{part}_proj" for part in ("gate", "up", "down")}
    names |= {f"{ours}norm1": f"{theirs}input_layernorm", f"{ours}norm2": f"{theirs}post_attention_layernorm"}
    names |= {f"{ours}scale1": f"{theirs}input_residual"}
    return names | {f"{ours}scale2": f"{theirs}post_attention_residual"}


OFFICIAL = [
    Official("DogeAttention", DynamicMaskAttention, _ATTENTION, _NAMES, _attend, defaults=_GIVEN),
    Official("DogeDecoderLayer", DogeLayer, _ATTENTION | _MLP, _in_layer("", ""), _layer, defaults=_GIVEN),
    Official(
        "DogeForCausalLM",
        Doge,
        _SHARED
        | _MLP
        | options(
            "vocab_size",
            "attention_bias",
            num_hidden_layers="depth",
            rope_theta=_rope_base,
            rope_parameters=None,
            tie_word_embeddings="tie_embeddings",
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=None,
        ),
        _in_layer("blocks.blocks.*.", "model.layers.*.")
        | {"embedding": "model.embed_tokens.weight", "norm": "model.norm", "head": "lm_head"},
        defaults=_GIVEN,
        ignore=("rotary_emb.inv_freq", "lm_head.weight"),
    ),
    Official(
        "dynamic_mask_attention_python",
        dynamic_mask_attention,
        options("mask_type", "block_size", window_size="window", scaling="scale", is_causal="causal"),
        call=_core,
        # A block that is kept is kept whole there, with keys behind the query.
        always={"whole_blocks": True},
    ),
]
