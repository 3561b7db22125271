"""The normal form of the arguments of block-sparse attention, which every implementation reads.

All that is added to scores or masks them is an array of five axes (B, G, R, N, M), R = H / G, each whole or 1; in a
table the last axis is looked up by another number of the key than its index.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.block_sparse_attention.blocks import Blocks
from pallas_kernels.dtypes import at_least_float32
from pallas_kernels.masks import Full, Mask

FLOATS = ("float16", "bfloat16", "float32", "float64")


@dataclasses.dataclass(frozen=True, eq=False)
class Indexed:
    """An array that a `score_mod` reads, and how: a TPU looks nothing up freely.

    Attributes:
      array: its axes in the order of `axes`.
      axes: names of its axes, in this order and each at most once: `b` batch; `h` head, or `g` group; `i` query; and
        `j` key, or an axis that is looked up by `j//c`, by `j%c` (c a number), or by `id[j]`. Examples: "h" a slope per
        head, "b i" a value per query, "h i j//16" a row table of key groups.
      ids: integers (B|1, M) for `id[j]`.
    """

    array: jax.Array
    axes: str
    ids: jax.Array | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class ScoreMod:
    """A change of scores, elementwise: score ← function(score, b, h, i, j, *values).

    Attributes:
      function: a traced JAX function of the score (float32), the indices of batch, head, query and key (int32), and a
        value of each array, all of which broadcast; compared by identity.
      arrays: each an `Indexed`; floating ones get gradients.
    """

    function: Callable[..., jax.Array]
    arrays: tuple[Indexed, ...] = ()


class Extras(NamedTuple):
    """Arrays (B|1, G|1, R|1, N|1, M|1) beside q, k, v; in those that end with `tables` the last axis is S.

    Attributes:
      bias: added to the scores, or None.
      mods: of the score modification, each here or in `mod_tables`, and None in the other.
      mod_tables: likewise.
      mod_ids: where each key looks a table up, (B|1, 1, 1, 1, M) int32; None for what is no table.
      queries: of each place of the mask, the values of queries.
      keys: likewise of keys.
      tables: of each place, the choices of rows, or None.
      groups: of each place, the group of each key, or None.
      query_ids: segments of queries (B, 1, 1, N, 1), or None.
      key_ids: of keys (B, 1, 1, 1, M), or None.
      scale: a scalar as (1, 1, 1, 1, 1), or None where it is known when tracing.
    """

    bias: jax.Array | None = None
    mods: tuple[jax.Array | None, ...] = ()
    mod_tables: tuple[jax.Array | None, ...] = ()
    mod_ids: tuple[jax.Array | None, ...] = ()
    queries: tuple[tuple[jax.Array, ...], ...] = ()
    keys: tuple[tuple[jax.Array, ...], ...] = ()
    tables: tuple[jax.Array | None, ...] = ()
    groups: tuple[jax.Array | None, ...] = ()
    query_ids: jax.Array | None = None
    key_ids: jax.Array | None = None
    scale: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class Rules:
    """What is known of scores and masks when tracing.

    Attributes:
      mask: with a place for each mask that has arrays.
      scale: None where it is an array.
      softcap: or None.
      function: of the score modification, or None.
    """

    mask: Mask = dataclasses.field(default_factory=Full)
    scale: float | None = 1.0
    softcap: float | None = None
    function: Callable[..., Any] | None = None


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Checked arguments in one form.

    Attributes:
      q: (B, N, H, D), float.
      k: (B, M, G, D), dtype of q; query head h reads key head h // (H / G).
      v: (B, M, G, E), dtype of q.
      extras: what else is added or masks.
      blocks: lists of key blocks, or None for all that the mask does not rule out.
      rules: what is static.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    extras: Extras
    blocks: Blocks | None
    rules: Rules

    @property
    def accumulator(self) -> jnp.dtype:
        """Dtype of scores and sums: float64 for float64 inputs, float32 otherwise."""
        return at_least_float32(self.q.dtype)

    @property
    def precision(self) -> jax.lax.Precision:
        """Half-precision inputs are exact in one pass of a matrix unit; wider ones need all passes."""
        return jax.lax.Precision.DEFAULT if self.q.dtype.itemsize <= 2 else jax.lax.Precision.HIGHEST


# Arrays are leaves, so Arguments can cross jit, grad and vmap; what remains is static.
jax.tree_util.register_dataclass(Arguments, data_fields=["q", "k", "v", "extras", "blocks"], meta_fields=["rules"])
