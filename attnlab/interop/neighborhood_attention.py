"""NATTEN's ops and modules, of any version: SHI-Labs/NATTEN."""

from typing import Any

import jax

from attnlab import Layout
from attnlab.attention.local.neighborhood_attention import NeighborhoodAttention
from attnlab.interop.official import Official, options
from pallas_kernels.neighborhood_attention import neighborhood_attention


def _op(op: Any, inputs: dict[str, jax.Array], given: Any) -> dict[str, jax.Array]:
    y, lse = op(**inputs, return_lse=True)
    return {"y": y, "lse": lse}


_OPTIONS = ("kernel_size", "stride", "dilation")

OFFICIAL = [
    *(
        Official(f"na{axes}d", neighborhood_attention, options(*_OPTIONS, "is_causal", "scale"), call=_op)
        for axes in (1, 2, 3)
    ),
    *(
        Official(
            f"NeighborhoodAttention{axes}D",
            NeighborhoodAttention,
            options(*_OPTIONS, "num_heads", "qkv_bias", embed_dim="features", dim="features", is_causal="causal")
            | {"qk_scale": "scale", "rel_pos_bias": "relative_bias", "proj_drop": "projection_dropout"},
            {("query", "key", "value"): "qkv", "out": "proj", "bias": "rpb"},
            always={"layout": layout},
        )
        for axes, layout in enumerate((Layout.SEQUENCE, Layout.IMAGE, Layout.VIDEO), 1)
    ),
]
