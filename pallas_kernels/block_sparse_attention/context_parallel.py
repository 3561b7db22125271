"""Block-sparse attention of one sequence that is cut over the devices of a mesh axis, inside `jax.shard_map`.

Two ways, chosen by `method`:

- "ring" (arXiv:2310.01889): keys and values go from device to device; each attends to what passes, and partial results
  are joined by their lse. Works for any number of heads; a device sends its share of the keys n - 1 times. The backward
  pass sends them around once more, and their gradients with them; it keeps nothing but the inputs, y and lse.
- "all_to_all" (arXiv:2309.14509): heads are exchanged for tokens, so that a device attends to the whole sequence for
  its part of the heads, with lists of tiles that are known when tracing; n must divide the heads of the keys.

Under a causal mask the device with the last tokens would do n times the work of the first one. In a ring tokens may
lie in the order of `zigzag`: each device has one part of the first half and one of the second, and all do the same.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from pallas_kernels import partition
from pallas_kernels.array_masks import at_positions
from pallas_kernels.block_sparse_attention.api import block_sparse_attention
from pallas_kernels.block_sparse_attention.parts import merge_attention
from pallas_kernels.dtypes import at_least_float32
from pallas_kernels.masks import Full, Mask

METHODS = ("ring", "all_to_all")
ORDERS = ("contiguous", "zigzag")


def zigzag(length: int, devices: int) -> np.ndarray:
    """The order of tokens, (N,), in which devices have equal work under a causal mask: `x[:, zigzag(N, n)]`.

    `numpy.argsort` of it is the way back.

    Raises:
      ValueError: if the length is no multiple of twice the number of devices.
    """
    if length % (2 * devices):
        raise ValueError(f"length must be a multiple of twice the {devices} devices, got {length}")
    parts = np.arange(length).reshape(2 * devices, -1)
    return np.concatenate([part for d in range(devices) for part in (parts[d], parts[-1 - d])])


def context_parallel_attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    axis_name: str,
    *,
    method: str = "ring",
    order: str = "contiguous",
    mask: Mask | None = None,
    segment_ids: ArrayLike | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """`block_sparse_attention` of a sequence of N tokens, of which each of n devices has N / n.

    Keys may be another sequence, of M tokens, of which each has M / n (cross-attention).

    Args:
      q: this device's queries, (B, N / n, H, D).
      k: its keys, (B, M / n, G, D).
      v: its values, (B, M / n, G, E).
      axis_name: mesh axis over which the tokens are cut.
      method: "ring" or "all_to_all", see above.
      order: of the tokens over the devices: "contiguous", or "zigzag" with a ring.
      mask: on indices in the whole sequence. In a ring, of `Full`, `Causal`, `SlidingWindow`, `Prefix` and
        `QueryPrefix`, and their combinations; with "all_to_all" any that all heads share.
      segment_ids: this device's, integers (B, N / n).
      scale: as in `block_sparse_attention`; a number.
      softcap: as in `block_sparse_attention`.
      return_lse: also return lse, (B, N / n, H).
      implementation: as in `block_sparse_attention`.

    Raises:
      ValueError: for what the method does not take; the message names the argument.
    """
    q, k, v = (jnp.asarray(x) for x in (q, k, v))
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if order not in ORDERS:
        raise ValueError(f"order must be one of {', '.join(ORDERS)}, got {order!r}")
    if segment_ids is not None and q.shape[1] != k.shape[1]:
        raise ValueError(f"segment_ids are those of q and k, which have {q.shape[1]} and {k.shape[1]} tokens")
    ids = None if segment_ids is None else jnp.asarray(segment_ids)
    options = {"scale": scale, "softcap": softcap, "implementation": implementation}
    if method == "all_to_all":
        if order != "contiguous":
            raise ValueError(f"order must be contiguous with all_to_all, whose work is even, got {order!r}")
        y, lse = _all_to_all(q, k, v, ids, axis_name, mask, options)
    else:
        mask = None if mask == Full() else mask
        attend = functools.partial(_attend, axis_name, order, mask, tuple(options.items()))
        y, lse = _ring(axis_name, attend, *partition.same_manual_axes((q, k, v, ids)))
    return (y, lse) if return_lse else y


# ---- heads for tokens


def _all_to_all(q, k, v, ids, axis_name: str, mask: Mask | None, options: dict[str, Any]):
    devices = jax.lax.axis_size(axis_name)
    if k.shape[2] % devices:
        raise ValueError(f"all_to_all needs heads of k that the {devices} devices divide, got {k.shape[2]}; use a ring")
    if mask is not None and mask.heads > 1:
        raise ValueError("mask must be shared by all heads: each device has a part of them")

    def exchange(x: jax.Array, to: int, away: int) -> jax.Array:
        return jax.lax.all_to_all(x, axis_name, split_axis=to, concat_axis=away, tiled=True)

    q, k, v = (exchange(x, 2, 1) for x in (q, k, v))
    if ids is not None:
        ids = jax.lax.all_gather(ids, axis_name, axis=1, tiled=True)
    y, lse = block_sparse_attention(q, k, v, mask=mask, segment_ids=ids, return_lse=True, **options)
    return exchange(y, 1, 2), exchange(lse, 1, 2)


# ---- ring


def _positions(axis_name: str, order: str, tokens: int, device: jax.Array) -> jax.Array:
    """Places in the sequence of a device's tokens, (1, 1, N / n)."""
    at = jnp.arange(tokens)
    if order == "contiguous":
        return (device * tokens + at)[None, None]
    half, devices = tokens // 2, jax.lax.axis_size(axis_name)
    return jnp.where(at < half, device * half + at, (2 * devices - 1 - device) * half + at - half)[None, None]


