"""Settings of seilk/VisAttnSink (`VARProcessor` and what it calls) as `VisualRedistribution`."""

from collections.abc import Sequence

import jax.numpy as jnp

from attnlab.interventions.var import VisualRedistribution


def visual_redistribution(
    image_start: int,
    image_len: int,
    *,
    dim_sink: Sequence[int],
    tau: float = 20.0,
    rho: float = 0.5,
    summ: float = 0.2,
    p: float = 0.6,
) -> VisualRedistribution:
    """The intervention under the official names, for an image at the same place in every example."""
    places = jnp.arange(image_start + image_len)[None]
    return VisualRedistribution(places >= image_start, dims=tuple(dim_sink), tau=tau, rho=rho, summ=summ, p=p)
