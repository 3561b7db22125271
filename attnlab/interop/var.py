"""Visual attention redistribution of seilk/VisAttnSink, which has no weights: one layer's input and weights edited."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab.interop.official import Official, options
from attnlab.interventions.var import VisualRedistribution, behind_image, image_centric_heads
from attnlab.points import At


def _build(
    image_start: int, image_len: int, dims: Sequence[int], *, rngs: nnx.Rngs, **settings: float
) -> VisualRedistribution:
    """For an image at the same place in every example."""
    places = jnp.arange(image_start + image_len)[None]
    return VisualRedistribution(places >= image_start, dims=dims, **settings)


def _call(edit: VisualRedistribution, inputs: dict[str, jax.Array], given: Mapping[str, Any]) -> dict[str, jax.Array]:
    hidden, weights = inputs["hidden"], inputs["attn"]
    batch, _, rows, keys = weights.shape
    layer, prompt = jnp.int32(0), hidden.shape[1]
    memory = edit.init_memory(batch, keys)
    _, sinks = edit.stream(hidden, At(layer, "prefill", jnp.arange(prompt)[None]), memory)
    phase = {"prefill": "prefill", "decode": "step"}[given["stage"]]
    at = At(layer, phase, q_idx=jnp.arange(keys - rows, keys)[None], k_idx=jnp.arange(keys)[None])
    after, _ = edit.attention(weights, at, sinks)
    image = at.keys(edit.image[...])
    heads = image_centric_heads(weights, image, sinks, rho=edit.rho, summ=edit.summ)
    behind = behind_image(image, at.q_idx, at.k_idx)[:, None]
    # The official code drops the batch axis of sinks.
    return {"sink_mask": sinks[0, :prompt], "head_mask": heads, "row_mask": heads & behind, "attn": after}


OFFICIAL = [
    Official(
        "VARProcessor",
        _build,
        config=options("tau", "rho", "summ", "p", "image_start", "image_len", dim_sink="dims", stage=None),
        call=_call,
    )
]
