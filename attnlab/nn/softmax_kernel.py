"""Softmax attention of a view on `pallas_kernels.block_sparse_attention`: its cost follows the blocks it visits."""

import jax
import jax.numpy as jnp
import numpy as np

from attnlab.contract import View
from attnlab.nn.masking import segment_pair, segments
from attnlab.nn.softmax import counts
from pallas_kernels.array_masks import at_positions
from pallas_kernels.block_sparse_attention import block_sparse_attention
from pallas_kernels.masks import Full, Mask


def on_kernel(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    view: View,
    kernel: str,
    *,
    bias: jax.Array | None = None,
    scale: jax.Array | float | None = None,
    softcap: float | None = None,
) -> jax.Array | None:
    """The op on a complete view; None where the op does not take it.

    It takes no masks of queries by keys, no labels, no keys of another dtype than the queries' (from a cache), and, of
    indices that are known at run time alone, those rules that `at_positions` takes.

    Args:
      q: queries `(B, N, H, D)`.
      k: keys `(B, M, G, D)`.
      v: values `(B, M, G, E)`.
      view: who sees whom.
      kernel: "auto", or the name of an implementation of the op.
      bias: broadcastable to `(B, H, N, M)`.
      scale: as in `softmax_attention`.
      softcap: as in `softmax_attention`.
    """
    if (view.mask is not None and view.mask.ndim != 2) or not q.dtype == k.dtype == v.dtype:
        return None
    mask: Mask | None = None
    if view.rule is not None and view.rule != Full():
        if counts(view.q_idx) and counts(view.k_idx) and view.segment_ids is None:
            mask = view.rule
        else:
            places = (jnp.atleast_2d(jnp.asarray(index))[:, None] for index in (view.q_idx, view.k_idx))
            try:
                mask = at_positions(view.rule, *places)
            except ValueError:
                return None
    if bias is not None:
        bias = bias.reshape((1,) * (4 - bias.ndim) + bias.shape)
    return block_sparse_attention(
        q,
        k,
        v,
        mask=mask,
        segment_ids=_segments(view, q.shape, k.shape[1]),
        bias=bias,
        scale=scale,
        softcap=softcap,
        implementation=None if kernel == "auto" else kernel,
    )


def _segments(view: View, shape: tuple[int, ...], keys: int) -> tuple[jax.Array, jax.Array] | None:
    """Segments of queries and keys; keys that no query sees have one of their own."""
    if view.segment_ids is None and view.mask is None:
        return None
    if view.segment_ids is None:
        ids = np.zeros(shape[:2], np.int32), np.zeros((shape[0], keys), np.int32)
    elif isinstance(view.segment_ids, tuple | list):
        ids = segment_pair(view.segment_ids)
    else:
        ids = (segments(view.segment_ids)[0],) * 2
    q_ids, k_ids = (jnp.asarray(each) for each in ids)
    if view.mask is None:
        return q_ids, k_ids
    return q_ids, jnp.where(view.mask, k_ids, jnp.min(q_ids) - 1)
