"""Universal relative position attention, URPE (Luo et al., 2022, arXiv:2205.13401; code: lsj2408/URPE).

    a_ij = softmax_j(q_i·k_j / √D + r_h[b(j - i)])        r: a learned bias by offset, optional
    y_i = concat_h(Σ_j c_h[b(j - i)] a_ij v_j) W_o        c: a learned factor by offset

Rows of c ∘ a no longer sum to 1: without c, a transformer that knows positions by a bias of scores alone cannot tell
the tokens of a constant sequence apart. Each offset has a row of its tables, or logarithmic buckets share them
(`SignedBuckets`). Cost O(N·M·(D+E)) per head. Recorded weights and those edited at the point `attention` are those
before the factor, dropout comes after it, as in the authors' code. There all layers of an encoder share one pair of
tables; here each mixer has its own.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from attnlab.contract import Layout, Site, View
from attnlab.nn.position_bias import Buckets, EachOffset, OffsetTable, distance_bucket
from attnlab.nn.projected_mixer import ProjectedMixer
from attnlab.nn.softmax import weighted_values
from attnlab.nn.softmax_core import SoftmaxCore
from attnlab.points import Edits
from attnlab.registry import Cost, Paper, Source, register

PAPER = Paper(
    "Your Transformer May Not be as Powerful as You Expect", "Luo et al.", 2022, arxiv="2205.13401", number=28
)


@dataclasses.dataclass(frozen=True)
class SignedBuckets:
    """Logarithmic buckets of offsets, apart for both sides; offset 0 begins those of the keys after the query.

    With n' = num_buckets / 2: distances below n'/2 have a bucket each, the others share the rest up to `max_distance`.
    The rows between the sides are free. The first row is that of the farthest bucket which `max_length` reaches, as
    over there, so that it depends on it.

    Attributes:
      num_buckets: of both sides, even and at least 4; the table has one row more.
      max_distance: distance from which on the last bucket is taken.
      max_length: L of the sequences; keys farther than L - 1 share the row of that offset.

    Raises:
      ValueError: for sizes that leave a side without two buckets, or no distance for the logarithm.
    """

    num_buckets: int = 64
    max_distance: int = 128
    max_length: int = 512

    def __post_init__(self) -> None:
        if self.num_buckets % 2 or self.num_buckets < 4 or self.max_length < 1:
            raise ValueError(f"num_buckets must be even, at least 4, and max_length at least 1, got {self}")
        if self.max_distance <= self.num_buckets // 4:
            raise ValueError(f"max_distance must be above num_buckets / 4, got {self}")

    @property
    def rows(self) -> int:
        return self.num_buckets + 1

    def __call__(self, offset: ArrayLike) -> jax.Array:
        most = self.max_length - 1
        offset = jnp.clip(jnp.asarray(offset, jnp.int32), -most, most)
        return self._signed(offset) - self._signed(jnp.asarray(-most, jnp.int32))

    def _signed(self, offset: jax.Array) -> jax.Array:
        bucket = distance_bucket(jnp.abs(offset), self.num_buckets // 2, self.max_distance)
        return jnp.where(offset < 0, -bucket, bucket + 2)


def universal_attention(weights: ArrayLike, factor: ArrayLike, v: ArrayLike) -> jax.Array:
    """Sums of values by weights times a factor of their offset.

    Args:
      weights: a, `(B, H, N, M)`.
      factor: c, broadcastable to the weights.
      v: values `(B, M, G, E)`, H a multiple of G.

    Returns:
      `(B, N, H, E)` in the dtype of the values.
    """
    return weighted_values(jnp.asarray(weights) * jnp.asarray(factor), jnp.asarray(v))


class UniversalCore(SoftmaxCore):
    """Softmax with a bias and a factor by offset.

    Args:
      num_heads: heads H.
      bias_by: rows of the bias r; none when None.
      factor_by: rows of the factor c; none when None.
      factor_init: initialiser of c, ones as in all of the authors' runs unless given.
      param_dtype: of the tables.
      rngs: streams `params`, and `dropout` if there is any.
      dropout: rate on weights times factor.
    """

    def __init__(
        self,
        num_heads: int,
        bias_by: Buckets | None,
        factor_by: Buckets | None,
        *,
        factor_init: nnx.Initializer = nnx.initializers.ones,
        param_dtype: Any = jnp.float32,
        dropout: float = 0.0,
        rngs: nnx.Rngs,
    ):
        super().__init__(num_heads, dropout=dropout, rngs=rngs)
        self.looks_at_positions, self.permutation_equivariant = True, False
        tables: dict[str, Any] = {"param_dtype": param_dtype, "rngs": rngs}
        self.offset_bias = nnx.data(None) if bias_by is None else OffsetTable(num_heads, bias_by, **tables)
        self.offset_factor = nnx.data(None)
        if factor_by is not None:
            self.offset_factor = OffsetTable(num_heads, factor_by, init=factor_init, **tables)

    def attend(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        view: View,
        *,
        edits: Edits | None = None,
        deterministic: bool = True,
        owner: nnx.Module | None = None,
    ) -> jax.Array:
        if self.offset_factor is None:
            return super().attend(q, k, v, view, edits=edits, deterministic=deterministic, owner=owner)
        weights = self.weights(q, k, view, edits=edits, owner=owner)
        weights = self.edited(edits, owner, "attention", weights, q=q, k=k, v=v, view=view)
        factor = self.offset_factor(jnp.atleast_2d(view.q_at), jnp.atleast_2d(view.k_at))
        if deterministic or self.dropout_rngs is None:
            return universal_attention(weights, factor, v)
        return weighted_values(self.drop(weights * factor, deterministic), v)

    def _bias(self, view: View) -> jax.Array | None:
        if self.offset_bias is None:
            return None
        return self.offset_bias(jnp.atleast_2d(view.q_at), jnp.atleast_2d(view.k_at))


@register(
    "urpe",
    paper=PAPER,
    source=Source.AUTHORS_CODE,
    repository="lsj2408/URPE",
    cost=Cost(time="O(N·M·H·(D+E))", memory="O(N·M·H)", state="M·G·(D+E)"),
    summary="softmax weights times a learned factor of their offset, so that positions reach the result",
    small={"max_length": 32},
)
class UniversalAttention(ProjectedMixer):
    """Sequences to the same shape. See the module docstring for the equations.

    Args:
      features: channels C.
      num_heads: heads H.
      max_length: longest sequence L; farther offsets share the outermost row.
      bias: whether scores have a learned bias by offset.
      factor: whether weights have a learned factor by offset.
      bias_buckets: buckets of the bias; a row for each offset when None.
      bias_distance: distance from which on the last bucket of the bias is taken.
      factor_buckets: buckets of the factor; a row for each offset when None.
      factor_distance: distance from which on the last bucket of the factor is taken.
      constant_factor: whether the factor begins as ones rather than normal of deviation 0.02.
      attention_dropout: rate on weights times factor.
      param_dtype: of the parameters.
      rngs: streams `params`, and `dropout` if there is any.
      **projections: sizes and biases of the projections, pattern: see `ProjectedMixer`.

    Raises:
      ValueError: for sizes that do not fit.
    """

    layouts = frozenset({Layout.SEQUENCE})

    def __init__(
        self,
        features: int,
        *,
        num_heads: int,
        max_length: int = 512,
        bias: bool = True,
        factor: bool = True,
        bias_buckets: int | None = None,
        bias_distance: int = 128,
        factor_buckets: int | None = None,
        factor_distance: int = 128,
        constant_factor: bool = True,
        attention_dropout: float = 0.0,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
        **projections: Any,
    ):
        super().__init__(features, num_heads=num_heads, param_dtype=param_dtype, **projections, rngs=rngs)
        self.set_core(
            UniversalCore(
                num_heads,
                _rows(max_length, bias_buckets, bias_distance) if bias else None,
                _rows(max_length, factor_buckets, factor_distance) if factor else None,
                factor_init=nnx.initializers.ones if constant_factor else nnx.initializers.normal(0.02),
                dropout=attention_dropout,
                param_dtype=param_dtype,
                rngs=rngs,
            )
        )

    @classmethod
    def site_defaults(cls, site: Site) -> dict[str, Any]:
        return {} if site.grid is None else {"max_length": int(np.prod(site.grid)) + site.prefix}


def _rows(max_length: int, num_buckets: int | None, max_distance: int) -> Buckets:
    if max_length < 1:
        raise ValueError(f"max_length must be at least 1, got {max_length}")
    return EachOffset(max_length) if num_buckets is None else SignedBuckets(num_buckets, max_distance, max_length)
