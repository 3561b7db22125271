"""The operations of geoopt 0.5.1, manifolds/stereographic/math.py, that the hyperbolic branch is made of."""

from typing import Any

import jax

from attnlab.interop.official import Given, Inputs, Official, Only, options
from attnlab.nn import stereographic


def _operations(distance: Any, inputs: Inputs, given: Given) -> dict[str, jax.Array]:
    k = given["k"]
    v, x, y = (inputs[name] for name in "vxy")
    return {
        "expmap0_v": stereographic.exp0(v, k),
        "logmap0_x": stereographic.log0(x, k),
        "mobius_add_xy": stereographic.mobius_add(x, y, k),
        "dist_xy": distance(x[..., :, None, :], y[..., None, :, :]),
        "dist0_x": stereographic.distance0(x, k),
        "lambda_x": stereographic.conformal_factor(x, k),
    }


_MIDPOINT = options("k", "lincomb", reducedim=Only([-2]), dim=Only(-1), keepdim=Only(False), posweight=None)

OFFICIAL = [
    Official("stereographic.math", stereographic.distance, call=_operations),
    Official("weighted_midpoint", stereographic.weighted_midpoint, _MIDPOINT),
]
