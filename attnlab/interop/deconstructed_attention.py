"""Based's attention of fla-org/flash-linear-attention, fla/ops/based/naive.py, which the paper takes."""

from attnlab.attention.linear.deconstructed_attention import approximate_attention
from attnlab.interop.official import Given, Official, options


def _scale(given: Given) -> dict[str, float | None]:
    """The scale, or with use_scale=False none."""
    return {"scale": given.get("scale") if given.get("use_scale", True) else 1.0}


OFFICIAL = [
    Official(
        "naive_parallel_based",
        approximate_attention,
        options("causal", "eps", use_norm="normalize", scale=_scale, use_scale=_scale),
    )
]
