"""Sparsifiner: lim142857/Sparsifiner, whose options beside the sizes are a tree of configuration, `cfg`."""

from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from attnlab.attention.sparse.sparsifiner import SparseAttention, SparsifinerAttention
from attnlab.interop.backbones import FUSED
from attnlab.interop.names import Part, Squeezed
from attnlab.interop.official import ConfigError, Given, Inputs, Official, Only, options
from attnlab.models.sparsifiner import Sparsifiner


def _configured(given: Given) -> dict[str, Any]:
    spar: Mapping[str, Any] = given["cfg"]["SPAR"]
    coefficients, scores = spar["BASIS_COEF"], spar["ATTN_SCORE"]
    if not scores["USE_TOPK"] and scores["THRESHOLD"] <= 0:
        raise ConfigError("ATTN_SCORE must have USE_TOPK, or a THRESHOLD above 0")
    return {
        "basis_threshold": spar["BASIS_THRESHOLD"],
        "top_coefficients": coefficients["TOPK"] if coefficients["USE_TOPK"] else None,
        "coefficient_threshold": coefficients["THRESHOLD"],
        "score_threshold": None if scores["USE_TOPK"] else scores["THRESHOLD"],
        "prune_rows": spar.get("PRUNE_ATTN_MATRIX_ROW", False),
        "reconstruct": given["cfg"]["LOSS"]["USE_ATTN_RECON"],
    }


def _pruned(given: Given) -> dict[str, Any]:
    layers = given.get("token_pruning_loc_indicator") or []
    return {"prune_layers": tuple(layer for layer, prunes in enumerate(layers) if prunes)}


def _maps(made: SparseAttention) -> dict[str, jax.Array]:
    found = {"approx_attn": made.approximation, "attn_mask": made.connectivity, "masked_attn": made.weights}
    found |= {"unmasked_attn": made.full}
    return found if made.alive is None else found | {"token_mask": made.alive, "new_token_mask": made.alive}


def _attend(module: SparsifinerAttention, inputs: Inputs, given: Given) -> dict[str, jax.Array]:
    masks = [array for name, array in inputs.items() if name != "x"]
    alive = masks[0].astype(bool) if masks else None
    # Over there the first example's tokens say how many columns the rows of all have.
    budget = None if alive is None else alive[0].sum()
    made = module(inputs["x"], alive, budget=budget, deterministic=not given.get("training", False))
    return {"y": made.tokens} | _maps(made)


def _through(model: Sparsifiner, inputs: Inputs, given: Given) -> dict[str, jax.Array]:
    made = model.with_layers(inputs["x"], deterministic=not given.get("training", False))
    found = {"logits": made.logits, "features": made.tokens}
    for layer, one in enumerate(made.layers):
        found |= {f"{name}_{layer}": array for name, array in _maps(one).items()}
    return found | {name: array for name, array in _maps(made.layers[-1]).items() if "token" in name}


def _net_names(model: nnx.Module) -> dict[Any, Any]:
    names: dict[Any, Any] = {"stem.conv": "patch_embed.proj", "stage.0.blocks": "blocks"}
    names |= {"stage.0.prefix.tokens": Squeezed("cls_token", 0), "stage.0.position.table": Squeezed("pos_embed", 0)}
    return names | {"stage.0.blocks.*.mixer": Part("blocks.*.attn", _NAMES)}


_NAMES = FUSED | {"predictor": Part("mask_predictor", {"query": "proj_c_q", "key": "proj_c_k", "down": "proj_n",
                                                       "up": "proj_back_n"})}  # fmt: skip
_SHARED = ("mask_predictor.proj_back_n",)  # the same array as proj_n, where it is shared
_SAME = options("num_heads", "qkv_bias", "reduce_n_factor", "reduce_c_factor", "share_inout_proj", cfg=_configured)
_SAME |= options(training=None)
_ATTENTION = _SAME | options("num_tokens", "token_keep_rate", dim="features", attn_keep_rate="keep_rate")
_ATTENTION |= options(token_pruning_this_layer="prune_tokens", qk_scale="scale")
_NET = _SAME | options("depth", "patch_size", "num_classes", "mlp_ratio", img_size="image_size", in_chans="channels")
_NET |= options(embed_dim="features", attn_keep_rate_list="keep_rate", token_keep_rate_list="token_keep_rates")
_NET |= options(token_pruning_loc_indicator=_pruned, qk_scale="scale", representation_size=Only(None, 0))
_NET |= options(hybrid_backbone=Only(None), norm_layer=None, distill=None)
_ALONE = {"num_tokens": 197, "num_heads": 8, "qkv_bias": False}
_GIVEN = {"embed_dim": 768, "num_heads": 12, "reduce_n_factor": 8, "qkv_bias": True}

OFFICIAL = [
    Official("Attention", SparsifinerAttention, _ATTENTION, _NAMES, _attend, _ALONE, ignore=_SHARED),
    Official("Sparsifiner", Sparsifiner, _NET, _net_names, _through, _GIVEN, ignore=_SHARED),
]
