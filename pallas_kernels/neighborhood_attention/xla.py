"""Tiled neighborhood attention in plain JAX: every platform, forward and backward, without the N×N matrix.

1. Fold. Positions of one dilation group are brought together, x = i·d + g, and the groups become a batch axis: from
   here on every window is a run of keys.
2. Tile. The grid of queries is cut into tiles of T = Π T_a tokens. The windows of a tile lie in a box of U = Π U_a
   keys, U_a about T_a + k_a - 1, whose corner is known when tracing. A sweep over the tiles slices the box out, and
   masks the keys that are not in a query's own window.
3. Attend. Per tile two products, (T, D) by (U, D) and (T, U) by (U, E), with the softmax between them, in float32.

The backward pass sweeps over the tiles again: it makes the weights anew from the log of their sums, and adds the
gradients of keys and values into their boxes. Memory is O(N·D) and one tile of scores, which never has more elements
than Πk·N; work is O(N·U·D), with U / Πk about Π (1 + T_a / k_a). `tile_sizes` weighs that against the number of steps.
"""

import dataclasses
import functools
import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.neighborhood_attention.arguments import Arguments
from pallas_kernels.neighborhood_attention.windows import Window
from pallas_kernels.promotion import numpy_ranks

# In elements of scores, measured on CPU (README.md): what a step costs beside its scores, and the most in one step.
STEP_COST = 1 << 13
MOST_SCORES = 1 << 21


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What is static in a sweep."""

    windows: tuple[Window, ...]
    tiles: tuple[int, ...]
    group: int
    scale: float
    precision: jax.lax.Precision
    dtype: jnp.dtype

    @functools.cached_property
    def axes(self) -> tuple["_Axis", ...]:
        return tuple(_axis(window, tile) for window, tile in zip(self.windows, self.tiles, strict=True))

    @property
    def steps(self) -> np.ndarray:
        """Index of the tile along each axis, (tiles, axes) int32, in the order of the sweep."""
        return np.stack(np.meshgrid(*(np.arange(a.count) for a in self.axes), indexing="ij"), -1).reshape(
            -1, len(self.axes)
        )


@dataclasses.dataclass(frozen=True, eq=False)
class _Axis:
    """One axis of a tiling, n tiles of T queries and U keys, d dilation groups.

    Attributes:
      count: n.
      queries: T.
      keys: U.
      corner: first key of the box of each tile, (n,).
      first: first key of each query's window, counted from the corner, (n, d, T).
      last: its last key, likewise; before the first for queries that pad the axis.
    """

    count: int
    queries: int
    keys: int
    corner: np.ndarray
    first: np.ndarray
    last: np.ndarray


class _Tensors(NamedTuple):
    """Folded and tiled inputs: P dilation groups, L lengths of the folded axes, R = H / G.

    Attributes:
      q: (tiles, B, P, G, R·T, D).
      k: (B, P, G, *L, D).
      v: (B, P, G, *L, E).
      bias: (H, 2k-1, …) or None.
      additional_keys: (B, 1, G, A, D) or None.
      additional_values: (B, 1, G, A, E) or None.
      key_mask: (B, P, *L) bool or None.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    bias: jax.Array | None
    additional_keys: jax.Array | None
    additional_values: jax.Array | None
    key_mask: jax.Array | None


def supports(args: Arguments) -> str | None:
    """None: it takes all arguments."""
    return None


@jax.jit
def run(args: Arguments) -> tuple[jax.Array, jax.Array]:
    """y (B, *S, H, E) in the dtype of q, and lse (B, *S, H) in the accumulator."""
    batch, heads, groups = args.q.shape[0], args.q.shape[-2], args.k.shape[-2]
    plan = _Plan(
        args.windows,
        tile_sizes(args.windows, batch * heads),
        heads // groups,
        args.scale,
        args.precision,
        args.accumulator,
    )
    extra = [args.additional_keys, args.additional_values]
    extra = [None if x is None else jnp.swapaxes(x, 1, 2)[:, None] for x in extra]
    k, v = (_fold(plan, x)[:, :, :, 0] for x in (args.k[..., None, :], args.v[..., None, :]))
    q = args.q.reshape(*args.q.shape[:-2], groups, plan.group, args.q.shape[-1])
    mask = None if args.key_mask is None else _fold(plan, args.key_mask[..., None, None, None])[:, :, 0, 0, ..., 0]
    y, lse = _sweep(plan, _varying_alike(_Tensors(_tile(plan, _fold(plan, q)), k, v, args.bias, *extra, mask)))
    y = _unfold(plan, _untile(plan, y))
    lse = _unfold(plan, _untile(plan, lse[..., None]))
    return y.reshape(*args.q.shape[:-1], -1), lse.reshape(args.q.shape[:-1])


