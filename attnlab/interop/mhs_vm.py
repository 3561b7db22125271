"""MHS-VM: PixDeep/MHS-VM, models/vmunet/mhsm.py."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from attnlab.interop.names import Name, Part
from attnlab.interop.official import ConfigError, Given, Inputs, Official, options
from attnlab.mixers.mhs_vm import GatedMultiHeadScan, MultiHeadScan, ScanHead, scan_route_attention
from attnlab.nn.scans import inverse_order, scan_order

_PATTERNS = {"C": "snake", "X": "zigzag", "S": "spiral", "Z": "raster"}
_ROUTES: dict[str, tuple[str, dict[str, Any]]] = {
    "c_h": ("snake", {}),
    "c_v": ("snake", {"transpose": True}),
    "x_0": ("zigzag", {}),
    "x_1": ("zigzag", {"mirror": 1}),
    "s_0": ("spiral", {}),
    "s_1": ("spiral", {"mirror": 0}),
    "z_h": ("raster", {}),
    "z_v": ("raster", {"transpose": True}),
}
# The engine stands twice in a state dict, under two names; so does the first projection.
_IGNORED = ("*scanning.*", "*x_ssproj.weight")


def _routes() -> dict[str, tuple[str, dict[str, Any]]]:
    return _ROUTES


def _orders(routes: Any, inputs: Inputs, given: Given) -> dict[str, jax.Array]:
    found = {}
    for height, width in given["sizes"]:
        for name, (order, turned) in routes().items():
            places = scan_order(order, (height, width), **turned)
            found[f"{name}_{height}x{width}_order"] = jnp.asarray(places)
            found[f"{name}_{height}x{width}_inverse"] = jnp.asarray(inverse_order(places))
    return found


def engine(base: str) -> dict[str, Any]:
    """Names of a `SelectiveScan` in the layout of VMamba: routes in front, or joined with the channels."""
    return {
        "inputs": f"{base}x_proj_weight",
        "step": f"{base}dt_projs_weight",
        "step_bias": f"{base}dt_projs_bias",
        "log_rates": Name(f"{base}A_logs", there=lambda a: a.reshape(-1, a.shape[-1])),
        "skip": Name(f"{base}Ds", there=jnp.ravel),
    }


_HEAD = {f"scan.{name}": place for name, place in engine("mambaeng.").items()}


def _pattern(given: Given) -> dict[str, Any]:
    if given["pattern"] not in _PATTERNS:
        raise ConfigError(f"pattern must be one of {', '.join(_PATTERNS)}, got {given['pattern']!r}")
    return {"pattern": _PATTERNS[given["pattern"]]}


def _steps(given: Given) -> dict[str, Any]:
    return {"step_range": (given["dt_min"], given["dt_max"])}


def _heads(given: Given) -> dict[str, Any]:
    """Patterns, threshold and projection, which the official code hands on in one dictionary."""
    given = {"head_num": 3, "gfu_t": 0.0, "with_proj": True} | dict(given["para_dict"])
    if unknown := set(given) - {"head_num", "gfu_t", "with_proj"}:
        raise ConfigError(f"para_dict has no {', '.join(sorted(unknown))} here")
    if given["head_num"] not in range(1, 5):
        raise ConfigError(f"head_num must be 1 to 4 here, got {given['head_num']!r}")
    patterns = tuple(_PATTERNS.values())[: given["head_num"]]
    return {"patterns": patterns, "threshold": given["gfu_t"], "projected": given["with_proj"]}


def _mixer_names(mixer: MultiHeadScan) -> dict[str, Any]:
    letters = {pattern: letter for letter, pattern in _PATTERNS.items()}
    names: dict[str, Any] = {"subspaces": Name("", leaves={"weight": "x_ssproj_W"})}
    names |= {"norm": "cat_norm", "out": "y_proj"} if mixer.out is not None else {}
    for i, head in enumerate(mixer.heads):
        names[f"heads.{i}"] = Part(f"scanhead_{letters[head.pattern]}", _HEAD)
    return names


def _around(module: GatedMultiHeadScan) -> Mapping[Any, Any]:
    names: dict[str, Any] = {"conv": "conv2d", "norm": "out_norm", "mixer": Part("mhs", _mixer_names(module.mixer))}
    return names | ({"proj_in": "in_proj"} if module.proj_in is not None else {})


_STEP_SIZES = {"dt_min": _steps, "dt_max": _steps}
_GIVEN = {"dt_min": 0.001, "dt_max": 0.1}
_MIXER = options(d_model="features", d_state="state_size", para_dict=_heads, hw=None, **_STEP_SIZES)
_MIXER_GIVEN = {**_GIVEN, "para_dict": {}}
_BLOCK = _MIXER | {"d_conv": "kernel_size"}

OFFICIAL = [
    Official("routes", _routes, {"sizes": None}, call=_orders),
    Official("GFU", scan_route_attention, {"t": "threshold"}, always={"axis": 1}),
    Official(
        "ScanHead",
        ScanHead,
        options(dim_sub="features", d_state="state_size", gfu_t="threshold", pattern=_pattern, hw=None, **_STEP_SIZES),
        _HEAD,
        defaults=_GIVEN,
        ignore=_IGNORED,
    ),
    Official("MHSM", MultiHeadScan, _MIXER, _mixer_names, defaults=_MIXER_GIVEN, ignore=_IGNORED),
    Official("VSSGate", GatedMultiHeadScan, _BLOCK, _around, defaults=_MIXER_GIVEN, ignore=_IGNORED),
    Official(
        "VSSUnGated",
        GatedMultiHeadScan,
        _BLOCK,
        _around,
        defaults=_MIXER_GIVEN,
        always={"gated": False},
        ignore=_IGNORED,
    ),
]
