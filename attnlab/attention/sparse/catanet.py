"""Attention inside groups of alike tokens, of CATANet (Liu et al., CVPR 2025, arXiv:2503.06896).

Tokens are assigned to M centres m by their cosine, and sorted by centre, stably. The sorted row is cut into groups of g
tokens, which may begin and end anywhere in a centre's run:

    y_i = softmax(q_i Kᵀ / √D) V + softmax(q_i K_mᵀ / √D) V_m

K, V are of the token's own group and the next one, K_m, V_m are projections of the centres: two softmaxes, summed. What
is missing behind the last group is the row mirrored at its end, so that a token may be seen twice; where the authors'
code fails, for g < N < 1.5 g, the mirrored row goes on. The sum goes back to the tokens' places.

Centres are running means. In training they are refined by the batch: each becomes the normalised sum of the unit
tokens that are assigned to it, and one without tokens stays. Gradients pass the last refinement, not the assignments.

Local attention is over square patches that overlap by two tokens, the last one of an axis moved back to the border; the
results are put together by halving each overlap of neighbours, which is their mean but where three patches meet. Code:
EquationWalker/CATANet. Cost O(N·(2g + M)·C).
"""

from collections.abc import Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from attnlab.nn.heads import FromHeads, ToHeads, merge_heads, split_heads
from attnlab.nn.linear import trunc_normal
from attnlab.nn.norms import unit_norm
from attnlab.nn.routing import take_tokens
from attnlab.nn.softmax import softmax_attention
from attnlab.nn.token_selection import order_of
from attnlab.registry import Cost, Example, Kind, Paper, Source, register
from pallas_kernels.dtypes import at_least_float32

PAPER = Paper(
    "CATANet: Efficient Content-Aware Token Aggregation for Lightweight Image Super-Resolution",
    "Liu et al.",
    2025,
    arxiv="2503.06896",
    number=111,
)


# Centres


def assign(x: ArrayLike, centres: ArrayLike) -> jax.Array:
    """The centre that each token is nearest to by cosine: `(B, N, C)` and `(M, C)` to `(B, N)` int32; no gradient."""
    return _nearest(unit_norm(_wide(x)), unit_norm(_wide(centres)))


def refine(x: ArrayLike, centres: ArrayLike) -> jax.Array:
    """Centres moved to the tokens that are assigned to them.

    Args:
      x: tokens `(B, N, C)`; all examples count together.
      centres: `(M, C)`.

    Returns:
      `(M, C)` of length 1, in float32 (or wider); a centre without tokens keeps its direction. Differentiable in `x`.
    """
    x, centres = unit_norm(_wide(x)), unit_norm(_wide(centres))
    member = jax.nn.one_hot(_nearest(x, centres), centres.shape[0], dtype=x.dtype)
    sums = jnp.einsum("bnm,bnc->mc", member, x, precision=jax.lax.Precision.HIGHEST)
    return jnp.where(member.sum((0, 1))[:, None] > 0, unit_norm(sums), centres)


def chunk_means(x: ArrayLike, count: int) -> jax.Array:
    """First centres `(count, C)`: means over batch and chunks of tokens `(B, N, C)` as they stand.

    Behind the last token stand 1 to `count` mirrored ones, as many as make the chunks equal.
    """
    x = _wide(x)
    tokens = x.shape[1]
    index = mirrored(tokens, tokens + count - tokens % count)
    return x[:, index].reshape(x.shape[0], count, -1, x.shape[-1]).mean((0, 2))


def mirrored(tokens: int, length: int) -> np.ndarray:
    """Indices `(length,)` of a row of tokens that is mirrored at its end, again and again."""
    place = np.arange(length) % (2 * tokens)
    return np.where(place < tokens, place, 2 * tokens - 1 - place)


def _nearest(x: jax.Array, centres: jax.Array) -> jax.Array:
    scores = jnp.einsum("bnc,mc->bnm", *map(jax.lax.stop_gradient, (x, centres)), precision=jax.lax.Precision.HIGHEST)
    return jnp.argmax(scores, -1).astype(jnp.int32)


def _wide(x: ArrayLike) -> jax.Array:
    return jnp.asarray(x, at_least_float32(jnp.result_type(x)))


# Groups


def banded_attention(q: jax.Array, k: jax.Array, v: jax.Array, group: int) -> jax.Array:
    """Attention of each group of tokens to itself and the next.

    Args:
      q: `(B, n·g, H, D)`.
      k: `(B, (n+1)·g, H, D)`.
      v: `(B, (n+1)·g, H, E)`.
      group: g.

    Returns:
      `(B, n·g, H, E)`.
    """

    def pairs(a: jax.Array) -> jax.Array:
        blocks = a.reshape(a.shape[0], -1, group, *a.shape[2:])
        return jnp.concatenate([blocks[:, :-1], blocks[:, 1:]], 2).reshape(-1, 2 * group, *a.shape[2:])

    y = cast(jax.Array, softmax_attention(q.reshape(-1, group, *q.shape[2:]), pairs(k), pairs(v)))
    return y.reshape(*q.shape[:-1], v.shape[-1])


