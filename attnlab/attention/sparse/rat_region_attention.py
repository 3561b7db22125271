"""Attention inside regions, of RAT (Yang et al., MICCAI 2024, arXiv:2407.09268).

Each token has the label of a region, given from outside (by a segmenter), and attends to the tokens of its region,
wherever they stand:

    y_i = Σ_j softmax_j(q_i · k_j / √H) v_j,   j of the label of i;    out = y W_o

The scale is by the number of heads H, not their size: kept from the authors' code, which adds -1000 to the scores of
other regions; here their weights are exactly zero. With a context the keys are its tokens, with labels of their own,
and a token whose label the context lacks reads zeros.

Tokens that are sorted by label make the scores block-diagonal: from `SORTED` tokens on they are, and only blocks with a
common region are computed, Σ n_r² in place of N² for regions of n_r tokens. Any mixer with dense scores does the same
by `View(rule=SameLabel(), q_labels=labels)`, but not sorted.

`paint_regions` makes labels of a segmenter's masks. Code:
Yaziwel/Region-Attention-Transformer-for-Medical-Image-Restoration.
"""

import math
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from attnlab.nn.heads import FromHeads, ToHeads, merge_heads, split_heads
from attnlab.nn.linear import uniform_init
from attnlab.nn.softmax import softmax_attention
from attnlab.nn.token_selection import Order, group_by
from attnlab.registry import Cost, Example, Kind, Paper, Source, register
from pallas_kernels.block_sparse_attention import block_sparse_attention
from pallas_kernels.integers import integers

PAPER = Paper(
    "Region Attention Transformer for Medical Image Restoration", "Yang et al.", 2024, arxiv="2407.09268", number=40
)
REPOSITORY = "Yaziwel/Region-Attention-Transformer-for-Medical-Image-Restoration"
COST = Cost(time="O(Σn²·C)", memory="O(N·C)")
SORTED = 1024
"""Tokens from which on they are sorted by region; below, all scores at once are faster."""


def _rows(x: jax.Array, order: Order) -> jax.Array:
    return split_heads(order.sort(merge_heads(x)), x.shape[-2])


def region_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    labels: ArrayLike,
    k_labels: ArrayLike | None = None,
    *,
    scale: float | None = None,
    in_order: bool | None = None,
) -> jax.Array:
    """Softmax attention of tokens to those of equal label.

    Args:
      q: queries `(B, N, H, D)`.
      k: keys `(B, M, H, D)`.
      v: values `(B, M, H, E)`.
      labels: integers `(B, N)`.
      k_labels: those of the keys `(B, M)`; `labels` when None.
      scale: of the products; 1 / √D when None.
      in_order: whether tokens are sorted by label, and blocks without a common label left out; by their number when
        None.

    Returns:
      `(B, N, H, E)`; zeros for a label that no key has.

    Raises:
      ValueError: for labels of another shape.
    """
    labels = integers("labels", labels)
    k_labels = labels if k_labels is None else integers("k_labels", k_labels)
    for name, ids, tokens in (("labels", labels, q), ("k_labels", k_labels, k)):
        if ids.shape != tokens.shape[:2]:
            raise ValueError(f"{name} must be one for each token {tokens.shape[:2]}, got {ids.shape}")
    in_order = max(q.shape[1], k.shape[1]) >= SORTED if in_order is None else in_order
    if not in_order:
        return cast(jax.Array, softmax_attention(q, k, v, segment_ids=(labels, k_labels), scale=scale))
    order, k_order = group_by(labels), group_by(k_labels)
    ids = jnp.take_along_axis(labels, order.places, 1), jnp.take_along_axis(k_labels, k_order.places, 1)
    y = block_sparse_attention(_rows(q, order), _rows(k, k_order), _rows(v, k_order), segment_ids=ids, scale=scale)
    return split_heads(order.unsort(merge_heads(cast(jax.Array, y))), q.shape[2])


def _labels_example() -> Example:
    masks = np.random.default_rng(0).random((2, 3, 4, 5)) < np.array([0.7, 0.4, 0.2])[:, None, None]
    return Example(paint_regions, (masks,), differentiable=())


