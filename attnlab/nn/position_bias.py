"""Where tokens are, as biases of scores in float32: tables by offset, networks of it, products with queries.

An offset is key - query along a sequence, and query - key along the axes of a window (as in Swin's tables).
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from attnlab.nn.linear import trunc_normal
from attnlab.nn.positions import grid_positions
from pallas_kernels.dtypes import at_least_float32


class Buckets(Protocol):
    """How offsets become rows of a table."""

    @property
    def rows(self) -> int:
        """How many rows there are."""

    def __call__(self, offset: ArrayLike) -> jax.Array:
        """Rows, int32, of integers key - query, in their shape."""


# By offsets in a window, from a table


def relative_position_index(window: Sequence[int]) -> np.ndarray:
    """Row of the bias table for each pair of tokens of a window (Liu et al., 2021, arXiv:2103.14030).

    Args:
      window: lengths (w_1, ..., w_A) of the axes.

    Returns:
      `(P, P)` int32 [query, key]: the offsets query - key + w - 1 per axis, in row-major order over the (2 w - 1) each.
    """
    coordinates = grid_positions(window)[0]
    offsets = coordinates[:, None] - coordinates[None] + np.asarray(window) - 1
    index = np.zeros(offsets.shape[:2], np.int64)
    for axis, length in enumerate(window):
        index = index * (2 * length - 1) + offsets[..., axis]
    return index.astype(np.int32)


class RelativePositionBias(nnx.Module):
    """Learned bias per head and offset between two tokens of a window: `(H, P, P)` float32.

    Args:
      window: lengths of the window's axes.
      num_heads: heads H.
      param_dtype: of the table, `(prod(2 w - 1), H)`.
      rngs: stream `params`.
    """

    def __init__(self, window: Sequence[int], num_heads: int, *, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.window = tuple(window)
        rows = math.prod(2 * length - 1 for length in self.window)
        table = trunc_normal(rngs.params(), (rows, num_heads), param_dtype)
        self.table = nnx.Param(table, logical_axes=(None, "heads"), weight_decay=False)

    def __call__(self) -> jax.Array:
        table = self.table[...]
        table = table.astype(at_least_float32(table.dtype))
        return jnp.moveaxis(table[relative_position_index(self.window)], -1, 0)


# By offsets in a window, through a network


def window_offsets(
    window: Sequence[int], *, log_spaced: bool = False, extent: Sequence[int] | None = None
) -> np.ndarray:
    """The offsets query - key between tokens of a window, as what a network is given.

    Args:
      window: lengths (w_1, ..., w_A) of the axes.
      log_spaced: whether an offset d becomes sign(d) log2(1 + 8 |d| / (e - 1)) / 3 (Swin V2, Liu et al., 2022,
        arXiv:2111.09883): ±1 at 7/8 of the extent.
      extent: lengths e of the window that the network was trained with; those of the window when None.

    Returns:
      `(prod(2 w - 1), A)` float32, in the order of the rows of `relative_position_index`.
    """
    axes = np.meshgrid(*(np.arange(1 - length, length) for length in window), indexing="ij")
    offsets = np.stack(axes, -1).reshape(-1, len(window)).astype(np.float64)
    if log_spaced:
        steps = np.maximum(np.asarray(window if extent is None else extent) - 1, 1)
        offsets = np.sign(offsets) * np.log2(1 + 8 * np.abs(offsets) / steps) / 3
    return offsets.astype(np.float32)


class NetworkBias(nnx.Module):
    """Bias per head and offset between two tokens of a window that a small network makes of the offset.

    Args:
      window: lengths of the window's axes.
      network: `(T, A)` offsets to `(T, H)`, computed in the dtype of its parameters: an `MLP`, or one of its own kind.
      log_spaced: whether it is given logarithms, see `window_offsets`.
      bound: biases are bound · sigmoid(·), 16 in Swin V2; as they are when None.
    """

    def __init__(
        self, window: Sequence[int], network: nnx.Module, *, log_spaced: bool = False, bound: float | None = None
    ):
        self.window, self.network = tuple(window), network
        self.log_spaced, self.bound = log_spaced, bound

    def __call__(self, window: Sequence[int] | None = None) -> jax.Array:
        """`(H, P, P)` float32 [query, key], for the window given at construction or for another one."""
        window = self.window if window is None else tuple(window)
        table = self.network(jnp.asarray(window_offsets(window, log_spaced=self.log_spaced, extent=self.window)))
        table = table.astype(at_least_float32(table.dtype))
        table = table if self.bound is None else self.bound * jax.nn.sigmoid(table)
        return jnp.moveaxis(table[relative_position_index(window)], -1, 0)


# By offsets in a sequence


@dataclasses.dataclass(frozen=True)
class EachOffset:
    """A row for each offset below `max_length`; those farther share the last on their side.

    Attributes:
      max_length: L, so that there are 2 L - 1 rows, offset 0 in the middle.
    """

    max_length: int

    @property
    def rows(self) -> int:
        return 2 * self.max_length - 1

    def __call__(self, offset: ArrayLike) -> jax.Array:
        most = self.max_length - 1
        return jnp.clip(jnp.asarray(offset, jnp.int32), -most, most) + most


@dataclasses.dataclass(frozen=True)
class T5Buckets:
    """Buckets of offsets (Raffel et al., 2020, arXiv:1910.10683).

    Half of the buckets hold one distance each, the others grow logarithmically up to `max_distance`; beyond it all
    share the last. Bidirectional, the upper half is for keys after the query; else those are in bucket 0.

    Attributes:
      num_buckets: number of buckets, which is that of the rows.
      max_distance: distance from which on the last bucket is taken.
      bidirectional: whether keys after the query are told apart.
    """

    num_buckets: int = 32
    max_distance: int = 128
    bidirectional: bool = True

    @property
    def rows(self) -> int:
        return self.num_buckets

    def __call__(self, offset: ArrayLike) -> jax.Array:
        offset = jnp.asarray(offset, jnp.int32)
        if not self.bidirectional:
            return distance_bucket(jnp.maximum(-offset, 0), self.num_buckets, self.max_distance)
        half = self.num_buckets // 2
        return jnp.where(offset > 0, half, 0) + distance_bucket(jnp.abs(offset), half, self.max_distance)


def distance_bucket(distance: ArrayLike, num_buckets: int, max_distance: int) -> jax.Array:
    """Buckets, int32, of distances: half of them for one distance each, the others logarithmic, see `T5Buckets`."""
    distance = jnp.asarray(distance, jnp.int32)
    exact = num_buckets // 2
    ratio = jnp.log(jnp.maximum(distance, 1).astype(jnp.float32) / exact) / math.log(max_distance / exact)
    far = jnp.minimum(exact + (ratio * (num_buckets - exact)).astype(jnp.int32), num_buckets - 1)
    return jnp.where(distance < exact, distance, far).astype(jnp.int32)


class OffsetTable(nnx.Module):
    """A learned number per head and offset key - query: a bias of scores, or a factor of weights.

    Args:
      num_heads: heads H.
      buckets: offsets to rows of the table, and how many `rows` there are: `EachOffset`, `T5Buckets` or another value.
      init: of the table `(rows, H)`, normal of deviation 0.02 (truncated) unless given.
      param_dtype: of the table.
      rngs: stream `params`.
    """

    def __init__(
        self,
        num_heads: int,
        buckets: Buckets,
        *,
        init: nnx.Initializer = trunc_normal,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.buckets = buckets
        table = init(rngs.params(), (buckets.rows, num_heads), param_dtype)
        self.table = nnx.Param(table, logical_axes=(None, "heads"), weight_decay=False)

    def __call__(self, query_positions: ArrayLike, key_positions: ArrayLike) -> jax.Array:
        """Positions `(N,)` and `(M,)` to `(H, N, M)` float32; `(B|1, N)` and `(B|1, M)` to `(B|1, H, N, M)`."""
        offset = jnp.asarray(key_positions)[..., None, :] - jnp.asarray(query_positions)[..., :, None]
        table = self.table[...]
        table = table.astype(at_least_float32(table.dtype))
        return jnp.moveaxis(table[self.buckets(offset)], -1, -3)


# By products of queries with a vector for each offset


def relative_logits(q: ArrayLike, table: ArrayLike, num_keys: int, *, zero: int) -> jax.Array:
    """q_i · r_{j-i}: scores of queries with a vector for each offset (Shaw et al., 2018, arXiv:1803.02155).

    Made from N (N + M) products, shifted against each other as in Transformer-XL (Dai et al., 2019, arXiv:1901.02860):
    neither vectors nor scores are gathered.

    Args:
      q: queries `(*A, N, H, D)`, with any axes in front.
      table: vectors r, `(R, D)` for all heads or `(R, H, D)`.
      num_keys: M; key 0 is beside query 0.
      zero: row of the table for offset 0, which may be outside of it; row `zero + j - i` is that of query i and key j.

    Returns:
      `(*A, H, N, M)` in float32 (or wider), 0 where the table has no such row.
    """
    q, table = jnp.asarray(q), jnp.asarray(table)
    queries, first = q.shape[-3], zero - (q.shape[-3] - 1)
    wanted = queries + num_keys - 1
    before, after = max(-first, 0), max(first + wanted - table.shape[0], 0)
    rows = table[max(first, 0) : max(first + wanted, 0)]
    rows = jnp.pad(rows, [(min(before, wanted), min(after, wanted)), *[(0, 0)] * (table.ndim - 1)])[:wanted]
    return relative_shift(_by_row(q, rows), num_keys)


def relative_shift(x: ArrayLike, num_keys: int) -> jax.Array:
    """Logits by offset to logits by key: `(…, N, N + M - 1)` to `(…, N, M)`, with y[i, j] = x[i, N - 1 + j - i]."""
    x = jnp.asarray(x)
    *front, queries, width = x.shape
    if width != queries + num_keys - 1:
        raise ValueError(f"{queries} queries and {num_keys} keys have {queries + num_keys - 1} offsets, got {width}")
    if queries == 1:
        return x
    # Row i begins at i · width + N - 1 - i: rows of one entry less, after the first N - 1 entries.
    flat = x.reshape(*front, queries * width)[..., queries - 1 : -1]
    return flat.reshape(*front, queries, width - 1)[..., :num_keys]


def relative_logits_at(
    q: ArrayLike, table: ArrayLike, query_positions: ArrayLike, key_positions: ArrayLike, *, zero: int
) -> jax.Array:
    """`relative_logits` between tokens at given positions, for packed sequences and decoding; gathers.

    Args:
      q: queries `(B, N, H, D)`.
      table: vectors `(R, D)` or `(R, H, D)`.
      query_positions: integers `(B|1, N)`.
      key_positions: integers `(B|1, M)`.
      zero: row of the table for offset 0.

    Returns:
      `(B, H, N, M)` in float32 (or wider), 0 where the table has no such row.
    """
    rows = zero + jnp.atleast_2d(key_positions)[:, None, None, :] - jnp.atleast_2d(query_positions)[:, None, :, None]
    logits = _by_row(jnp.asarray(q), jnp.asarray(table))
    inside = (rows >= 0) & (rows < logits.shape[-1])
    return jnp.where(inside, jnp.take_along_axis(logits, jnp.where(inside, rows, 0), axis=-1), 0)


def _by_row(q: jax.Array, table: jax.Array) -> jax.Array:
    """Products `(*A, H, N, R)` of queries `(*A, N, H, D)` with each row of a table."""
    wide = at_least_float32(q.dtype)
    rows = "rd" if table.ndim == 2 else "rhd"
    return jnp.einsum(f"...nhd,{rows}->...hnr", q, table.astype(q.dtype), preferred_element_type=wide)


# By distance alone


def alibi_slopes(num_heads: int) -> jax.Array:
    """Slopes `(H,)` float32 of ALiBi (Press et al., 2022, arXiv:2108.12409), also the decays of lightning attention.

    2^(-8 (h+1) / H) for a power of two H; otherwise those of the largest power of two P < H, and then the first H - P
    of every other slope of 2P heads.

    Raises:
      ValueError: if `num_heads` is less than 1.
    """
    if num_heads < 1:
        raise ValueError(f"num_heads must be at least 1, got {num_heads}")
    power = 2 ** (int(num_heads).bit_length() - 1)
    slopes = [2.0 ** (-8 * (head + 1) / power) for head in range(power)]
    slopes += [2.0 ** (-8 * (head + 1) / (2 * power)) for head in range(0, 2 * power, 2)][: num_heads - power]
    return jnp.asarray(slopes, jnp.float32)


def alibi_bias(slopes: ArrayLike, query_positions: ArrayLike, key_positions: ArrayLike) -> jax.Array:
    """-slope · |query - key|, float32.

    Args:
      slopes: `(H,)`.
      query_positions: `(N,)`, or `(B, N)`.
      key_positions: `(M,)`, or `(B, M)`.

    Returns:
      `(1, H, N, M)`, or `(B, H, N, M)`.
    """
    query_positions, key_positions = (jnp.atleast_2d(p) for p in (query_positions, key_positions))
    distance = jnp.abs(query_positions[:, None, :, None] - key_positions[:, None, None, :])
    return -jnp.asarray(slopes, jnp.float32)[:, None, None] * distance.astype(jnp.float32)
