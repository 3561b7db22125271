"""Sparse query attention: RxAI-dev/RxNN."""

from collections.abc import Mapping
from typing import Any

import jax

from attnlab.attention.dense.sqa import SparseQueryAttention
from attnlab.interop.official import Official, Only, options
from attnlab.nn.rotary import Rotary


def _call(module: SparseQueryAttention, inputs: dict[str, jax.Array], given: Mapping[str, Any]) -> jax.Array:
    # Over there a causal module does not look at its mask.
    mask = None if given.get("is_causal") else inputs.get("mask")
    return module(inputs["query"], inputs.get("memory"), mask=mask)


OFFICIAL = [
    Official(
        "SparseQueryAttention",
        SparseQueryAttention,
        options(
            "num_heads",
            embed_dim="features",
            num_query_groups="num_query_heads",
            num_groups="num_kv_heads",
            dropout="attention_dropout",
            # Pairs of neighbours are turned, and come out with all first members in front.
            rope=lambda given: {"rotary": Rotary(interleaved=True, regroup=True) if given["rope"] else None},
            rope_only_for_query=lambda given: {"rotate_keys": not given["rope_only_for_query"]},
            is_causal="causal",
            use_bias="qkv_bias",
            use_relative_embeddings=Only(False),
            max_seq_len=None,
            use_flash_attention=None,
        ),
        {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "out_proj"},
        _call,
    )
]
