"""Core context aware attention: chenyaofo/CCA-Attention."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab.attention.sparse.core_context_attention import CoreContextCore, PoolingName, core_context_attention
from attnlab.contract import View
from attnlab.interop.official import Given, Inputs, Official, Only, options
from attnlab.interop.rotary_tables import turned_by_tables
from attnlab.nn.dense_mixer import Heads, HeadSizes


def _core(
    group_size: int, window: int, pooling: PoolingName = "cca", *, num_heads: int = 1, rngs: nnx.Rngs
) -> CoreContextCore:
    return CoreContextCore(num_heads, group_size=group_size, window=window, pooling=pooling)


def _turned(inputs: Inputs, given: Given) -> tuple[jax.Array, ...]:
    q, k = inputs["q"], inputs["k"]
    if given["rope"]:
        q, k = (turned_by_tables(x, inputs["cos"], inputs["sin"]) for x in (q, k))
    return q, k, inputs["v"]


def _prefill(attend: Any, inputs: Inputs, given: Given) -> jax.Array:
    return attend(*_turned(inputs, given))


def _decode(core: CoreContextCore, inputs: Inputs, given: Given) -> dict[str, jax.Array]:
    """The first tokens at once, then one after the other; and the cores in front of the window at the end."""
    parts = _turned(inputs, given)
    start, steps = given["prefill"], given["decode_steps"]
    batch, tokens, heads, size = parts[0].shape
    core.num_heads = heads
    sizes = HeadSizes(parts[1].shape[2], size, parts[2].shape[3])
    cache, found = core.init_cache(sizes, batch, tokens, parts[0].dtype), []
    run = jax.jit(lambda parts, cache: core(Heads(*parts), View(), cache))
    for first, last in ((0, start), *((t, t + 1) for t in range(start, start + steps))):
        y, cache = run([part[:, first:last] for part in parts], cache)
        found.append(y)
    front = max((start + steps - core.window) // core.group_size, 0)
    keys, values = (jnp.repeat(x[:, :front], heads // x.shape[2], axis=2) for x in (cache.keys, cache.values))
    return {"y": jnp.concatenate(found, 1), "group_key": keys, "group_value": values}


_CONFIG = options(
    pooling_size="group_size",
    window_size="window",
    pooling_func="pooling",
    causal=Only(True),
    rope=None,
    prefill=None,
    decode_steps=None,
    # The authors' cache pools the wrong tokens in its first two layers.
    layer_idx=None,
)
_GIVEN = {"rope": True}

OFFICIAL = [
    Official("pooling_attention_wo_cache", core_context_attention, _CONFIG, call=_prefill, defaults=_GIVEN),
    Official("pooling_attention_w_cache", _core, _CONFIG, call=_decode, defaults=_GIVEN),
]
