"""thu-nics/MoA, whose functions have no weights: rules, what they drop, and sizes of caches."""

from typing import Any

import jax
import jax.numpy as jnp

from attnlab.analysis.moa_sparse import attention_influence, rule_loss, search_space
from attnlab.interop.official import Given, Inputs, Official, Only, options
from attnlab.interventions.moa_sparse import cache_sizes, elastic_layout, elastic_mask


def _layout(layout: Any, inputs: Inputs, given: Given) -> dict[str, jax.Array]:
    rules = inputs["alpha"], inputs["beta"]
    size = given["block_size"]
    return {"layout": layout(*rules), "mask": elastic_mask(*rules, given["N"], block_size=size)}


def _loss(loss: Any, inputs: Inputs, given: Given) -> dict[str, jax.Array]:
    return loss(inputs["importance"], inputs["alpha"], inputs["beta"])._asdict()


def _space(space: Any, inputs: Inputs, given: Given) -> dict[str, jax.Array]:
    alpha, beta = space(inputs["alpha_grid"], inputs["beta_grid"])
    return {"alpha": jnp.asarray(alpha), "beta": jnp.asarray(beta)}


def _sizes(sizes: Any, inputs: Inputs, given: Given) -> dict[str, jax.Array]:
    found = sizes(inputs["alpha"], inputs["beta"])
    return {"cache_size": jnp.asarray(found.size), "static_size": jnp.asarray(found.static)}


def _influence(influence: Any, inputs: Inputs, given: Given) -> dict[str, jax.Array]:
    return {"effect": influence(*inputs.values())}


_DEVICE = options(device=None, hardware=None, is_causal=Only(True))

OFFICIAL = [
    Official(
        "ElasticBlockSparse",
        elastic_layout,
        _DEVICE | options("block_size", N="num_tokens", aggregating_block_size=None, use_norm_z_score=None),
        call=_layout,
        defaults={"block_size": 64},
    ),
    Official(
        "ElasticBlockSparse",
        rule_loss,
        _DEVICE
        | options(
            "block_size",
            N="num_tokens",
            aggregating_block_size="importance_block",
            use_norm_z_score="normalize",
            accuracy_loss_ratio="loss_ratio",
        ),
        call=_loss,
        when="use_norm_z_score",
    ),
    Official(
        "ElasticBlockSparse",
        search_space,
        _DEVICE
        | options(
            "max_profile_length",
            "max_token_length",
            "min_token_length",
            block_size=None,
            aggregating_block_size=None,
            use_norm_z_score=None,
            accuracy_loss_ratio=None,
        ),
        call=_space,
        when="max_token_length",
    ),
    Official(
        "LlamaModel_get_attention_matrix_log",
        attention_influence,
        options("take_abs", aggregating_block_size="block_size", max_length=None),
        call=_influence,
    ),
    Official(
        "moa_config_to_cache_config",
        cache_sizes,
        options(
            "sink_size",
            seq_len="prompt_length",
            max_new_token="max_new_tokens",
            minimum_cache_size="minimum_size",
            split_size="page_size",
        ),
        call=_sizes,
    ),
]
