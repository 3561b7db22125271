"""Decay inside a chunk, for the TPU kernels of linear attention: its weights, weighted scores, and their gradients.

Three forms with one face. For a group of p heads and a chunk of c tokens, `Decay` has `since_start` exp(G_i),
`until_end` exp(G_end - G_j) and `whole` exp(G_end) over key lanes, `scores` and `scores_backward` for the pairs inside
the chunk, and `gradient` that collects what a decay earns. No exponent is positive, and every term of a gradient
carries the decay that it belongs to: none is a difference of sums without it.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.tpu.calls import WIDE, product
from pallas_kernels.tpu.lanes import fold, rows_and_lanes, spread, spread_scalars, stack, sums


@dataclasses.dataclass(frozen=True)
class Tile:
    """Sizes of a chunk of one group: heads p, key size D, tokens c, and the dtype of the operands of products."""

    pack: int
    size: int
    chunk: int
    dtype: Any

    def pairs(self) -> tuple[jax.Array, jax.Array]:
        """Tokens i and j of a pair, each (c, p·c), heads side by side."""
        i, lane = rows_and_lanes((self.chunk, self.pack * self.chunk))
        return i, lane & (self.chunk - 1)

    def causal(self) -> jax.Array:
        """Where i ≥ j, (c, p·c)."""
        i, j = self.pairs()
        return i >= j

    def first_lanes(self, values: list[jax.Array]) -> jax.Array:
        """Values (1, 1) of the heads in the first of their key lanes, (1, p·D)."""
        lane = lax.broadcasted_iota(jnp.int32, (1, self.pack * self.size), 1)
        return jnp.where(lane & (self.size - 1) == 0, spread(values, self.size), 0)


class NoDecay:
    """Every weight is 1."""

    since_start = until_end = whole = 1.0

    def __init__(self, tile: Tile):
        self.tile, self.between = tile, None

    def scores(self, q: jax.Array, k: jax.Array) -> jax.Array:
        """Weighted scores (c, p·c) of q and k (c, p·D), zero where i < j."""
        tile = self.tile
        scores = product(tile.dtype, q, stack(k, tile.pack, tile.size), "nt")
        return jnp.where(tile.causal(), scores, 0) if self.between is None else scores * self.between

    def scores_backward(self, q, k, scores, dscores):
        """Gradients of q and k through the scores, and what `gradient` needs of them."""
        del scores
        tile = self.tile
        raw = jnp.where(tile.causal(), dscores, 0) if self.between is None else dscores * self.between
        dq = product(tile.dtype, raw, stack(k, tile.pack, tile.size), "nn")
        dk = fold(product(tile.dtype, raw, q, "tn"), tile.pack, tile.size)
        return dq, dk, None


class Tables(NamedTuple):
    """Weights of decays per head, float32.

    Attributes:
      between: between two tokens, (c, p·c), zero where i < j.
      since_start: from before the chunk to a token, (c, p·D).
      until_end: from a token to the end of the chunk, (c, p·D).
    """

    between: jax.Array
    since_start: jax.Array
    until_end: jax.Array


def _ages(tile: Tile, valid: jax.Array | int) -> tuple[jax.Array, jax.Array]:
    """How many decays act on a token from the start of its chunk, and until the end, (c, 1)."""
    place = lax.broadcasted_iota(jnp.int32, (tile.chunk, 1), 0)
    return (place + 1).astype(WIDE), jnp.maximum(valid - 1 - place, 0).astype(WIDE)


class HeadDecay(NoDecay):
    """A decay per head: exponents are multiples of it.

    Args:
      tile: sizes.
      decays: log decays, a scalar per head.
      valid: tokens of the chunk that exist; c but for the last one.
      tables: what `tables` gave for these decays.
    """

    def __init__(self, tile: Tile, decays: list[jax.Array], valid: jax.Array | int, tables: Tables):
        super().__init__(tile)
        self.between, self.since_start, self.until_end = tables
        decay = spread_scalars(decays, tile.size)
        self.valid = valid if isinstance(valid, int) else valid.astype(WIDE)
        self.age, self.rest = _ages(tile, valid)
        if not isinstance(valid, int):
            self.until_end = jnp.exp(self.rest * decay)
        self.whole = jnp.exp(self.valid * decay)

    @staticmethod
    def tables(tile: Tile, decays: list[jax.Array]) -> Tables:
        """Exponentials that are the same in every chunk of `tile.chunk` tokens."""
        i, j = tile.pairs()
        apart = jnp.maximum(i - j, 0).astype(WIDE)
        between = jnp.where(i >= j, jnp.exp(apart * spread_scalars(decays, tile.chunk)), 0)
        decay = jnp.broadcast_to(spread_scalars(decays, tile.size), (1, tile.pack * tile.size))
        age, rest = _ages(tile, tile.chunk)
        return Tables(between, jnp.exp(age * decay), jnp.exp(rest * decay))

    def scores_backward(self, q, k, scores, dscores):
        """As in `NoDecay`; the third result is Σ_ij (i - j) scores dscores, (1, 1) per head."""
        dq, dk, _ = super().scores_backward(q, k, scores, dscores)
        i, j = self.tile.pairs()
        total = jnp.sum(scores * dscores * (i - j).astype(WIDE), axis=0, keepdims=True)
        return dq, dk, sums(total, self.tile.pack, self.tile.chunk)

    def gradient(self, earned, since_start, until_end, whole) -> jax.Array:
        """Gradient summed over the chunk, spread anyhow over the key lanes of a head, (1, p·D).

        Args:
          earned: the third result of `scores_backward`.
          since_start: exp(G) times its cotangent, (c, p·D).
          until_end: exp(G_end - G) times its cotangent, (c, p·D).
          whole: exp(G_end) times its cotangent, (1, p·D).
        """
        tokens = jnp.sum(since_start * self.age + until_end * self.rest, axis=0, keepdims=True)
        return tokens + whole * self.valid + self.tile.first_lanes(earned)


class TokenDecay(NoDecay):
    """A decay per token.

    Args:
      tile: sizes.
      totals: log decays cumulated in the chunk, p of (1, c) per part; wide inputs have two parts, the second of which
        holds what the first, made of exact sums, leaves over.
    """

    def __init__(self, tile: Tile, totals: list[list[jax.Array]]):
        super().__init__(tile)
        i, j = tile.pairs()
        exponent = since_start = until_end = 0.0
        for part in totals:
            row = part[0] if tile.pack == 1 else jnp.concatenate(part, axis=1)
            columns = sums(jnp.where(i == j, row, 0), tile.pack, tile.chunk)  # a row turned into columns
            exponent += spread(columns, tile.chunk) - row
            since_start += spread(columns, tile.size)
            until_end += spread([x[-1:] - x for x in columns], tile.size)
        decayed = jnp.exp(jnp.minimum(exponent, 0))  # rounding may leave +1e-9
        self.between = jnp.where(i >= j, decayed, 0.0)
        self.since_start = jnp.exp(jnp.minimum(since_start, 0))
        self.until_end = jnp.exp(jnp.minimum(until_end, 0))
        self.whole = self.since_start[-1:]

    def scores_backward(self, q, k, scores, dscores):
        """As in `NoDecay`; the third result is Σ_{j<t} scores dscores, (c, p·c): lane t, row i, of each head."""
        dq, dk, _ = super().scores_backward(q, k, scores, dscores)
        tile, size = self.tile, self.tile.chunk
        i, j = tile.pairs()
        log = jnp.where(i > j, scores * dscores, 0)
        row, column = rows_and_lanes((size, size))
        before = jnp.where(row < column, 1.0, 0.0)
        parts = [product(tile.dtype, log[:, a * size : (a + 1) * size], before, "nn") for a in range(tile.pack)]
        return dq, dk, parts

    def gradient(self, earned, since_start, until_end, whole) -> list[jax.Array]:
        """Gradient of each token's decay, p of (1, c).

        dg_t = Σ_{i≥t} (Σ_{j<t} scores dscores + since_start) + Σ_{i<t} until_end + whole; arguments as in `HeadDecay`.
        """
        tile = self.tile
        i, t = rows_and_lanes((tile.chunk, tile.chunk))
        columns = [sums(x, tile.pack, tile.size) for x in (since_start, until_end, whole)]
        return [
            jnp.sum(jnp.where(i >= t, log + since, until), axis=0, keepdims=True) + end
            for log, since, until, end in zip(earned, *columns, strict=True)
        ]


class ChannelDecay:
    """A decay per token and key channel: the chunk is halved again and again, as in `xla._channel_scores`.

    Two tokens i > j part at one level, on either side of a border; their decay is that of i since the border times that
    of j until the border. With the tokens in blocks of `half`, P sums the decays of a block up to a token, T those
    behind it, Z all of them; doubling the block adds the neighbour's Z to P on its right and to T on its left.

    Args:
      tile: sizes.
      g: log decays, (c, p·D).
    """

    def __init__(self, tile: Tile, g: jax.Array):
        self.tile = tile
        upto, behind, whole = g, jnp.zeros_like(g), g
        self.levels = []
        for half in self._halves():
            right = self._right(half, g.shape)
            self.levels.append(jnp.exp(jnp.where(right, upto, behind)))
            neighbour = self._swap(whole, half)
            upto = upto + jnp.where(right, neighbour, 0)
            behind = behind + jnp.where(right, 0, neighbour)
            whole = whole + neighbour
        self.since_start, self.until_end, self.whole = jnp.exp(upto), jnp.exp(behind), jnp.exp(whole[:1])

    def scores(self, q: jax.Array, k: jax.Array) -> jax.Array:
        """As `NoDecay.scores`."""
        i, j = self.tile.pairs()
        scores = jnp.where(i == j, self._product(q, k), 0)
        for half, weight in zip(self._halves(), self.levels, strict=True):
            scores = jnp.where(self._parts(half), self._product(q * weight, k * weight), scores)
        return scores

    def scores_backward(self, q, k, scores, dscores):
        """As in `NoDecay`; the third result has the gradients of the exponents of each level, (c, p·D)."""
        del scores
        tile = self.tile
        i, j = tile.pairs()
        dq, dk = self._backward(jnp.where(i == j, dscores, 0), q, k)
        earned = []
        for half, weight in zip(self._halves(), self.levels, strict=True):
            q_level, k_level = q * weight, k * weight
            dq_level, dk_level = self._backward(jnp.where(self._parts(half), dscores, 0), q_level, k_level)
            dq, dk = dq + dq_level * weight, dk + dk_level * weight
            earned.append(dq_level * q_level + dk_level * k_level)
        return dq, dk, earned

    def gradient(self, earned, since_start, until_end, whole) -> jax.Array:
        """Gradient of each decay, (c, p·D): the sums of the constructor in reverse. Arguments as in `HeadDecay`."""
        dupto, dbehind = since_start, until_end
        row, _ = rows_and_lanes(since_start.shape)
        dwhole = jnp.where(row == 0, whole, 0)
        for half, dlevel in zip(reversed(self._halves()), reversed(earned), strict=True):
            right = self._right(half, dlevel.shape)
            dneighbour = dwhole + jnp.where(right, dupto, dbehind)
            dwhole = dwhole + self._swap(dneighbour, half)
            dupto = dupto + jnp.where(right, dlevel, 0)
            dbehind = dbehind + jnp.where(right, 0, dlevel)
        return dupto + dwhole

    def _halves(self) -> list[int]:
        return [2**level for level in range(self.tile.chunk.bit_length() - 1)]

    def _right(self, half: int, shape: tuple[int, int]) -> jax.Array:
        return rows_and_lanes(shape)[0] & half != 0

    def _parts(self, half: int) -> jax.Array:
        """Where i and j part at the level of `half`."""
        i, j = self.tile.pairs()
        return ((i ^ j) >> (half.bit_length() - 1) == 1) & (i & half != 0)

    def _swap(self, x: jax.Array, half: int) -> jax.Array:
        """Rows of the neighbouring block of `half`: row i of the result is row i xor half."""
        return jnp.where(self._right(half, x.shape), pltpu.roll(x, half, 0), pltpu.roll(x, x.shape[0] - half, 0))

    def _product(self, q: jax.Array, k: jax.Array) -> jax.Array:
        tile = self.tile
        return product(tile.dtype, q.astype(tile.dtype), stack(k.astype(tile.dtype), tile.pack, tile.size), "nt")

    def _backward(self, dscores: jax.Array, q: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
        tile = self.tile
        dq = product(tile.dtype, dscores, stack(k.astype(tile.dtype), tile.pack, tile.size), "nn")
        return dq, fold(product(tile.dtype, dscores, q.astype(tile.dtype), "tn"), tile.pack, tile.size)


Decay = NoDecay | HeadDecay | TokenDecay | ChannelDecay
