"""HorNet: raoyongming/HorNet, hornet.py."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx

from attnlab.contract import Layout, Site
from attnlab.interop.names import Mapped, Part, Squeezed
from attnlab.interop.official import ConfigError, Given, Official, options
from attnlab.mixers.hornet import GlobalLocalFilter, RecursiveGatedConv
from attnlab.models.block import Block
from attnlab.models.hornet import HorNet
from attnlab.models.staged import Place, transformer_block

_FILTER = {
    "local": "dw",
    "filter.weight": Mapped("complex_weight", lambda a: jnp.moveaxis(a, 0, -2), lambda a: jnp.moveaxis(a, -2, 0)),
}
_WHOLE = Official("GlobalLocalFilter", GlobalLocalFilter, {}, _FILTER)


def _names(module: RecursiveGatedConv) -> dict[str, Any]:
    names: dict[str, Any] = {
        "proj_in": Squeezed("proj_in", 2, 3),
        "proj_out": Squeezed("proj_out", 2, 3),
        "widen.*": Squeezed("pws.*", 2, 3),
    }
    return names | {"conv": Part("dwconv", _WHOLE) if isinstance(module.conv, GlobalLocalFilter) else "dwconv"}


def _spectrum(given: Given) -> dict[str, Any]:
    return {"spectrum": (given["h"], given["w"])}


def _filtered(given: Given) -> dict[str, Any]:
    """The filter by the name of its class; None is the convolution."""
    filter_class = given["gflayer"]
    if filter_class not in (None, "GlobalLocalFilter"):
        raise ConfigError(f"gflayer must be None or GlobalLocalFilter here, got {filter_class!r}")
    return _spectrum(given) if filter_class else {}


_GNCONV = options("order", s="scale", gflayer=_filtered, h=None, w=None)
_GIVEN = {"order": 5, "s": 1.0, "gflayer": None, "h": 14, "w": 8}
_MIXER = Official("gnconv", RecursiveGatedConv, _GNCONV | {"dim": "features"}, _names, defaults=_GIVEN)


def _block(*, dim: int, layer_scale_init_value: float = 1e-6, rngs: nnx.Rngs, **gnconv: Any) -> Block:
    """A block, alone."""
    mixer = _MIXER.build({"dim": dim, **gnconv}, rngs=rngs)
    place = Place(Site(dim, 1, Layout.IMAGE), 0, lambda *site, **shared: mixer, 0.0)
    return transformer_block(place, layer_scale=layer_scale_init_value or None, rngs=rngs)


def _around(block: Block) -> dict[str, Any]:
    names = {"scale1": "gamma1", "scale2": "gamma2", "mlp.fc1": "pwconv1", "mlp.fc2": "pwconv2"}
    return names | {"mixer": Part("gnconv", _names(block.mixer))}


def _stages(given: Given) -> dict[str, Any]:
    """Orders, scales and filters, from the options of the gated convolutions of all stages or of each."""
    each = given["gnconv"] or {}
    each = [{**_GIVEN, **stage} for stage in ([each] * 4 if isinstance(each, Mapping) else each)]
    spectra = [_filtered(stage).get("spectrum") for stage in each]
    return {"orders": [s["order"] for s in each], "scale": [s["s"] for s in each], "spectra": spectra}


def _model_names(model: HorNet) -> dict[str, Any]:
    names: dict[str, Any] = {"stem.conv": "downsample_layers.0.0", "stem.norm": "downsample_layers.0.1"}
    names |= {"stage.*.down.norm": "downsample_layers.*.0", "stage.*.down.conv": "downsample_layers.*.1"}
    return names | {"stage.*.blocks.*": lambda i, j: Part(f"stages.{i}.{j}", _around(model.stage[i].blocks[j]))}


_MODEL = options("depths", "num_classes", in_chans="channels", base_dim="features", gnconv=_stages)
_MODEL |= options(layer_scale_init_value=lambda given: {"layer_scale": given["layer_scale_init_value"] or None})
_MODEL |= options(head_init_scale=None, uniform_init=None, block=None)
_MODEL_GIVEN = {"depths": [3, 3, 9, 3], "base_dim": 96, "gnconv": None}

OFFICIAL = [
    Official(
        "GlobalLocalFilter",
        GlobalLocalFilter,
        {"dim": "features", "h": _spectrum, "w": None},
        _FILTER,
        defaults={"h": 14, "w": 8},
    ),
    _MIXER,
    Official("Block", _block, {}, _around),
    Official("HorNet", HorNet, _MODEL, _model_names, defaults=_MODEL_GIVEN),
]
