"""Neighborhood attention (Hassani et al., 2024, arXiv:2403.04690; code: SHI-Labs/NATTEN).

Softmax attention of each token over its neighborhood, a box of Π k_a tokens around it, on a sequence, an image or a
video:

    q, k, v = x W_q, x W_k, x W_v
    s_ij = q_i·k_j / √D + rpb[(j - i) / d],  j in N(i);   y_i = Σ_j softmax_j(s_ij) v_j;   y W_o

At a border the box is shifted inwards, never cut, so that every token sees as many. With a dilation d the tokens of a
box are d apart (arXiv:2209.15001); with a stride s, s tokens share a box (arXiv:2504.16922), and s = k gives windows
that do not overlap. Along a causal axis the box ends at the token. `pallas_kernels.neighborhood_attention` holds the
definition. The relative position bias rpb is that of the first versions of the code (arXiv:2204.07143).

Cost O(N·Πk·C) time, O(N·C) memory; a causal sequence decodes with the last (k - 1)·d keys and values.

Reference for names and defaults: SHI-Labs/NATTEN, `modules.py` of 0.21 and of 0.17 (rpb).
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from attnlab.contract import Given, Layout, Pattern, Site, TokenMixer, UnsupportedArgument, View, record
from attnlab.nn.dense_mixer import Heads
from attnlab.nn.grids import to_tokens
from attnlab.nn.heads import FromHeads, ToHeads
from attnlab.nn.linear import trunc_normal
from attnlab.nn.softmax import softmax_attention
from attnlab.points import Edits, visit
from attnlab.registry import Cost, Paper, Source, register
from pallas_kernels.neighborhood_attention import (
    neighborhood_attention,
    neighborhood_attention_weights,
    neighborhood_mask,
)


class NeighborhoodState(NamedTuple):
    """Decode state: the last tokens, the newest at the end; those never seen are zeros.

    Attributes:
      keys: `(B, (k - 1)·d, H, D)`.
      values: `(B, (k - 1)·d, H, D)`.
      length: `(B,)` int32, tokens seen so far.
    """

    keys: jax.Array
    values: jax.Array
    length: jax.Array


@register(
    "neighborhood_attention",
    paper=Paper(
        "Faster Neighborhood Attention: Reducing the O(n^2) Cost of Self Attention at the Threadblock Level",
        "Hassani et al.",
        2024,
        arxiv="2403.04690",
        number=36,
    ),
    source=Source.AUTHORS_CODE,
    repository="SHI-Labs/NATTEN",
    cost=Cost(time="O(N·Πk·C)", memory="O(N·C)", state="k·d·C"),
    kernel="neighborhood_attention",
    summary="softmax attention over a sliding box around each token, with dilation, stride and causal axes",
)
class NeighborhoodAttention(TokenMixer):
    """Neighborhood attention with its projections, on a sequence, an image or a video.

    Args:
      features: channels C.
      num_heads: H.
      kernel_size: k, tokens of the box, one number or one per axis; k·d is at most the length of the axis. A causal
        sequence without stride may be shorter: its tokens then see all before them.
      stride: s, one number or one per axis, at most k.
      dilation: d, one number or one per axis.
      causal: whether a token sees no later one, or one flag per axis (a video causal in time alone: True, False,
        False).
      layout: of the tokens.
      grid: lengths of the axes, if the model fixes them; options are then checked at once.
      scale: of the scores, D^-1/2 when None.
      qkv_bias: whether queries, keys and values have a bias.
      relative_bias: whether scores have the learned bias of offsets: odd k, no stride, not causal.
      projection_dropout: rate on the result.
      dtype: of the computation and the result; that of the input when None.
      param_dtype: of the parameters.
      rngs: streams `params`, and `dropout` if there is any.

    Raises:
      ValueError: if the heads do not divide the channels, or for sizes of the box that have no meaning.
      TypeError: for sizes that are not integers or flags that are not booleans.
    """

    points = frozenset({"qkv", "heads"})
    patterns = frozenset({Pattern.SELF, Pattern.CAUSAL_SELF})
    layouts = frozenset({Layout.SEQUENCE, Layout.IMAGE, Layout.VIDEO})

    def __init__(
        self,
        features: int,
        *,
        num_heads: int,
        kernel_size: int | Sequence[int] = 7,
        stride: int | Sequence[int] = 1,
        dilation: int | Sequence[int] = 1,
        causal: bool | Sequence[bool] = False,
        layout: Layout = Layout.IMAGE,
        grid: tuple[int, ...] | None = None,
        scale: float | None = None,
        qkv_bias: bool = True,
        relative_bias: bool = False,
        projection_dropout: float = 0.0,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if features % num_heads:
            raise ValueError(f"num_heads must divide the {features} channels, got {num_heads}")
        size = features // num_heads
        self.features, self.num_heads, self.scale, self.dtype = features, num_heads, scale, dtype
        self.layout = Layout(layout)
        # The smallest grid that the box fits into says what each axis has, and checks it.
        options = {"stride": stride, "dilation": dilation, "is_causal": causal}
        least = _least_grid(self.layout, kernel_size, dilation)
        windows = neighborhood_mask(least, kernel_size, **options).masks
        self.kernel_size, self.stride, self.dilation, self.is_causal = (
            tuple(getattr(window, name) for window in windows)
            for name in ("kernel_size", "stride", "dilation", "is_causal")
        )
        self.causal = self.layout is Layout.SEQUENCE and self.is_causal[0]
        if grid is not None and not self._may_be_short():
            neighborhood_mask(grid, kernel_size, **options)
        if relative_bias and (any(self.is_causal) or max(self.stride) > 1 or any(k % 2 == 0 for k in self.kernel_size)):
            raise ValueError(
                f"relative_bias needs odd kernel_size, stride 1 and no causal axis, got kernel_size "
                f"{self.kernel_size}, stride {self.stride}, causal {self.is_causal}"
            )
        common = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.query, self.key, self.value = (
            ToHeads(features, num_heads, size, use_bias=qkv_bias, **common) for _ in range(3)
        )
        self.out = FromHeads(num_heads, size, features, **common)
        self.bias = nnx.data(None)
        if relative_bias:
            shape = (num_heads, *(2 * k - 1 for k in self.kernel_size))
            table = trunc_normal(rngs.params(), shape, param_dtype)
            self.bias = nnx.Param(table, logical_axes=("heads", *(None,) * len(self.kernel_size)))
        self.dropout = nnx.Dropout(projection_dropout, rngs=rngs) if projection_dropout > 0 else nnx.data(None)

    @classmethod
    def check_site(cls, site: Site) -> None:
        super().check_site(site)
        if site.causal and site.layout is not Layout.SEQUENCE:
            raise UnsupportedArgument(
                f"{cls.__name__} is causal on sequences alone, not on the layout {site.layout}; "
                f"its option causal=(True, False, …) makes single axes causal"
            )

    @classmethod
    def site_defaults(cls, site: Site) -> dict[str, Any]:
        """Boxes that fit the grid: per axis the largest odd number up to 7, or 2 tokens of 2."""
        if site.grid is None or site.causal:
            return {}
        return {"kernel_size": tuple(n if n < 3 else min(7, n - 1 + n % 2) for n in site.grid)}

    def mix(self, x: jax.Array, given: Given) -> jax.Array:
        grid = x.shape[1:-1]
        q, k, v = self._padded(*self._project(x, given.edits))
        record(self, "attention", lambda: self._map(q, k, grid))
        y = neighborhood_attention(q, k, v, **self._options())[:, : grid[0]]
        return self._merge(y, x.shape, given.edits, given.deterministic)

    def init_state(self, batch_size: int, max_length: int | None = None, *, dtype: Any = None) -> NeighborhoodState:
        """No tokens yet; the size of the state does not depend on `max_length`.

        Raises:
          UnsupportedArgument: if the mixer is not causal, or has a stride: the window of its last run of tokens would
            depend on the tokens still to come.
        """
        self._check_decodes()
        shape = (batch_size, self._past, self.num_heads, self.features // self.num_heads)
        zeros = jnp.zeros(shape, jnp.float32 if dtype is None else dtype)
        return NeighborhoodState(zeros, zeros, jnp.zeros((batch_size,), jnp.int32))

    def prefill(
        self,
        x: ArrayLike,
        state: NeighborhoodState,
        *,
        mask: ArrayLike | View | None = None,
        positions: ArrayLike | None = None,
        edits: Edits | None = None,
    ) -> tuple[jax.Array, NeighborhoodState]:
        self._check_decodes()
        self.check_call(x, mask=mask, positions=positions, decoding=True)
        x = jnp.asarray(x, self.dtype)
        mask = mask.mask if isinstance(mask, View) else mask
        count, past = x.shape[1], self._past
        q, k, v = self._project(x, edits)
        if mask is None:
            order, real = None, jnp.full(x.shape[:1], count, jnp.int32)
        elif jnp.shape(mask) != x.shape[:2]:
            raise ValueError(f"mask must be (B, N) = {x.shape[:2]}, got {jnp.shape(mask)}")
        else:
            order, real = jnp.argsort(mask, axis=1, stable=True), jnp.sum(mask, axis=1, dtype=jnp.int32)
            q, k, v = (jnp.take_along_axis(part, order[:, :, None, None], 1) for part in (q, k, v))
        # Past tokens and new ones in one run, with padding, wherever it stood, in front of both.
        index = jnp.arange(past + count)
        source = index - jnp.where(index < (past + count - real)[:, None], (count - real)[:, None], 0)
        source = jnp.maximum(source, 0)[:, :, None, None]
        k = jnp.take_along_axis(jnp.concatenate([state.keys.astype(k.dtype), k], 1), source, 1)
        v = jnp.take_along_axis(jnp.concatenate([state.values.astype(v.dtype), v], 1), source, 1)
        known = index >= (past + count - real - jnp.minimum(state.length, past))[:, None]
        q = jnp.pad(q, ((0, 0), (past, 0), (0, 0), (0, 0)))
        q, padded_k, padded_v, known = self._padded(q, k, v, known)
        y = neighborhood_attention(q, padded_k, padded_v, **self._options(), key_mask=known)[:, past : past + count]
        if order is not None:
            y = jnp.take_along_axis(y, jnp.argsort(order, axis=1)[:, :, None, None], 1)
        return self._merge(y, x.shape, edits), _advance(state, k[:, count:], v[:, count:], real)

    def step(
        self,
        x_t: ArrayLike,
        state: NeighborhoodState,
        *,
        positions: ArrayLike | None = None,
        edits: Edits | None = None,
    ) -> tuple[jax.Array, NeighborhoodState]:
        self._check_decodes()
        x = jnp.asarray(x_t, self.dtype)[:, None]
        self.check_call(x, positions=positions, decoding=True)
        q, k, v = self._project(x, edits)
        k = jnp.concatenate([state.keys.astype(k.dtype), k], 1)
        v = jnp.concatenate([state.values.astype(v.dtype), v], 1)
        known = jnp.arange(self._past + 1) >= (self._past - state.length)[:, None]
        window = slice(None, None, self.dilation[0])
        y = softmax_attention(q, k[:, window], v[:, window], mask=known[:, window], scale=self.scale or None)
        return self._merge(y, x.shape, edits)[:, 0], _advance(state, k[:, 1:], v[:, 1:], 1)

    @property
    def _past(self) -> int:
        """Tokens before the newest that its window reaches."""
        return (self.kernel_size[0] - 1) * self.dilation[0]

    def _options(self) -> dict[str, Any]:
        names = ("kernel_size", "stride", "dilation", "is_causal", "scale")
        bias = None if self.bias is None else self.bias[...]
        return {name: getattr(self, name) for name in names} | {"bias": bias}

    def _may_be_short(self) -> bool:
        return self.causal and self.stride == (1,)

    def _check_decodes(self) -> None:
        if not self.causal:
            raise UnsupportedArgument(f"{type(self).__name__} does not decode: {self._pattern_words()}")
        if self.stride != (1,):
            raise UnsupportedArgument(
                f"{type(self).__name__} does not decode with stride {self.stride[0]}, only with 1: the window of "
                f"the last run of tokens depends on tokens to come"
            )

    def _project(self, x: jax.Array, edits: Edits | None) -> list[jax.Array]:
        """Queries, keys and values `(B, *S, H, D)`."""
        tokens = to_tokens(x)
        heads = visit(self, edits, "qkv", Heads(self.query(tokens), self.key(tokens), self.value(tokens)))
        return [part.reshape(*x.shape[:-1], *part.shape[2:]) for part in heads[:3]]

    def _merge(
        self, y: jax.Array, shape: tuple[int, ...], edits: Edits | None, deterministic: bool = True
    ) -> jax.Array:
        y = self.out(visit(self, edits, "heads", y.reshape(shape[0], -1, *y.shape[-2:]))).reshape(shape)
        return y if self.dropout is None else self.dropout(y, deterministic=deterministic)

    def _padded(self, *arrays: jax.Array) -> tuple[jax.Array, ...]:
        """A short causal sequence, lengthened by tokens that no token sees; anything else as it is."""
        least = self.kernel_size[0] * self.dilation[0]
        missing = max(0, least - arrays[0].shape[1]) if self._may_be_short() else 0
        return tuple(jnp.pad(a, [(0, 0), (0, missing), *[(0, 0)] * (a.ndim - 2)]) for a in arrays)

    def _map(self, q: jax.Array, k: jax.Array, tokens: tuple[int, ...]) -> jax.Array:
        count = math.prod(tokens)
        return neighborhood_attention_weights(q, k, **self._options())[:, :, :count, :count]


def _advance(state: NeighborhoodState, keys: jax.Array, values: jax.Array, count: jax.Array | int) -> NeighborhoodState:
    return NeighborhoodState(keys.astype(state.keys.dtype), values.astype(state.values.dtype), state.length + count)


def _least_grid(layout: Layout, kernel_size: int | Sequence[int], dilation: int | Sequence[int]) -> tuple[int, ...]:
    """Lengths that any such box fits into; wrong types and counts are left for the op to name."""
    sizes = [np.asarray(x) for x in (kernel_size, dilation)]
    whole = [int(x.max()) if x.size and np.issubdtype(x.dtype, np.integer) else 1 for x in sizes]
    return (max(1, math.prod(whole)),) * layout.axes
