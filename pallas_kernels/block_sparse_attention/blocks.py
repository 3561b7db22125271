"""Blocks that are chosen at run time: for each block of queries a list of blocks of keys, with a count."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


@dataclasses.dataclass(frozen=True, eq=False)
class Blocks:
    """Lists of key blocks, made inside `jit` from routing scores; the cost of attention follows the counts.

    The last block of an axis is shorter where the block size does not divide the length.

    Attributes:
      indices: (B|1, H|G|1, blocks of queries, W) int32, ascending and without repeats up to the count.
      counts: (B|1, H|G|1, blocks of queries) int32, at most W.
      block_q: queries of a block.
      block_k: keys of a block.
    """

    indices: jax.Array
    counts: jax.Array
    block_q: int
    block_k: int

    @classmethod
    def from_booleans(cls, visible: ArrayLike, block_q: int, block_k: int) -> "Blocks":
        """From booleans (B|1, H|G|1, blocks of queries, blocks of keys), such as scores above a threshold.

        Raises:
          ValueError: for another rank.
          TypeError: for another dtype.
        """
        visible = jnp.asarray(visible)
        if visible.dtype != bool:
            raise TypeError(f"visible must be boolean, got {visible.dtype.name}")
        if visible.ndim != 4:
            raise ValueError(
                f"visible must be (B|1, H|G|1, blocks of queries, blocks of keys), got shape {visible.shape}"
            )
        indices = jnp.argsort(~visible, axis=-1, stable=True).astype(jnp.int32)
        return cls(indices, visible.sum(-1, dtype=jnp.int32), block_q, block_k)

    @classmethod
    def from_indices(
        cls, indices: ArrayLike, block_q: int, block_k: int, *, valid: ArrayLike | None = None
    ) -> "Blocks":
        """From indices (B|1, H|G|1, blocks of queries, W) in any order, such as those of `jax.lax.top_k`.

        Repeats count once, and so do negative ones not at all.

        Args:
          indices: of key blocks, integers.
          block_q: queries of a block.
          block_k: keys of a block.
          valid: booleans that broadcast to the indices: which of them count; all when None.

        Raises:
          ValueError: for another rank.
          TypeError: for another dtype.
        """
        indices = jnp.asarray(indices)
        if not jnp.issubdtype(indices.dtype, jnp.integer):
            raise TypeError(f"indices must be integers, got {indices.dtype.name}")
        if indices.ndim != 4:
            raise ValueError(f"indices must be (B|1, H|G|1, blocks of queries, W), got shape {indices.shape}")
        last = jnp.iinfo(jnp.int32).max
        kept = indices >= 0 if valid is None else (indices >= 0) & valid
        indices = jnp.sort(jnp.where(kept, indices, last).astype(jnp.int32), axis=-1)
        repeats = jnp.pad(indices[..., 1:] == indices[..., :-1], ((0, 0),) * 3 + ((1, 0),))
        indices = jnp.sort(jnp.where(repeats, last, indices), axis=-1)
        counts = (indices != last).sum(-1, dtype=jnp.int32)
        return cls(jnp.where(indices == last, 0, indices), counts, block_q, block_k)


jax.tree_util.register_dataclass(Blocks, data_fields=["indices", "counts"], meta_fields=["block_q", "block_k"])