def _varying_alike(x: _Tensors) -> _Tensors:
    """Inside shard_map: what is the same on all devices, such as the bias, is treated as varying like the rest.

    Outside the hand-written gradient, so that its transpose sums the gradients of the devices.
    """
    axes = frozenset().union(*(jax.typeof(a).manual_axis_type.varying for a in jax.tree.leaves(x)))

    def cast(a: jax.Array) -> jax.Array:
        missing = tuple(sorted(axes - jax.typeof(a).manual_axis_type.varying))
        return jax.lax.pcast(a, missing, to="varying") if missing else a

    return jax.tree.map(cast, x)


# Folding and tiling


def _fold(plan: _Plan, x: jax.Array) -> jax.Array:
    """(B, *S, G, R, D) to (B, P, G, R, *L, D)."""
    n = len(plan.windows)
    pads = [(0, w.group_length * w.dilation - w.length) for w in plan.windows]
    x = jnp.pad(x, [(0, 0), *pads, (0, 0), (0, 0), (0, 0)])
    split = [size for w in plan.windows for size in (w.group_length, w.dilation)]
    x = x.reshape(x.shape[0], *split, *x.shape[-3:])
    coordinates, groups = range(1, 2 * n, 2), range(2, 2 * n + 1, 2)
    x = x.transpose(0, *groups, 2 * n + 1, 2 * n + 2, *coordinates, 2 * n + 3)
    return x.reshape(x.shape[0], -1, *x.shape[n + 1 :])


def _unfold(plan: _Plan, x: jax.Array) -> jax.Array:
    """(B, P, G, R, *L, D) to (B, *S, G, R, D): the inverse of `_fold`."""
    n = len(plan.windows)
    x = x.reshape(x.shape[0], *(w.dilation for w in plan.windows), *x.shape[2:])
    pairs = [axis for a in range(n) for axis in (n + 3 + a, 1 + a)]
    x = x.transpose(0, *pairs, n + 1, n + 2, 2 * n + 3)
    x = x.reshape(x.shape[0], *(w.group_length * w.dilation for w in plan.windows), *x.shape[-3:])
    return x[:, *(slice(w.length) for w in plan.windows)]


def _tile(plan: _Plan, x: jax.Array) -> jax.Array:
    """(B, P, G, R, *L, D) to (tiles, B, P, G, R·T, D)."""
    n = len(plan.windows)
    pads = [(0, a.count * a.queries - w.group_length) for a, w in zip(plan.axes, plan.windows, strict=True)]
    x = jnp.pad(x, [*[(0, 0)] * 4, *pads, (0, 0)])
    x = x.reshape(*x.shape[:4], *(size for a in plan.axes for size in (a.count, a.queries)), x.shape[-1])
    x = x.transpose(*range(4, 4 + 2 * n, 2), *range(4), *range(5, 5 + 2 * n, 2), 4 + 2 * n)
    return x.reshape(-1, *x.shape[n : n + 3], plan.group * math.prod(plan.tiles), x.shape[-1])


def _untile(plan: _Plan, x: jax.Array) -> jax.Array:
    """(tiles, B, P, G, R·T, D) to (B, P, G, R, *L, D): the inverse of `_tile`."""
    n = len(plan.windows)
    x = x.reshape(*(a.count for a in plan.axes), *x.shape[1:4], plan.group, *plan.tiles, x.shape[-1])
    pairs = [axis for a in range(n) for axis in (a, n + 4 + a)]
    x = x.transpose(*range(n, n + 4), *pairs, 2 * n + 4)
    x = x.reshape(*x.shape[:4], *(a.count * a.queries for a in plan.axes), x.shape[-1])
    return x[:, :, :, :, *(slice(w.group_length) for w in plan.windows)]


