"""Universal relative position attention: lsj2408/URPE."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from attnlab.attention.dense.urpe import SignedBuckets, UniversalAttention
from attnlab.interop.official import Given, Inputs, Official, options


def _tables(given: Given) -> dict[str, Any]:
    if given["unique"]:
        return {"bias_buckets": None, "factor_buckets": None}
    buckets, distance = given["num_buckets"], given["max_distance"]
    return {
        "bias_buckets": buckets,
        "factor_buckets": buckets,
        "bias_distance": distance,
        "factor_distance": distance,
    }


def _attend(module: UniversalAttention, inputs: Inputs, given: Mapping[str, Any]) -> dict[str, jax.Array]:
    x, padding = inputs["x"], inputs.get("key_padding_mask")
    y = module(x, mask=None if padding is None else ~jnp.asarray(padding, bool))
    at = jnp.arange(x.shape[1])
    table = module.core.offset_bias if module.core.offset_factor is None else module.core.offset_factor
    return {"y": y} if table is None else {"y": y, "bucket": table.buckets(at[None] - at[:, None])}


def bucket_rows(rows: Sequence[Mapping[str, Any]]) -> dict[str, jax.Array]:
    """Rows of tables by offset 1 - L to L - 1, for several of them."""
    named = {}
    for row in rows:
        buckets = SignedBuckets(row["num_buckets"], row["max_distance"], row["max_seq_len"])
        named[row["name"]] = buckets(jnp.arange(1 - buckets.max_length, buckets.max_length))
    return named


OFFICIAL = [
    Official(
        "MultiheadAttention",
        UniversalAttention,
        options(
            "num_heads",
            embed_dim="features",
            max_seq_len="max_length",
            rel_pos="bias",
            ur_attn="factor",
            unique=_tables,
            num_buckets=None,
            max_distance=None,
        ),
        {
            "query": "q_proj",
            "key": "k_proj",
            "value": "v_proj",
            "out": "out_proj",
            "core.offset_bias.table": "rp_bias.weight",
            "core.offset_factor.table": "ur_rp_bias.weight",
        },
        _attend,
    ),
    Official("bucket", bucket_rows, {"rows": "rows"}, call=lambda rows, inputs, given: rows()),
]