def _attend(axis_name: str, order: str, rule: Mask | None, options: Any, step: int, q, k, v, ids, k_ids):
    """Attention to the keys that stand `step` devices before this one, y and lse."""
    devices, own = jax.lax.axis_size(axis_name), jax.lax.axis_index(axis_name)
    mask = None
    if rule is not None:
        there = (own - step) % devices
        pairs = (q.shape[1], own), (k.shape[1], there)
        at = (_positions(axis_name, order, tokens, device) for tokens, device in pairs)
        mask = at_positions(rule, next(at), next(at))
    segments = None if ids is None else (ids, k_ids)
    return block_sparse_attention(q, k, v, mask=mask, segment_ids=segments, return_lse=True, **dict(options))


def _next(axis_name: str, tree: Any) -> Any:
    """What the device before had."""
    devices = jax.lax.axis_size(axis_name)
    pairs = [(d, (d + 1) % devices) for d in range(devices)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, axis_name, pairs), tree)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _ring(axis_name: str, attend: Any, q, k, v, ids):
    """y (B, N / n, H, E) in the dtype of q, and lse."""
    devices, moving = jax.lax.axis_size(axis_name), (k, v, ids)
    y = lse = None
    for step in range(devices):
        some_y, some_lse = attend(step, q, *moving[:2], ids, moving[2])
        some = some_y.astype(at_least_float32(q.dtype)), some_lse
        y, lse = some if y is None else merge_attention([(y, lse), some])
        moving = _next(axis_name, moving) if step + 1 < devices else moving
    return y.astype(q.dtype), lse


def _ring_forward(axis_name: str, attend: Any, q, k, v, ids):
    y, lse = _ring(axis_name, attend, q, k, v, ids)
    return (y, lse), (q, k, v, ids, y, lse)


def _ring_backward(axis_name: str, attend: Any, saved, cotangents):
    """Of each part: w = exp(its lse - lse), its dy = w dy, its dlse = w (dy·(its y - y) + dlse)."""
    q, k, v, ids, y, lse = saved
    dy, dlse = cotangents
    wide = lse.dtype
    shared = dlse - (dy.astype(wide) * y.astype(wide)).sum(-1)
    sums = tuple(jnp.zeros_like(x, dtype=wide) for x in (q, k, v))
    dq, moving = sums[0], (k, v, ids, *sums[1:])
    devices = jax.lax.axis_size(axis_name)
    for step in range(devices):
        some_k, some_v, k_ids, dk, dv = moving

        def part(q, k, v, step=step, k_ids=k_ids):
            return attend(step, q, k, v, ids, k_ids)

        (some_y, some_lse), pull = jax.vjp(part, q, some_k, some_v)
        w = jnp.exp(some_lse - jnp.where(lse == -jnp.inf, 0, lse))
        some_dlse = w * ((dy.astype(wide) * some_y.astype(wide)).sum(-1) + shared)
        more = pull(((w[..., None] * dy).astype(some_y.dtype), some_dlse))
        dq, dk, dv = (total + part_.astype(total.dtype) for total, part_ in zip((dq, dk, dv), more, strict=True))
        if step + 1 < devices:
            moving = _next(axis_name, (some_k, some_v, k_ids, dk, dv))
    dk, dv = _next(axis_name, (dk, dv))  # home
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


_ring.defvjp(_ring_forward, _ring_backward)