@register(
    "rat_region_attention.labels",
    kind=Kind.FUNCTION,
    paper=PAPER,
    source=Source.AUTHORS_CODE,
    repository=REPOSITORY,
    cost=Cost(time="O(N·R)", memory="O(N·R)"),
    summary="labels of regions from a segmenter's masks, the smaller painted over the larger",
    small=_labels_example,
)
def paint_regions(masks: ArrayLike) -> jax.Array:
    """Labels from masks that may overlap and leave gaps.

    Masks are painted one after the other, the largest first, of equal ones the earlier.

    Args:
      masks: `(B, R, *S)` boolean.

    Returns:
      `(B, *S)` int32: 1..R by the order of painting, R + 1 where no mask is.

    Raises:
      ValueError: if masks are not boolean.
    """
    masks = jnp.asarray(masks)
    if masks.dtype != jnp.bool_ or masks.ndim < 3:
        raise ValueError(f"masks must be boolean (B, R, *S), got {masks.dtype} {masks.shape}")
    areas = masks.sum(range(2, masks.ndim), dtype=jnp.int32)
    turn = jnp.argsort(jnp.argsort(-areas, axis=1, stable=True), axis=1).astype(jnp.int32) + 1
    painted = jnp.where(masks, turn.reshape(*turn.shape, *(1,) * (masks.ndim - 2)), 0).max(1)
    return jnp.where(painted == 0, masks.shape[1] + 1, painted).astype(jnp.int32)


def _example() -> Example:
    rng = np.random.default_rng(0)
    x, labels = rng.standard_normal((2, 4, 5, 8)).astype(np.float32), rng.integers(0, 3, (2, 4, 5), np.int32)
    return Example(RegionAttention(8, num_heads=2, rngs=nnx.Rngs(0)), (x, labels), batched=(0, 1))


@register(
    "rat_region_attention",
    kind=Kind.MODULE,
    paper=PAPER,
    source=Source.AUTHORS_CODE,
    repository=REPOSITORY,
    cost=COST,
    kernel="block_sparse_attention",
    summary="softmax attention among the tokens of a region, which is given by labels and need not be connected",
    small=_example,
)
class RegionAttention(nnx.Module):
    """Tokens of any layout `(B, *S, C)` with labels `(B, *S)` to the same shape; see the module docstring.

    Args:
      features: channels C.
      num_heads: heads H.
      context_features: channels of a context whose tokens are read; None for self-attention.
      scale: of the scores; 1 / √H when None.
      use_bias: whether the projections have a bias.
      dtype: of the computation and the result; that of the tokens when None.
      param_dtype: of the parameters.
      rngs: stream `params`.

    Raises:
      ValueError: if heads do not divide the channels.
    """

    def __init__(
        self,
        features: int,
        *,
        num_heads: int,
        context_features: int | None = None,
        scale: float | None = None,
        use_bias: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if features % num_heads:
            raise ValueError(f"num_heads must divide the {features} channels, got {num_heads}")
        self.dtype, self.context_features = dtype, context_features
        self.scale = num_heads**-0.5 if scale is None else scale
        head, source = features // num_heads, features if context_features is None else context_features
        common = {"use_bias": use_bias, "dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.query, self.key, self.value = (
            ToHeads(wide, num_heads, head, kernel_init=uniform_init(wide), bias_init=uniform_init(wide), **common)
            for wide in (features, source, source)
        )
        init = uniform_init(features)
        self.out = FromHeads(num_heads, head, features, kernel_init=init, bias_init=init, **common)

    def __call__(
        self,
        x: ArrayLike,
        labels: ArrayLike,
        context: ArrayLike | None = None,
        context_labels: ArrayLike | None = None,
    ) -> jax.Array:
        """Attends.

        Args:
          x: tokens `(B, *S, C)`.
          labels: integers `(B, *S)`.
          context: `(B, *T, C')` of the channels that the module was built for.
          context_labels: `(B, *T)`.

        Raises:
          ValueError: for labels that do not fit, or a context without labels, or where none was announced.
        """
        x = jnp.asarray(x, self.dtype)
        if (context is None) != (self.context_features is None) or (context is None) != (context_labels is None):
            wanted = "no context" if self.context_features is None else "a context and its labels"
            raise ValueError(f"context: the module was built for {wanted}")
        source = x if context is None else jnp.asarray(context, x.dtype)
        own = self._flat("labels", labels, x)
        other = None if context is None else self._flat("context_labels", context_labels, source)
        tokens, read = (a.reshape(a.shape[0], -1, a.shape[-1]) for a in (x, source))
        q, k, v = self.query(tokens), self.key(read), self.value(read)
        return self.out(region_attention(q, k, v, own, other, scale=self.scale)).reshape(x.shape)

    @staticmethod
    def _flat(name: str, labels: ArrayLike | None, x: jax.Array) -> jax.Array:
        if labels is None or jnp.shape(labels) != x.shape[:-1]:
            came = None if labels is None else jnp.shape(labels)
            raise ValueError(f"{name} must be one for each token {x.shape[:-1]}, got {came}")
        return integers(name, labels).reshape(x.shape[0], math.prod(x.shape[1:-1]))
