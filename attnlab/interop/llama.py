"""LLaMA, in the layout of `transformers` (LlamaForCausalLM, and Mistral's and Qwen2's, which are alike) and in Meta's.

Meta's queries and keys have the two channels that rotary positions turn beside each other, those of `transformers` have
them half a head apart: a model for Meta's files is built with `interleaved=True`, which "Transformer" says here.
"""

from typing import Any

from attnlab.interop.official import ConfigError, Given, Official, Only, options
from attnlab.models.llama import Llama

_BLOCK = "blocks.blocks.*"


def _names(layer: str, parts: dict[str, str], **others: str) -> dict[Any, Any]:
    return {f"{_BLOCK}.{ours}": f"{layer}.{theirs}" for ours, theirs in parts.items()} | others


_PARTS = {"norm1": "input_layernorm", "norm2": "post_attention_layernorm"}
_PARTS |= {f"mixer.{ours}": f"self_attn.{ours[0]}_proj" for ours in ("query", "key", "value", "out")}
_PARTS |= {f"mlp.{part}": f"mlp.{part}_proj" for part in ("gate", "up", "down")}
_NAMES = _names("model.layers.*", _PARTS, embedding="model.embed_tokens.weight", norm="model.norm", head="lm_head")
_META_PARTS = {"norm1": "attention_norm", "norm2": "ffn_norm"}
_META_PARTS |= {f"mixer.{ours}": f"attention.w{ours[0]}" for ours in ("query", "key", "value", "out")}
_META_PARTS |= {"mlp.gate": "feed_forward.w1", "mlp.up": "feed_forward.w3", "mlp.down": "feed_forward.w2"}
_META_NAMES = _names("layers.*", _META_PARTS, embedding="tok_embeddings.weight", norm="norm", head="output")


def _rope(given: Given) -> dict[str, Any]:
    scaling = given["rope_scaling"]
    if scaling is not None and scaling.get("rope_type", scaling.get("type")) != "default":
        raise ConfigError(f"rope_scaling must be None or of type 'default' here, got {scaling!r}")
    return {}


_CONFIG = options(
    "vocab_size",
    "head_dim",
    "mlp_bias",
    hidden_size="features",
    intermediate_size="mlp_features",
    num_hidden_layers="depth",
    num_attention_heads="num_heads",
    num_key_value_heads="num_kv_heads",
    rms_norm_eps="norm_eps",
    rope_theta="rotary_base",
    rope_scaling=_rope,
    attention_bias=lambda given: {"qkv_bias": given["attention_bias"], "out_bias": given["attention_bias"]},
    tie_word_embeddings="tie_embeddings",
    hidden_act=Only("silu"),
    sliding_window=Only(None),
    use_sliding_window=Only(False),
    max_window_layers=None,
    max_position_embeddings=None,
    attention_dropout=None,
    initializer_range=None,
    pretraining_tp=Only(1),
    use_cache=None,
)


def _meta_hidden(given: Given) -> dict[str, Any]:
    hidden, multiple = int(8 * given["dim"] / 3), given["multiple_of"]
    if given["ffn_dim_multiplier"] is not None:
        hidden = int(given["ffn_dim_multiplier"] * hidden)
    return {"mlp_features": multiple * -(-hidden // multiple)}


_META_CONFIG = options(
    "vocab_size",
    dim="features",
    n_layers="depth",
    n_heads="num_heads",
    n_kv_heads="num_kv_heads",
    multiple_of=_meta_hidden,
    ffn_dim_multiplier=None,
    norm_eps="norm_eps",
    rope_theta="rotary_base",
    max_seq_len=None,
    max_batch_size=None,
)
_META_GIVEN = {"multiple_of": 256, "ffn_dim_multiplier": None, "norm_eps": 1e-5}

# Frequencies that old files hold, and the map to logits of a model where it is the embedding.
_CONSTANT = ("rotary_emb.inv_freq", "lm_head.weight")

OFFICIAL = [
    Official("LlamaForCausalLM", Llama, _CONFIG, _NAMES, ignore=_CONSTANT),
    Official("MistralForCausalLM", Llama, _CONFIG, _NAMES, ignore=_CONSTANT),
    Official("Qwen2ForCausalLM", Llama, _CONFIG, _NAMES, always={"qkv_bias": True}, ignore=_CONSTANT),
    Official(
        "Transformer",
        Llama,
        _META_CONFIG,
        _META_NAMES,
        always={"interleaved": True},
        defaults=_META_GIVEN,
        ignore=("rope.freqs",),
    ),
]