@functools.lru_cache(maxsize=1024)
def _axis(window: Window, tile: int) -> _Axis:
    first, last = window.table()
    groups, length = first.shape
    count = -(-length // tile)
    pads = ((0, 0), (0, count * tile - length))
    first, last = np.pad(first, pads), np.pad(last, pads, constant_values=-1)
    first, last = (x.reshape(groups, count, tile).swapaxes(0, 1) for x in (first, last))
    empty = last < first
    low = np.where(empty, length, first).min((1, 2))
    keys = int((np.where(empty, -1, last).max((1, 2)) - low + 1).max())
    corner = np.minimum(low, length - keys)
    return _Axis(
        count,
        tile,
        keys,
        corner,
        *((np.where(empty, x, x - corner[:, None, None])).astype(np.int32) for x in (first, last)),
    )


@functools.lru_cache(maxsize=1024)
def tile_sizes(windows: tuple[Window, ...], batch: int) -> tuple[int, ...]:
    """Queries of a tile along each axis, in coordinates of a dilation group.

    Args:
      windows: one per axis.
      batch: B·H.
    """
    groups = math.prod(w.dilation for w in windows)
    tokens = math.prod(w.group_length for w in windows)
    most = tokens * math.prod(min(w.kernel_size, w.group_length) for w in windows)
    candidates = [[_axis(w, tile) for tile in _candidates(w)] for w in windows]

    def cost(axes: tuple[_Axis, ...]) -> tuple[bool, float]:
        queries, keys = math.prod(a.queries for a in axes), math.prod(a.keys for a in axes)
        scores = batch * groups * queries * keys
        too_many = scores > MOST_SCORES or queries * keys > most
        steps = math.prod(a.count for a in axes)
        return (too_many * scores, steps * (STEP_COST + scores + 8 * batch * groups * keys))

    return tuple(a.queries for a in min(itertools.product(*candidates), key=cost))


def _candidates(window: Window) -> list[int]:
    """Powers of two times the stride, so that queries that share a window stay together, and the whole axis."""
    powers = (window.stride << n for n in range(window.group_length.bit_length()))
    return [*(tile for tile in powers if tile < window.group_length), window.group_length]


# The sweep


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sweep(plan: _Plan, x: _Tensors) -> tuple[jax.Array, jax.Array]:
    """y (tiles, B, P, G, R·T, E) in the dtype of q, and lse (tiles, B, P, G, R·T)."""
    return _sweep_forward(plan, x)[0]


def _sweep_forward(plan: _Plan, x: _Tensors):
    def step(_, inputs):
        index, q = inputs
        k, v = (_with_extra(box, extra) for box, extra in _boxes(plan, x, index))
        scores, allowed = _scores(plan, x, index, q, k)
        top = scores.max(-1)
        weights = jnp.where(allowed, jnp.exp(scores - top[..., None]), 0)
        total = weights.sum(-1)
        empty = total == 0  # rows that pad a tile, or whose keys are masked
        total = jnp.where(empty, 1, total)
        y = _rows(plan, weights, v) / _flat(total)[..., None]
        return None, (y.astype(q.dtype), _flat(jnp.where(empty, -jnp.inf, top + jnp.log(total))))

    _, (y, lse) = jax.lax.scan(step, None, (jnp.asarray(plan.steps, jnp.int32), x.q))
    return (y, lse), (x, y, lse)


@numpy_ranks()
def _sweep_backward(plan: _Plan, saved, cotangents):
    x, y, lse = saved
    dy, dlse = cotangents
    # ds = w (dw - shared): the gradient of the softmax, and that of lse, which is w
    shared = jnp.sum(dy.astype(plan.dtype) * y.astype(plan.dtype), -1) - dlse

    def step(sums, inputs):
        index, q, dy, lse, shared = inputs
        k, v = (_with_extra(box, extra) for box, extra in _boxes(plan, x, index))
        scores, allowed = _scores(plan, x, index, q, k)
        unflat = (*scores.shape[:-1], 1)
        weights = jnp.where(allowed, jnp.exp(scores - lse.reshape(unflat)), 0)
        dweights = _dot(plan, "bpgne,bpgue->bpgnu", dy, v).reshape(scores.shape)
        dscores = weights * (dweights - shared.reshape(unflat))
        narrow = _merge_rows(dscores).astype(q.dtype)
        dq = plan.scale * _dot(plan, "bpgnu,bpgud->bpgnd", narrow, k)
        dk = plan.scale * _dot(plan, "bpgnu,bpgnd->bpgud", narrow, q)
        dv = _dot(plan, "bpgnu,bpgne->bpgue", _merge_rows(weights).astype(v.dtype), dy)
        return _add(plan, sums, index, dk, dv, dscores), dq.astype(q.dtype)

    summed = x._replace(q=None, key_mask=None)
    zeros = jax.tree.map(lambda a: jnp.zeros_like(a, plan.dtype), summed)
    inputs = (jnp.asarray(plan.steps, jnp.int32), x.q, dy, lse, shared)
    sums, dq = jax.lax.scan(step, zeros, inputs)
    rest = jax.tree.map(lambda a, d: d.astype(a.dtype), summed, sums)
    return (rest._replace(q=dq),)


_sweep.defvjp(_sweep_forward, _sweep_backward)


def _corner(plan: _Plan, index: jax.Array) -> list[jax.Array]:
    return [jnp.asarray(axis.corner, jnp.int32)[i] for axis, i in zip(plan.axes, index, strict=True)]


def _start(plan: _Plan, index: jax.Array, before: int, after: int) -> list[jax.Array]:
    """Where the box of a tile starts in an array with other axes before and after those of the tokens."""
    zero = jnp.zeros((), jnp.int32)  # of the type of the corners: Python's 0 is wider in 64-bit mode
    return [zero] * before + _corner(plan, index) + [zero] * after


def _boxes(plan: _Plan, x: _Tensors, index: jax.Array):
    """Keys and values of the box of a tile, (B, P, G, U, D|E), each with the additional ones."""
    sizes = [axis.keys for axis in plan.axes]
    pairs = []
    for array, extra in ((x.k, x.additional_keys), (x.v, x.additional_values)):
        box = jax.lax.dynamic_slice(array, _start(plan, index, 3, 1), (*array.shape[:3], *sizes, array.shape[-1]))
        pairs.append((box.reshape(*box.shape[:3], -1, box.shape[-1]), extra))
    return pairs


def _with_extra(box: jax.Array, extra: jax.Array | None) -> jax.Array:
    if extra is None:
        return box
    extra = jnp.broadcast_to(extra, (*box.shape[:3], *extra.shape[3:]))
    return jnp.concatenate([box, extra], axis=3)


def _scores(plan: _Plan, x: _Tensors, index: jax.Array, q: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Scores (B, P, G, R, T, U + A), the least number where not allowed, and what is allowed, broadcastable to it."""
    scores = plan.scale * _dot(plan, "bpgnd,bpgud->bpgnu", q, k)
    scores = scores.reshape(*scores.shape[:3], plan.group, -1, scores.shape[-1])
    extra = scores.shape[-1] - math.prod(axis.keys for axis in plan.axes)
    allowed = jnp.pad(_allowed(plan, index, x.key_mask), [*[(0, 0)] * 5, (0, extra)], constant_values=True)
    if x.bias is not None:
        bias = x.bias.astype(plan.dtype)
        hides = bias == -jnp.inf  # apart from the numbers: a sum of products would make NaN of it
        added = _tile_bias(plan, index, jnp.where(hides, 0, bias))
        scores = scores + jnp.pad(added, [*[(0, 0)] * 3, (0, extra)])
        hidden = _tile_bias(plan, index, hides.astype(plan.dtype)) > 0.5
        allowed = allowed & ~jnp.pad(hidden, [*[(0, 0)] * 3, (0, extra)])
    return jnp.where(allowed, scores, jnp.finfo(plan.dtype).min), allowed


def _allowed(plan: _Plan, index: jax.Array, key_mask: jax.Array | None) -> jax.Array:
    """(B or 1, P, 1, 1, T, U) booleans: the product of the windows of the axes, of keys that exist."""
    n = len(plan.axes)
    allowed = jnp.ones((1,) * 3 * n, bool)
    for a, (axis, i) in enumerate(zip(plan.axes, index, strict=True)):
        first, last = (jnp.asarray(bound)[i][:, :, None] for bound in (axis.first, axis.last))
        key = jnp.arange(axis.keys)
        inside = (key >= first) & (key <= last)
        others = [b for b in range(3 * n) if b % n != a]
        allowed = allowed & jnp.expand_dims(inside, others)
    groups, queries, keys = (math.prod(allowed.shape[b * n : b * n + n]) for b in range(3))
    allowed = allowed.reshape(1, groups, 1, 1, queries, keys)
    if key_mask is None:
        return allowed
    box = (*key_mask.shape[:2], *(axis.keys for axis in plan.axes))
    box = jax.lax.dynamic_slice(key_mask, _start(plan, index, 2, 0), box)
    return allowed & box.reshape(*box.shape[:2], 1, 1, 1, keys)


def _tile_bias(plan: _Plan, index: jax.Array, bias: jax.Array) -> jax.Array:
    """(G, R, T, U): the bias of each offset in a tile, by a one-hot product per axis, whose gradient is a product."""
    heads = bias.shape[0]
    for axis, window, i, corner in zip(plan.axes, plan.windows, index, _corner(plan, index), strict=True):
        offset = corner + jnp.arange(axis.keys) - (i * axis.queries + jnp.arange(axis.queries))[:, None]
        chosen = jax.nn.one_hot(offset + window.kernel_size - 1, 2 * window.kernel_size - 1, dtype=bias.dtype)
        # The entry of an axis becomes its queries and keys, at the end: (H, entries left, T_0, U_0, …)
        bias = jnp.tensordot(bias, chosen, axes=(1, 2), precision="highest")
    n = len(plan.axes)
    bias = bias.transpose(0, *range(1, 2 * n, 2), *range(2, 2 * n + 1, 2))
    return bias.reshape(heads // plan.group, plan.group, math.prod(plan.tiles), -1)


def _add(plan: _Plan, sums: _Tensors, index: jax.Array, dk: jax.Array, dv: jax.Array, dscores: jax.Array) -> _Tensors:
    """The sums of gradients with those of one tile, dk and dv (B, P, G, U + A, D|E), added in their box."""
    keys = math.prod(axis.keys for axis in plan.axes)
    start = _start(plan, index, 3, 1)

    def into_box(total, part):
        box = (*total.shape[:3], *(axis.keys for axis in plan.axes), total.shape[-1])
        part = jax.lax.dynamic_slice(total, start, box) + part[:, :, :, :keys].reshape(box)
        return jax.lax.dynamic_update_slice(total, part, start)

    sums = sums._replace(k=into_box(sums.k, dk), v=into_box(sums.v, dv))
    if sums.additional_keys is not None:
        more = (part[:, :, :, keys:].sum(1, keepdims=True) for part in (dk, dv))
        old = (sums.additional_keys, sums.additional_values)
        more_k, more_v = (total + part for total, part in zip(old, more, strict=True))
        sums = sums._replace(additional_keys=more_k, additional_values=more_v)
    if sums.bias is not None:
        _, pull = jax.vjp(functools.partial(_tile_bias, plan, index), sums.bias)
        sums = sums._replace(bias=sums.bias + pull(dscores[..., :keys].sum((0, 1)))[0])
    return sums


def _dot(plan: _Plan, equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(equation, a, b, precision=plan.precision, preferred_element_type=plan.dtype)


def _rows(plan: _Plan, weights: jax.Array, v: jax.Array) -> jax.Array:
    return _dot(plan, "bpgnu,bpgue->bpgne", _merge_rows(weights).astype(v.dtype), v)


def _merge_rows(x: jax.Array) -> jax.Array:
    """(B, P, G, R, T, U) to (B, P, G, R·T, U)."""
    return x.reshape(*x.shape[:3], -1, x.shape[-1])


def _flat(x: jax.Array) -> jax.Array:
    """(B, P, G, R, T) to (B, P, G, R·T)."""
    return x.reshape(*x.shape[:3], -1)