def _group_example() -> Example:
    rng = np.random.default_rng(0)
    x, keys, values = (rng.standard_normal(s).astype(np.float32) for s in ((2, 11, 8), (3, 2, 3), (3, 2, 4)))
    places = np.stack([rng.permutation(11) for _ in range(2)]).astype(np.int32)
    module = IntraGroupAttention(8, qk_features=6, num_heads=2, group_size=4, rngs=nnx.Rngs(0))
    return Example(module, (x, places, keys, values), batched=(0, 1), differentiable=(0, 2, 3))


@register(
    "catanet.group",
    kind=Kind.MODULE,
    paper=PAPER,
    source=Source.AUTHORS_CODE,
    repository="EquationWalker/CATANet",
    cost=Cost(time="O(N·(2g+M)·C)", memory="O(N·(2g+M)·H)"),
    summary="attention in groups of a sorted row, each to itself and the next, and to given centres",
    small=_group_example,
)
class IntraGroupAttention(nnx.Module):
    """Attention inside groups of tokens in a given order, and to centres; see the module docstring.

    Args:
      features: channels C.
      qk_features: channels of queries and keys of all heads; C when None.
      num_heads: heads H.
      group_size: tokens g of a group; fewer where there are fewer.
      dtype: of the computation and the result; that of the tokens when None.
      param_dtype: of the parameters.
      rngs: stream `params`.

    Raises:
      ValueError: if heads do not divide the channels, or for an empty group.
    """

    def __init__(
        self,
        features: int,
        *,
        qk_features: int | None = None,
        num_heads: int = 4,
        group_size: int = 128,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        qk_features = features if qk_features is None else qk_features
        if features % num_heads or qk_features % num_heads:
            raise ValueError(f"num_heads must divide {features=} and {qk_features=}, got {num_heads}")
        if group_size < 1:
            raise ValueError(f"group_size must be at least 1, got {group_size}")
        self.num_heads, self.group_size, self.dtype = num_heads, group_size, dtype
        common = {"use_bias": False, "kernel_init": trunc_normal, "dtype": dtype, "param_dtype": param_dtype}
        sizes = (qk_features // num_heads, qk_features // num_heads, features // num_heads)
        self.query, self.key, self.value = (ToHeads(features, num_heads, size, **common, rngs=rngs) for size in sizes)
        self.out = FromHeads(num_heads, features // num_heads, features, **common, rngs=rngs)

    def __call__(self, x: ArrayLike, places: ArrayLike, key_centres: ArrayLike, value_centres: ArrayLike) -> jax.Array:
        """Attends.

        Args:
          x: tokens `(B, N, C)`.
          places: `(B, N)` integers, where each token of the sorted row stands in `x`.
          key_centres: keys of the centres `(M, H, D)`.
          value_centres: their values `(M, H, E)`.

        Returns:
          `(B, N, C)`, tokens as they stood.

        Raises:
          ValueError: if places are not `(B, N)`.
        """
        x = jnp.asarray(x, self.dtype)
        if jnp.shape(places) != x.shape[:2]:
            raise ValueError(f"places must be (B, N) = {x.shape[:2]}, got {jnp.shape(places)}")
        order, tokens = order_of(places), x.shape[1]
        group = min(self.group_size, tokens)
        count = -(-tokens // group)
        row = take_tokens(x, order.places[:, mirrored(tokens, (count + 1) * group)])
        q, k, v = self.query(row[:, : count * group]), self.key(row), self.value(row)
        centres = (jnp.asarray(part, x.dtype) for part in (key_centres, value_centres))
        keys, values = (jnp.broadcast_to(part, (x.shape[0], *part.shape)) for part in centres)
        y = banded_attention(q, k, v, group) + cast(jax.Array, softmax_attention(q, keys, values))
        return self.out(split_heads(order.unsort(merge_heads(y[:, :tokens])), self.num_heads))


# Patches


def cut_patches(x: jax.Array, size: int) -> jax.Array:
    """`(B, H, W, C)` to overlapping patches `(B, rows, columns, h, w, C)`; h, w are the size, or H, W where less."""
    rows, columns = (_patch_places(length, size)[0] for length in x.shape[1:3])
    return x[:, rows][:, :, :, columns].swapaxes(2, 3)


def join_patches(y: jax.Array, grid: Sequence[int], size: int) -> jax.Array:
    """`(B, rows, columns, h, w, C)` to `(B, *grid, C)`, overlaps of neighbours halved; sums in float32 (or wider)."""
    (rows, halves), (columns, other) = (_patch_places(length, size) for length in grid)
    wide = y.astype(at_least_float32(y.dtype)).swapaxes(2, 3)
    z = jnp.zeros((y.shape[0], grid[0], *wide.shape[3:]), wide.dtype).at[:, rows].add(wide)
    z = jnp.zeros((y.shape[0], *grid, y.shape[-1]), wide.dtype).at[:, :, columns].add(z)
    return (z * jnp.asarray(halves[:, None, None] * other[:, None], z.dtype)).astype(y.dtype)


def _patch_places(length: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Along one axis: places `(patches, size)` of the tokens of each patch, and a factor `(length,)` for the sum."""
    size = min(size, length)
    step = max(size - 2, 1)
    starts = range(0, length + step - size, step)
    places = np.minimum(np.array(starts), length - size)[:, None] + np.arange(size)
    factor = np.ones(length)
    for start in starts[1:]:
        factor[min(start, length - size) : start + size - step] /= 2
    return places, factor
