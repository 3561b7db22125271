"""Multi-head latent attention: AMD-AIG-AIMA/AMD-Hybrid-Models, and DeepSeek-V3's in transformers."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from attnlab.attention.dense.mla import MultiHeadLatentAttention
from attnlab.interop.mla_upcycling import upcycle
from attnlab.interop.names import Interleaved
from attnlab.interop.official import Given, Inputs, Official, Only, options, same_as
from attnlab.nn.rotary import Rotary, Yarn, yarn_magnitude


def _rotary(given: Given) -> dict[str, Any]:
    """Rotary positions, and the scale of the scores, which YaRN changes too."""
    turning: dict[str, Any] = {"theta": given["rope_theta"], "interleaved": given["rope_interleave"]}
    size = given["qk_nope_head_dim"] + given["qk_rope_head_dim"]
    scaling = given.get("rope_scaling")
    if scaling is None:
        return {"rotary": Rotary(**turning)}
    kind = scaling.get("rope_type", scaling.get("type", "yarn"))
    if kind != "yarn":
        raise ValueError(f"rope_scaling must be of type 'yarn' here, got {kind!r}")
    factor, of_rotated, of_all = scaling["factor"], scaling.get("mscale"), scaling.get("mscale_all_dim")
    magnitude = None
    if of_rotated and of_all:
        magnitude = yarn_magnitude(factor, of_rotated) / yarn_magnitude(factor, of_all)
    yarn = Yarn(
        factor,
        scaling["original_max_position_embeddings"],
        beta_fast=scaling.get("beta_fast", 32),
        beta_slow=scaling.get("beta_slow", 1),
        magnitude=magnitude,
    )
    longer = yarn_magnitude(factor, of_all) if of_all else 1.0
    return {"rotary": Rotary(**turning, yarn=yarn), "scale": size**-0.5 * longer**2}


_OPTIONS = options(
    hidden_size="features",
    num_attention_heads="num_heads",
    q_lora_rank="query_rank",
    kv_lora_rank="rank",
    qk_rope_head_dim="rope_dim",
    qk_nope_head_dim="nope_dim",
    v_head_dim="value_dim",
    rms_norm_eps_lora="norm_eps",
    rms_norm_eps="norm_eps",
    rope_theta=_rotary,
    rope_interleave=None,
    rope_scaling=None,
    attention_bias="use_bias",
    use_lora_layer_norm="latent_norm",
    causal=Only(True),
    positions=Only("0..N-1"),
    attention_dropout="attention_dropout",
    max_position_embeddings=None,
    num_key_value_heads=same_as("num_key_value_heads", "num_attention_heads"),
    mla_num_key_value_heads=same_as("mla_num_key_value_heads", "num_attention_heads"),
    # They say how the weights were made, or how large the softmax attention was.
    llama_num_key_value_heads=None,
    q_energy_ratio=None,
    kv_energy_ratio=None,
)
_DEFAULTS = {"rope_theta": 10000.0, "rope_interleave": True, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32}


def _names(out: str) -> Any:
    def names(module: MultiHeadLatentAttention) -> Mapping[Any, Any]:
        return {
            "query_latent": "q_a_proj",
            "query_norm": "q_a_layernorm",
            "query": "q_proj" if module.query_latent is None else "q_b_proj",
            "latent": "kv_a_proj_with_mqa",
            "latent_norm": "kv_a_layernorm",
            ("core.key", "core.value"): Interleaved("kv_b_proj"),
            "out": out,
        }

    return names


def _energy(name: str, ours: str) -> Any:
    return lambda given: {ours: given[name] if given["use_dynamic_rank"] else None}


def _upcycle(make: Any, inputs: Inputs, given: Given) -> dict[str, jax.Array]:
    factors = make(*inputs.values())
    down, shared = jnp.split(factors.kv_a, [factors.ranks[1]])
    return {
        **factors._asdict(),
        "q_product": factors.q_b @ factors.q_a,
        "kv_product": factors.kv_b @ down,
        "k_rope_rows": shared,
        "ranks": jnp.asarray(factors.ranks),
    }


OFFICIAL = [
    Official(
        "DeepseekV3Attention",
        MultiHeadLatentAttention,
        _OPTIONS,
        _names("out_proj"),
        defaults=_DEFAULTS | {"use_lora_layer_norm": False},
        always={"causal": True},
    ),
    Official(
        "HFDeepseekV3Attention",
        MultiHeadLatentAttention,
        _OPTIONS,
        _names("o_proj"),
        defaults=_DEFAULTS,
        always={"causal": True},
    ),
    Official(
        "upcycle",
        upcycle,
        options(
            num_attention_heads="num_heads",
            llama_num_key_value_heads="num_kv_heads",
            kv_lora_rank="kv_rank",
            q_lora_rank="query_rank",
            qk_rope_head_dim="rope_dim",
            qk_nope_head_dim="nope_dim",
            q_energy_ratio=lambda given: {
                "query_energy": given["q_energy_ratio"] if given["use_dynamic_rank"] else None
            },
            kv_energy_ratio=lambda given: {
                "kv_energy": given["kv_energy_ratio"] if given["use_dynamic_rank"] else None
            },
            qkv_rank_divisor="divisor",
            hidden_size=None,
            head_dim=None,
            v_head_dim=same_as("v_head_dim", "head_dim"),
            use_dynamic_rank=None,
        ),
        call=_upcycle,
    ),
]
