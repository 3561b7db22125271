"""Polyline path masked attention (PPMA, Zhao et al., NeurIPS 2025, arXiv:2506.15940).

Tokens of an image see each other the less, the more decays lie on the polyline from the query along its row to the
key's column, and from there along that column to the key:

    α, β = -exp(a_h) softplus(W x_h + b_h)                            (B, Hh, Ww, H), at most 0; W is that of all heads
    R[i; j, l] = Σ α[i, m] over m between j and l                     along row i
    C[l; i, k] = Σ β[m, l] over m between i and k                     along column l
    M[(i, j), (k, l)] = R[i; j, l] + C[l; i, k]

where a sum begins behind the first token and includes the last; both are cumulative sums, so that M is made of O(N)
numbers. Queries and keys are rotated by their place in row-major order (RetNet's angles, one axis), and

    whole      y = ½ (softmax(S + M) + softmax(S + Mᵀ)) V,    S = D^-1/2 Q Kᵀ
    separable  y = ½ (A_C A_R + A_R A_C) V,    A_R softmax inside rows of S + R, A_C inside columns of S + C

to which a depthwise convolution of V is added, in front of the last map. The separable form is not equal to the whole
one; it costs O(N^1.5 C) time, the other O(N² C).

Reference for names and defaults: zhongchenzhao/PPMA, classification/models/PPMA.py.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from attnlab.contract import Given, Layout, TokenMixer, record
from attnlab.nn.dense_mixer import Heads
from attnlab.nn.depthwise import DepthwiseConv
from attnlab.nn.grids import to_tokens
from attnlab.nn.heads import FromHeads, ToHeads
from attnlab.nn.linear import Linear
from attnlab.nn.rotary import Rotary
from attnlab.nn.softmax import attention_scores, scaled_product, weighted_values
from attnlab.points import visit
from attnlab.registry import Cost, Paper, Source, register
from pallas_kernels.dtypes import at_least_float32

PAPER = Paper(
    "Polyline Path Masked Attention for Vision Transformer", "Zhao et al.", 2025, arxiv="2506.15940", number=4
)


def between(decays: ArrayLike) -> jax.Array:
    """Sums of decays from behind one place to another: `(…, n)` to `(…, n, n)`, symmetric, zero on the diagonal."""
    decays = jnp.asarray(decays)
    sums = jnp.cumsum(decays, -1)
    steps = sums[..., :, None] - sums[..., None, :]
    lower = np.tri(decays.shape[-1], dtype=bool)
    # Not an absolute value: that has no gradient where decays are zero.
    return jnp.where(lower, steps, -steps)


def path_masks(row_decays: ArrayLike, column_decays: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """R `(B, H, Hh, Ww, Ww)` [row, from, to] and C `(B, H, Ww, Hh, Hh)` [column, from, to].

    Args:
      row_decays: α, `(B, Hh, Ww, H)`, which act along rows.
      column_decays: β, of the same shape, which act along columns.
    """
    rows = between(jnp.asarray(row_decays).transpose(0, 3, 1, 2))
    return rows, between(jnp.asarray(column_decays).transpose(0, 3, 2, 1))


def polyline_mask(row_decays: ArrayLike, column_decays: ArrayLike) -> jax.Array:
    """The logarithm M `(B, H, N, N)` of the mask [query, key]; arguments as `path_masks`."""
    rows, columns = path_masks(row_decays, column_decays)
    # [i, j, k, l]: along the query's row i from j to l, along the key's column l from i to k.
    mask = rows[:, :, :, :, None, :] + columns.transpose(0, 1, 3, 4, 2)[:, :, :, None]
    tokens = mask.shape[2] * mask.shape[3]
    return mask.reshape(*mask.shape[:2], tokens, tokens)


def polyline_weights(q: ArrayLike, k: ArrayLike, mask: ArrayLike) -> jax.Array:
    """½ (softmax(S + M) + softmax(S + Mᵀ)), `(B, H, N, N)` in float32 (or wider).

    Args:
      q: queries `(B, N, H, D)`, rotated.
      k: keys `(B, N, H, D)`, rotated.
      mask: M, `(B, H, N, N)`.
    """
    scores = attention_scores(q, k)
    mask = jnp.asarray(mask, scores.dtype)
    return 0.5 * (jax.nn.softmax(scores + mask) + jax.nn.softmax(scores + mask.swapaxes(-1, -2)))


def axial_weights(q: ArrayLike, k: ArrayLike, rows: ArrayLike, columns: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """A_R `(B, H, Hh, Ww, Ww)` [row, query, key] and A_C `(B, H, Ww, Hh, Hh)`, in float32 (or wider).

    Args:
      q: queries `(B, Hh, Ww, H, D)`, rotated.
      k: keys, of the same shape, rotated.
      rows: R, of the shape of A_R.
      columns: C, of the shape of A_C.
    """
    q, k = jnp.asarray(q), jnp.asarray(k)
    scale = q.shape[-1] ** -0.5
    along_rows = scaled_product("bijhd,bilhd->bhijl", q, k, scale)
    along_columns = scaled_product("bijhd,bkjhd->bhjik", q, k, scale)
    first = jax.nn.softmax(along_rows + jnp.asarray(rows, along_rows.dtype))
    return first, jax.nn.softmax(along_columns + jnp.asarray(columns, along_columns.dtype))


def separable_attention(v: ArrayLike, in_rows: ArrayLike, in_columns: ArrayLike) -> jax.Array:
    """½ (A_C A_R + A_R A_C) V: `(B, Hh, Ww, H, E)` in the dtype of the values, of weights as `axial_weights` gives."""
    v = jnp.asarray(v)
    in_rows, in_columns = (jnp.asarray(weights) for weights in (in_rows, in_columns))
    wide = in_rows.dtype

    def rows(values: jax.Array) -> jax.Array:
        return jnp.einsum("bhijl,bilhd->bijhd", in_rows, values, preferred_element_type=wide)

    def columns(values: jax.Array) -> jax.Array:
        return jnp.einsum("bhjik,bkjhd->bijhd", in_columns, values, preferred_element_type=wide)

    values = v.astype(wide)
    return (0.5 * (columns(rows(values)) + rows(columns(values)))).astype(v.dtype)


def separable_map(in_rows: jax.Array, in_columns: jax.Array) -> jax.Array:
    """The map `(B, H, N, N)` by which `separable_attention` mixes values."""
    first = jnp.einsum("bhjik,bhkjl->bhijkl", in_columns, in_rows)
    second = jnp.einsum("bhijl,bhlik->bhijkl", in_rows, in_columns)
    tokens = in_rows.shape[2] * in_rows.shape[3]
    return (0.5 * (first + second)).reshape(*in_rows.shape[:2], tokens, tokens)


class PolylineDecays(nnx.Module):
    """The decays α and β of tokens, in float32.

    Args:
      head_dim: channels D of a head, of which all heads make their decays by one map.
      num_heads: heads H.
      step_range: softplus(b) at the start, log-uniform.
      rate_range: exp(a) at the start, uniform.
      param_dtype: of the parameters.
      rngs: stream `params`.
    """

    def __init__(
        self,
        head_dim: int,
        num_heads: int,
        *,
        step_range: tuple[float, float] = (1e-3, 0.1),
        rate_range: tuple[float, float] = (1.0, 1.1),
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.map = Linear(head_dim, 2, use_bias=False, axes=(None, None), param_dtype=param_dtype, rngs=rngs)
        low, high = (math.log(step) for step in step_range)
        step = jnp.exp(jax.random.uniform(rngs.params(), (num_heads,), jnp.float32, low, high))
        rate = jax.random.uniform(rngs.params(), (num_heads,), jnp.float32, *rate_range)
        # softplus⁻¹(s) = s + log(1 - exp(-s))
        bias = step + jnp.log(-jnp.expm1(-step))
        self.bias = nnx.Param(bias.astype(param_dtype), logical_axes=("heads",), weight_decay=False)
        self.log_rate = nnx.Param(jnp.log(rate).astype(param_dtype), logical_axes=("heads",), weight_decay=False)

    def __call__(self, x: ArrayLike) -> tuple[jax.Array, jax.Array]:
        """Heads `(…, H, D)` to two arrays `(…, H)`."""
        x = jnp.asarray(x)
        wide = at_least_float32(x.dtype)
        steps = jax.nn.softplus(self.map(x.astype(wide)) + self.bias[...].astype(wide)[:, None])
        decays = -jnp.exp(self.log_rate[...].astype(wide))[:, None] * steps
        return decays[..., 0], decays[..., 1]


class PolylineAttention(TokenMixer):
    """Base of both forms: projections, decays, rotary positions and the convolution of the values.

    Args:
      features: channels C.
      num_heads: heads H.
      side: of the convolution's kernel.
      theta: base of the rotary frequencies.
      dtype: of the computation and the result; that of the tokens when None.
      param_dtype: of the parameters.
      rngs: stream `params`.

    Raises:
      ValueError: if the heads do not divide the channels, or have an odd number of channels.
    """

    layouts = frozenset({Layout.IMAGE})
    layout = Layout.IMAGE
    points = frozenset({"qkv", "heads"})

    def __init__(
        self,
        features: int,
        *,
        num_heads: int,
        side: int = 5,
        theta: float = 10000.0,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if features % num_heads:
            raise ValueError(f"num_heads must divide the {features} channels, got {num_heads}")
        self.features, self.num_heads, self.dtype = features, num_heads, dtype
        size = features // num_heads
        self.rotary = Rotary(theta=theta, interleaved=True, inclusive=True)
        self.rotary.check(size, 1)
        common = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.query, self.key, self.value = (ToHeads(features, num_heads, size, **common) for _ in range(3))
        self.decays = PolylineDecays(size, num_heads, param_dtype=param_dtype, rngs=rngs)
        self.local = DepthwiseConv((num_heads, size), (side, side), **common)
        self.out = FromHeads(num_heads, size, features, **common)

    def weights(self, heads: Heads, grid: tuple[int, int]) -> Any:
        """What `attend` mixes values by, of rotated heads `(B, N, H, D)` whose `extra` are the decays."""
        raise NotImplementedError

    def attend(self, weights: Any, v: jax.Array, grid: tuple[int, int]) -> jax.Array:
        """`(B, N, H, D)` of the values."""
        raise NotImplementedError

    def map(self, weights: Any) -> jax.Array:
        """The map `(B, H, N, N)` of the weights."""
        raise NotImplementedError

    def mix(self, x: jax.Array, given: Given) -> jax.Array:
        tokens, grid = to_tokens(x), x.shape[1:3]
        decays = self.decays(x.reshape(*x.shape[:-1], self.num_heads, -1))
        heads = Heads(self.query(tokens), self.key(tokens), self.value(tokens), decays)
        heads = visit(self, given.edits, "qkv", heads)
        at = np.arange(tokens.shape[1])
        weights = self.weights(heads._replace(q=self.rotary(heads.q, at), k=self.rotary(heads.k, at)), grid)
        record(self, "attention", lambda: self.map(weights))
        local = self.local(heads.v.reshape(heads.v.shape[0], *grid, *heads.v.shape[2:])).reshape(heads.v.shape)
        y = visit(self, given.edits, "heads", self.attend(weights, heads.v, grid) + local)
        return self.out(y).reshape(x.shape)


_ENTRY: dict[str, Any] = {
    "paper": PAPER,
    "source": Source.AUTHORS_CODE,
    "repository": "zhongchenzhao/PPMA",
    "small": {"side": 3},
}


@register(
    "ppma",
    **_ENTRY,
    cost=Cost(time="O(N²·C)", memory="O(N²·H)"),
    summary="softmax attention that decays along the polyline from query to key, by learned decays of both axes",
)
class PolylinePathAttention(PolylineAttention):
    """The whole form: images `(B, Hh, Ww, C)` to the same shape. See the module docstring for the equations.

    Args:
      features: channels C.
      num_heads: heads H.
      rngs: stream `params`.
      **options: convolution, positions and dtypes: see `PolylineAttention`.

    Raises:
      ValueError: for sizes that do not fit.
    """

    def __init__(self, features: int, *, num_heads: int, rngs: nnx.Rngs, **options: Any):
        super().__init__(features, num_heads=num_heads, rngs=rngs, **options)

    def weights(self, heads: Heads, grid: tuple[int, int]) -> jax.Array:
        return polyline_weights(heads.q, heads.k, polyline_mask(*heads.extra))

    def attend(self, weights: jax.Array, v: jax.Array, grid: tuple[int, int]) -> jax.Array:
        return weighted_values(weights, v)

    def map(self, weights: jax.Array) -> jax.Array:
        return weights


@register(
    "ppma.chunk",
    **_ENTRY,
    cost=Cost(time="O(N·(Hh+Ww)·C)", memory="O(N·(Hh+Ww)·H)"),
    summary="its separable form: attention inside rows and inside columns, in both orders",
)
class SeparablePolylineAttention(PolylineAttention):
    """The separable form: images `(B, Hh, Ww, C)` to the same shape. See the module docstring for the equations.

    Args:
      features: channels C.
      num_heads: heads H.
      rngs: stream `params`.
      **options: convolution, positions and dtypes: see `PolylineAttention`.

    Raises:
      ValueError: for sizes that do not fit.
    """

    def __init__(self, features: int, *, num_heads: int, rngs: nnx.Rngs, **options: Any):
        super().__init__(features, num_heads=num_heads, rngs=rngs, **options)

    def weights(self, heads: Heads, grid: tuple[int, int]) -> tuple[jax.Array, jax.Array]:
        q, k = (part.reshape(part.shape[0], *grid, *part.shape[2:]) for part in heads[:2])
        return axial_weights(q, k, *path_masks(*heads.extra))

    def attend(self, weights: tuple[jax.Array, jax.Array], v: jax.Array, grid: tuple[int, int]) -> jax.Array:
        return separable_attention(v.reshape(v.shape[0], *grid, *v.shape[2:]), *weights).reshape(v.shape)

    def map(self, weights: tuple[jax.Array, jax.Array]) -> jax.Array:
        return separable_map(*weights)
