"""Merging of similar tokens: token merging, ToMe (Bolya et al., 2023, arXiv:2210.09461), and back.

Some tokens are destinations, the others sources. The sources that are most similar, by cosine, to any destination are
averaged into it: with sizes s, how many tokens each has become,

    y_t = (s_t x_t + Σ_{j merged into t} s_j x_j) / (s_t + Σ_j s_j)

`match_alternate` takes every other token of a sequence as a destination, `match_cells` one in each cell of a grid
(Bolya and Hoffman, 2023, arXiv:2303.17604). How many are merged is static; no gradient flows through the choice.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from attnlab.nn.grids import Lengths, lengths
from pallas_kernels.dtypes import at_least_float32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Merging:
    """Which tokens are merged into which.

    Attributes:
      sources: places of the source tokens of each example, the most similar first, `(B, S)`.
      destinations: places of the destination tokens, `(T,)`.
      nearest: for each source the destination that is most similar, `(B, S)` below T.
      merged: how many sources are merged.
      in_order: whether the sources that remain stand in the order of their places; else by similarity.
    """

    sources: jax.Array
    destinations: jax.Array
    nearest: jax.Array
    merged: int = dataclasses.field(metadata={"static": True})
    in_order: bool = dataclasses.field(default=False, metadata={"static": True})

    def merge(self, x: ArrayLike, sizes: ArrayLike | None = None) -> jax.Array:
        """Means `(B, N - merged, ...)` of tokens `(B, N, ...)` of sizes `(B, N)`, 1 when None; summed in float32.

        The sources that remain come first, then the destinations.
        """
        x = jnp.asarray(x)
        wide = at_least_float32(x.dtype)
        size = jnp.ones(x.shape[:2], wide) if sizes is None else jnp.asarray(sizes, wide)
        weight = size.reshape(*size.shape, *(1,) * (x.ndim - 2))
        total = self._joined(x.astype(wide) * weight) / self._joined(weight)
        mean = total[:, self._remaining().shape[1] :].astype(x.dtype)
        return jnp.concatenate([_rows(x, self._remaining()), mean], 1)

    def sizes(self, sizes: ArrayLike) -> jax.Array:
        """Sizes `(B, N)` of tokens to those of the merged ones, `(B, N - merged)`."""
        return self._joined(jnp.asarray(sizes))

    def unmerge(self, y: ArrayLike) -> jax.Array:
        """Merged tokens `(B, N - merged, ...)` to all of them `(B, N, ...)`, sources as their destinations."""
        y = jnp.asarray(y)
        remaining = self._remaining()
        kept = remaining.shape[1]
        copies = _rows(y[:, kept:], self.nearest[:, : self.merged])
        whole = jnp.concatenate([copies, y], 1)
        places = jnp.broadcast_to(self.destinations, (y.shape[0], self.destinations.shape[0]))
        places = jnp.concatenate([self.sources[:, : self.merged], remaining, places], 1)
        return jnp.zeros_like(whole).at[jnp.arange(y.shape[0])[:, None], places].set(whole)

    def _remaining(self) -> jax.Array:
        rest = self.sources[:, self.merged :]
        return jnp.sort(rest, axis=1) if self.in_order else rest

    def _joined(self, x: jax.Array) -> jax.Array:
        """Sums in the place of the means of `merge`."""
        batch, into = jnp.arange(x.shape[0])[:, None], self.nearest[:, : self.merged]
        total = x[:, self.destinations].at[batch, into].add(_rows(x, self.sources[:, : self.merged]))
        return jnp.concatenate([_rows(x, self._remaining()), total], 1)


def match_alternate(metric: ArrayLike, merged: int, *, protected: int = 0) -> Merging:
    """Every other token of a sequence is a source, from the first on; what remains of them stays in order.

    Args:
      metric: features whose cosine similarity is compared, `(B, N, C)`.
      merged: how many sources to merge; at most all that are not protected.
      protected: tokens in front, such as a class token, that are neither merged nor merged into.

    Raises:
      ValueError: for a count below 0.
    """
    tokens = jnp.shape(metric)[1]
    sources, destinations = np.arange(0, tokens, 2), np.arange(1, tokens, 2)
    if merged < 0 or protected < 0:
        raise ValueError(f"merged and protected must be at least 0, got {merged} and {protected}")
    most = int((sources >= protected).sum()) if (destinations >= protected).any() else 0
    allowed = (sources[:, None] >= protected) & (destinations >= protected)
    return _match(metric, jnp.asarray(sources), jnp.asarray(destinations), min(merged, most), allowed, True)


def match_cells(
    metric: ArrayLike, grid: tuple[int, int], merged: int, *, cell: Lengths = 2, key: jax.Array | None = None
) -> Merging:
    """Of each cell of an image one token is a destination; what does not fill a cell at the end is a source.

    Args:
      metric: features whose cosine similarity is compared, `(B, N, C)`.
      grid: rows and columns of the tokens.
      merged: how many sources to merge; at most all are.
      cell: rows and columns of a cell.
      key: chooses the destination of each cell at random; without it, it is the upper left token.

    Raises:
      ValueError: if the grid does not hold N tokens, or for a count below 0.
    """
    tokens, cell = jnp.shape(metric)[1], lengths(cell, 2, "cell")
    if grid[0] * grid[1] != tokens:
        raise ValueError(f"grid {grid} holds {grid[0] * grid[1]} tokens, got {tokens}")
    if merged < 0:
        raise ValueError(f"merged must be at least 0, got {merged}")
    counts = (grid[0] // cell[0], grid[1] // cell[1])
    corners = (np.arange(counts[0])[:, None] * cell[0] * grid[1] + np.arange(counts[1]) * cell[1]).ravel()
    destinations = jnp.asarray(corners)
    if key is not None:
        inside = jax.random.randint(key, corners.shape, 0, cell[0] * cell[1])
        destinations = destinations + inside // cell[1] * grid[1] + inside % cell[1]
    is_source = jnp.ones(tokens, bool).at[destinations].set(False)
    sources = jnp.nonzero(is_source, size=tokens - len(corners))[0]
    return _match(metric, sources, destinations, min(merged, tokens - len(corners)), None, False)


def _match(
    metric: ArrayLike,
    sources: jax.Array,
    destinations: jax.Array,
    merged: int,
    allowed: np.ndarray | None,
    in_order: bool,
) -> Merging:
    metric = jax.lax.stop_gradient(jnp.asarray(metric))
    metric = metric.astype(at_least_float32(metric.dtype))
    if merged == 0 and not destinations.size:
        places = jnp.broadcast_to(sources, (metric.shape[0], *sources.shape))
        return Merging(places, destinations, jnp.zeros_like(places), 0, in_order)
    length = jnp.linalg.norm(metric, axis=-1, keepdims=True)
    unit = metric / jnp.maximum(length, jnp.finfo(metric.dtype).tiny)
    highest = jax.lax.Precision.HIGHEST
    similarity = jnp.einsum("bsc,btc->bst", unit[:, sources], unit[:, destinations], precision=highest)
    similarity = similarity if allowed is None else jnp.where(allowed, similarity, -jnp.inf)
    order = jnp.argsort(-similarity.max(-1), axis=-1)
    nearest = jnp.take_along_axis(similarity.argmax(-1), order, 1)
    return Merging(sources[order], destinations, nearest, merged, in_order)


def _rows(x: jax.Array, places: jax.Array) -> jax.Array:
    return x[jnp.arange(x.shape[0])[:, None], places]
