"""InLine: injective linear attention (Han et al., NeurIPS 2024, arXiv:2412.06590).

Linear attention whose scores are normalised by subtraction instead of division. With c = D^-1/2 and k̄, v̄ the means of
keys and values over the N tokens, the score of query i on key j and the result are

    s_ij = (c/N) φ(q_i)·φ(k_j) - (c/N) φ(q_i)·k̄ + 1/N          (Σ_j s_ij = 1, a score may be negative)
    y_i  = Σ_j s_ij v_j = v̄ + (c/N) φ(q_i) Σ_j (φ(k_j) - k̄) v_jᵀ

so a query reads the mean value and the covariance of keys and values. Division would give q and a·q (a > 0) the same
result; subtraction does not: the map from queries to score vectors is injective where the centred keys span. Then a
depthwise 3x3 convolution of the values is added whose kernel depends on the image:

    W = Linear_h(GELU(Linear_h(mean_N x)))    9 taps per channel, weights block-diagonal over the heads
    y = y + W ∗ v                             zero padding

Cost O(N·C·D) time, O(C·D) memory besides the tokens. φ is the identity, or ReLU, leaky ReLU (slope 0.01) or
exp(0.2 x); the last grows without bound, because nothing divides it out again.

The paper's equation 5 leaves out c/N (it can be absorbed in φ(Q)); the authors' code has it, and so has this. Windows
may be shifted, but as in that code nothing masks what the shift wraps around. Its PVT form is only usable without
spatial reduction, its CSwin form only with one stripe that covers the map, so neither option exists here. A causal
form is not defined: k̄, v̄ and N are global.

Reference for names and defaults: LeapLabTHU/InLine.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from attnlab.contract import Layout, TokenMixer, UnsupportedArgument, record
from attnlab.nn.grids import depthwise_conv
from attnlab.nn.linear import Conv, Linear
from attnlab.nn.mlp import gelu
from attnlab.nn.windows import ShiftedWindows
from attnlab.registry import Cost, Paper, Source, register

PAPER = Paper(
    "Bridging the Divide: Reconsidering Softmax and Linear Attention",
    "Han et al.",
    2024,
    arxiv="2412.06590",
    number=1,
)
FEATURE_MAPS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "identity": lambda x: x,
    "relu": jax.nn.relu,
    "leaky_relu": jax.nn.leaky_relu,
    "exp": lambda x: jnp.exp(0.2 * x),
}


def inline_scores(q: jax.Array, k: jax.Array, *, scale: float | None = None) -> jax.Array:
    """The scores s_ij `(B, H, N, N)` of `inline_attention`, in float32; they sum to 1 and may be negative."""
    centred = _centred(k)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = jnp.einsum("bnhd,bmhd->bhnm", q.astype(centred.dtype), centred)
    return (scale * scores + 1) / k.shape[1]


def inline_attention(q: jax.Array, k: jax.Array, v: jax.Array, *, scale: float | None = None) -> jax.Array:
    """Linear attention normalised by subtraction, without the local term.

    Args:
      q: mapped queries φ(q), `(B, N, H, D)`.
      k: mapped keys φ(k), `(B, N, H, D)`.
      v: values, `(B, N, H, E)`.
      scale: c, D^-1/2 when None.

    Returns:
      `(B, N, H, E)` in the dtype of `v`; sums over tokens are float32.

    Raises:
      ValueError: if there are not as many keys as queries; the mechanism is self-attention.
    """
    if q.shape[1] != k.shape[1]:
        raise ValueError(f"inline_attention takes as many keys as queries, got q {q.shape} and k {k.shape}")
    centred = _centred(k)
    wide = centred.dtype
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    covariance = jnp.einsum("bnhd,bnhe->bhde", centred.astype(v.dtype), v, preferred_element_type=wide)
    # The covariance stays wide: XLA on the CPU has no such product of bfloat16 operands with a float32 result.
    y = jnp.einsum("bnhd,bhde->bnhe", q.astype(wide), covariance * (scale / k.shape[1]))
    return (y + v.mean(1, keepdims=True, dtype=wide)).astype(v.dtype)


def _centred(k: jax.Array) -> jax.Array:
    k = k.astype(jnp.promote_types(k.dtype, jnp.float32))
    return k - k.mean(1, keepdims=True)


class InlineCore(nnx.Module):
    """InLine attention between projections: the scores and the convolution whose kernel depends on the image.

    Args:
      features: channels C of queries, keys and values.
      num_heads: H.
      class_token: whether a token without a place on the grid comes first; the convolution leaves it out.
      feature_map: φ, one of `FEATURE_MAPS`.
      dtype: of the computation; that of the input when None.
      param_dtype: of the parameters.
      rngs: stream `params`.

    Raises:
      ValueError: for an unknown feature map, or if the heads do not divide the channels.
    """

    def __init__(
        self,
        features: int,
        *,
        num_heads: int,
        class_token: bool = False,
        feature_map: str = "identity",
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if feature_map not in FEATURE_MAPS:
            raise ValueError(f"feature_map must be one of {', '.join(FEATURE_MAPS)}, got {feature_map!r}")
        if features % num_heads:
            raise ValueError(f"num_heads must divide the {features} channels, got {num_heads}")
        self.num_heads, self.class_token, self.feature_map = num_heads, class_token, feature_map
        grouped = {"feature_group_count": num_heads, "axes": (None, "embed"), "dtype": dtype, "rngs": rngs}
        self.describe = Conv(features, features, (1,), param_dtype=param_dtype, **grouped)
        self.kernels = Conv(features, 9 * features, (1,), param_dtype=param_dtype, **grouped)

    def map(self, q: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
        """φ of queries and keys `(B, N, C)`, split into heads `(B, N, H, D)`."""
        phi = FEATURE_MAPS[self.feature_map]
        return self._heads(phi(q)), self._heads(phi(k))

    def __call__(
        self, q: jax.Array, k: jax.Array, v: jax.Array, descriptor: jax.Array, grid: tuple[int, int]
    ) -> jax.Array:
        """Mixes projected tokens.

        Args:
          q: queries `(B, N, C)`, in row-major order of the grid.
          k: keys `(B, N, C)`.
          v: values `(B, N, C)`.
          descriptor: `(B, C)`, what the kernels are computed from: the mean of the tokens.
          grid: rows and columns of the tokens.

        Returns:
          `(B, N, C)`.
        """
        y = inline_attention(*self.map(q, k), self._heads(v)).reshape(v.shape)
        hidden = gelu(self.describe(descriptor[:, None]))
        kernels = jnp.moveaxis(self.kernels(hidden).reshape(v.shape[0], v.shape[-1], 3, 3), 1, -1)
        first = int(self.class_token)
        local = depthwise_conv(v[:, first:].reshape(v.shape[0], *grid, v.shape[-1]), kernels)
        local = local.reshape(v.shape[0], -1, v.shape[-1])
        return y.at[:, first:].add(local) if first else y + local

    def _heads(self, x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:2], self.num_heads, -1)


@register(
    "inline_attention",
    paper=PAPER,
    source=Source.AUTHORS_CODE,
    repository="LeapLabTHU/InLine",
    cost=Cost(time="O(N·C·D)", memory="O(C·D)"),
    summary="linear attention normalised by subtraction, hence injective, plus a 3x3 convolution with dynamic kernel",
)
class InlineAttention(TokenMixer):
    """InLine attention with its projections, on images or in windows of them.

    Args:
      features: channels C.
      num_heads: H.
      grid: rows and columns of the tokens; needed with a class token only, otherwise read from the image.
      window: rows and columns of the windows that are attended separately, one number for both; the image when None.
      shift: by how much the windows are shifted, cyclically.
      feature_map: φ of queries and keys: `identity`, `relu`, `leaky_relu` or `exp`.
      class_token: tokens are a sequence `(B, 1 + H·W, C)` whose first token has no place on the grid.
      qkv_bias: whether queries, keys and values have a bias.
      projection_dropout: rate on the result.
      dtype: of the computation and the result; that of the input when None.
      param_dtype: of the parameters.
      rngs: streams `params`, and `dropout` if there is any.

    Raises:
      ValueError: for an unknown feature map, or a class token without `grid`.
      UnsupportedArgument: for windows with a class token.
    """

    layouts = frozenset({Layout.IMAGE})
    layout = Layout.IMAGE

    def __init__(
        self,
        features: int,
        *,
        num_heads: int,
        grid: tuple[int, int] | None = None,
        window: int | tuple[int, int] | None = None,
        shift: int | tuple[int, int] = 0,
        feature_map: str = "identity",
        class_token: bool = False,
        qkv_bias: bool = True,
        projection_dropout: float = 0.0,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if class_token and grid is None:
            raise ValueError("InlineAttention needs the grid (rows, columns) of the tokens behind a class token")
        if class_token and window is not None:
            raise UnsupportedArgument(f"InlineAttention has no windows with a class token, got {window=}")
        if window is None and shift != 0:
            raise ValueError(f"InlineAttention shifts windows only, got {shift=} without a window")
        self.features, self.class_token = features, class_token
        self.grid = None if grid is None else tuple(grid)
        self.layout = Layout.SEQUENCE if class_token else Layout.IMAGE
        self.windows = None if window is None else ShiftedWindows(window, shift)
        common = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.query_key_value = Linear(features, 3 * features, use_bias=qkv_bias, axes=("embed", "heads"), **common)
        self.core = InlineCore(
            features, num_heads=num_heads, class_token=class_token, feature_map=feature_map, **common
        )
        self.projection = Linear(features, features, axes=("heads", "embed"), **common)
        self.dropout = nnx.Dropout(projection_dropout, rngs=rngs) if projection_dropout > 0 else nnx.data(None)

    def __call__(
        self,
        x: ArrayLike,
        context: ArrayLike | None = None,
        *,
        mask: ArrayLike | None = None,
        segment_ids: ArrayLike | tuple[ArrayLike, ArrayLike] | None = None,
        positions: ArrayLike | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        self.check_call(x, context=context, mask=mask, segment_ids=segment_ids, positions=positions)
        x = jnp.asarray(x)
        if self.class_token and x.shape[1] != 1 + math.prod(self.grid):
            raise ValueError(f"InlineAttention was built for 1 + {self.grid} tokens, got x of shape {x.shape}")
        tokens = x if self.windows is None else self.windows.partition(x)
        grid = self.grid if self.class_token else tokens.shape[1:3]
        flat = tokens.reshape(tokens.shape[0], -1, self.features)
        q, k, v = jnp.split(self.query_key_value(flat), 3, -1)
        record(self, "attention", lambda: self._map(q, k, x.shape[1:3]))
        mean = flat.mean(1, dtype=jnp.promote_types(flat.dtype, jnp.float32)).astype(flat.dtype)
        y = self.projection(self.core(q, k, v, mean, grid))
        if self.dropout is not None:
            y = self.dropout(y, deterministic=deterministic)
        y = y.reshape(tokens.shape)
        return y if self.windows is None else self.windows.merge(y, x.shape[1:3])

    def _map(self, q: jax.Array, k: jax.Array, grid: tuple[int, int]) -> jax.Array:
        scores = inline_scores(*self.core.map(q, k))
        return scores if self.windows is None else self.windows.scatter_map(scores, grid)
