"""Raptor: KempnerInstitute/raptor, whose attention is torch.nn.MultiheadAttention."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnlab.analysis.depth_phases import max_cut, recursive_max_cut
from attnlab.interop.names import Named, Part
from attnlab.interop.official import Given, Inputs, Official, Only, options
from attnlab.models.raptor import Raptor, RecurrentBlock
from attnlab.nn.mlp import GatedMLP
from attnlab.objectives.layer_imitation import autoregressive_loss, teacher_forced_loss, token_loss


def _block_names(block: RecurrentBlock) -> dict[Any, Any]:
    if isinstance(block.mlp, GatedMLP):
        mlp: dict[Any, Any] = {("mlp.gate", "mlp.up"): "mlp.0", "mlp.down": "mlp.2"}
    else:
        mlp = {"mlp.fc1": "mlp.0", "mlp.fc2": "mlp.2"}
    qkv = Named("attn", weight="in_proj_weight", bias="in_proj_bias")
    names = mlp | {("mixer.query", "mixer.key", "mixer.value"): qkv, "mixer.out": "attn.out_proj"}
    names |= {"scale1": "ls1.gamma", "scale2": "ls2.gamma", "time_in": "t_proj.0", "time_out": "t_proj.2"}
    return names


def _names(raptor: Raptor) -> dict[Any, Any]:
    return {"blocks.*": Part("blocks.*", _block_names(raptor.blocks[0]))}


def _kind(given: Given) -> str:
    if given["weighted"]:
        return "weighted"
    return "_".join(name for name in ("mse", "cosine") if given[name])


def _loss_options(given: Given) -> dict[str, Any]:
    return {"kind": _kind(given), "weights": tuple(given[f"{part}_weight"] for part in ("cls", "reg", "patch"))}


def _loss(loss: Any, inputs: Inputs, given: Given) -> dict[str, jax.Array]:
    """The mean over the batch; the cosine alone has the wrong sign there."""
    sign = -1 if _kind(given) == "cosine" else 1
    return {"loss": sign * loss(*inputs.values()).mean()[None]}


def _passes(block: RecurrentBlock, inputs: Inputs, given: Given) -> dict[str, jax.Array]:
    passes = {"autoregressive_loss": autoregressive_loss, "teacher_forced_loss": teacher_forced_loss}
    start, sequence = given.get("start_layer", 0), inputs["sequence"]
    return {name: loss(block, sequence, start=start).mean()[None] for name, loss in passes.items()}


def _cut(cut: Any, inputs: Inputs, given: Given) -> dict[str, Any]:
    weights = np.asarray(inputs["W"], np.float64)
    labels = cut(weights, given["eps_fraction"] * weights.sum() / 2, min_size=given["min_size"])
    side, value = max_cut(weights)
    return {"labels": jnp.asarray(labels), "side": jnp.asarray(side), "value": jnp.asarray(value, jnp.float32)}


_SIZES = options("num_heads", "mlp_ratio", "swiglu", dim="features", init_values="layer_scale", t_scale="time_scale")
_PASSES = _SIZES | options(start_layer=None, sigma=Only(0.0), loss=Only("mse"))
_WEIGHTS = {"mse": True, "cosine": False, "weighted": False, "cls_weight": 0.34, "reg_weight": 0.33}
_WEIGHTS |= {"patch_weight": 0.33}
_LOSS = {"mse": _loss_options} | dict.fromkeys(("cosine", "weighted", "cls_weight", "reg_weight", "patch_weight"))
_CUT = options(eps_fraction=None, min_size=None, solver=Only("bruteforce"))

OFFICIAL = [
    Official("Block", RecurrentBlock, _SIZES, _block_names),
    Official("Raptor", Raptor, _SIZES | options("thresholds", "layers"), _names),
    Official("get_loss_func", token_loss, _LOSS, call=_loss, defaults=_WEIGHTS),
    Official("autoreg_pass/distill_pass", RecurrentBlock, _PASSES, _block_names, _passes),
    Official("recursive_max_cut", recursive_max_cut, _CUT, call=_cut, defaults={"min_size": 2}),
]
