"""Golden adapter of `var`: one layer's input and weights under the intervention."""

import jax.numpy as jnp

from attnlab.interop.var import visual_redistribution
from attnlab.interventions.var import behind_image, image_centric_heads
from attnlab.points import At


def run(meta, param, inputs):
    call = dict(meta["call"])
    phase = {"prefill": "prefill", "decode": "step"}[call.pop("stage")]
    edit = visual_redistribution(**call, **meta["config"])
    hidden, weights = inputs["hidden"], inputs["attn"]
    batch, _, rows, keys = weights.shape
    layer = jnp.int32(0)
    memory = edit.init_memory(batch, keys)
    _, sinks = edit.stream(hidden, At(layer, "prefill", jnp.arange(hidden.shape[1])[None]), memory)
    at = At(layer, phase, q_idx=jnp.arange(keys - rows, keys)[None], k_idx=jnp.arange(keys)[None])
    after, _ = edit.attention(weights, at, sinks)
    image = at.keys(edit.image[...])
    heads = image_centric_heads(weights, image, sinks, rho=edit.rho, summ=edit.summ)
    return {
        "sink_mask": sinks[0, : hidden.shape[1]],
        "head_mask": heads,
        "row_mask": heads & behind_image(image, at.q_idx, at.k_idx)[:, None],
        "attn": after,
    }
