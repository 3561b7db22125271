"""MoonshotAI/MoBA and KwaiVGI/VMoBA, functions without weights, of sequences that stand one behind the other."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnlab.attention.sparse.moba import moba_attention
from attnlab.attention.sparse.vmoba import vmoba_attention
from attnlab.interop.official import Given, Inputs, Official, Only, options


def _packed(attend: Callable[..., Any], inputs: Inputs, given: Given) -> jax.Array:
    """Causal attention of packed sequences, given as `(B, N, H, D)` whose examples follow on each other."""
    q, k, v = (one.reshape(1, -1, *one.shape[2:]) for one in inputs.values())
    ids = np.repeat(np.arange(len(given["cu_seqlens"]) - 1), np.diff(given["cu_seqlens"]))
    return attend(q, k, v, segment_ids=jnp.asarray(ids)[None]).reshape(inputs["q"].shape)


def _each(attend: Callable[..., Any], inputs: Inputs, given: Given) -> jax.Array:
    """One sequence after the other, since pools of pairs are those of an example."""
    q, k, v = (one.reshape(1, -1, *one.shape[2:]) for one in inputs.values())
    rows, grid, size = [], given.get("patch_resolution"), given.get("chunk_size", given.get("moba_chunk_size"))
    for start, stop in itertools.pairwise(given["cu_seqlens"]):
        parts = (one[:, start:stop] for one in (q, k, v))
        if grid is not None and math.prod(grid) == stop - start:
            rows.append(attend(*parts, grid=tuple(grid)))
        else:  # no whole video: blocks are runs of its tokens
            frame = 1 if grid is None else math.prod(grid[1:])
            rows.append(attend(*parts, grid=(stop - start,), block=int(size * frame)))
    return jnp.concatenate(rows, axis=1).reshape(inputs["q"].shape)


OFFICIAL = [
    Official(
        "moba_attn_varlen_naive",
        moba_attention,
        options(moba_chunk_size="chunk_size", moba_topk="topk", cu_seqlens=None, max_seqlen=None, causal=Only(True)),
        call=_packed,
    ),
    Official(
        "moba_attn_varlen",
        vmoba_attention,
        options(
            "select_mode",
            chunk_size="block",
            moba_chunk_size="block",
            moba_topk="topk",
            simsum_threshold="threshold",
            threshold_type="pool",
            patch_resolution=None,
            cu_seqlens=None,
            max_seqlen=None,
            causal=Only(False),
        ),
        call=_each,
        always={"full_fallback": True},
    ),
]
