"""NATTEN's ops and modules, of any version: SHI-Labs/NATTEN."""

from typing import Any

import jax

from attnlab import Layout
from attnlab.interop.official import Given, Inputs, Official, options
from pallas_kernels.neighborhood_attention import neighborhood_attention


def _op(op: Any, inputs: Inputs, given: Given) -> dict[str, jax.Array]:
    y, lse = op(**inputs, return_lse=True)
    return {"y": y, "lse": lse}


_CONFIG = options(embed_dim="features", dim="features", is_causal="causal", qk_scale="scale")
_CONFIG |= options(rel_pos_bias="relative_bias", proj_drop="projection_dropout")
_NAMES = {("query", "key", "value"): "qkv", "out": "proj", "bias": "rpb"}

OFFICIAL = [Official(f"na{axes}d", neighborhood_attention, call=_op) for axes in (1, 2, 3)]
for _axes, _layout in enumerate((Layout.SEQUENCE, Layout.IMAGE, Layout.VIDEO), 1):
    _symbol = f"NeighborhoodAttention{_axes}D"
    OFFICIAL.append(Official(_symbol, "neighborhood_attention", _CONFIG, _NAMES, always={"layout": _layout}))
