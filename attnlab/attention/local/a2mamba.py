"""A2Mamba's attention-augmented state space model (2025, arXiv:2507.16624; code: LMMMEng/A2Mamba).

Heads are in two halves with windows of K×K keys at two scales, the second with the widest dilation d = min(⌊L / K⌋, K)
that fits each axis of length L, and the second's values continue the first's. With a₁, a₂ the maps of neighborhood
attention (with rotary positions and one bias of offsets for both halves), M heads of D channels:

    o₁ = a₁ v₁      o₂ = a₂ (o₁ + v₂)      u = [o₁ | o₂]
    u ← A2SSM(u; a₁, a₂), or where whole: softmax(D^-1/2 R q · R k + bias) u over all tokens
    y = W LN((LN(u) + DWConv5×5(v)) · SiLU(BN(W_g x)))

A2SSM runs a selective state space model (`attnlab.nn.selective`, a state of one number per channel, one raster scan)
and lets the states attend to their neighbours by the same maps, a cross-attention of states, before they are read:

    x = SiLU(DWConv5×5(u));   h_t = exp(δ_t a) h_{t-1} + δ_t x_t b_t
    s = W_f [a₁ h₁ | a₂ h₂]        W_f mixes the heads
    y_t = c_t s_t + skip x_t

Without maps s = h. The maps are not stored to be used twice, as the authors do: neighborhood attention is called again
with the same queries and keys, and memory does not grow with K. States and their attention are float32. Where whole,
the bias is a table of pairs of tokens of one grid, which for another grid is resized as one picture, bicubically.
Cost O(N·K²·C).
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab.contract import Given, Layout, Site, TokenMixer, record
from attnlab.nn.activations import silu
from attnlab.nn.conv import ConvNorm
from attnlab.nn.dense_mixer import Heads
from attnlab.nn.depthwise import DepthwiseConv
from attnlab.nn.grids import to_tokens
from attnlab.nn.heads import FromHeads, ToHeads, merge_heads
from attnlab.nn.linear import Linear
from attnlab.nn.norms import BatchNorm, LayerNorm
from attnlab.nn.positions import grid_positions
from attnlab.nn.resampling import resize_bicubic
from attnlab.nn.rotary import Rotary
from attnlab.nn.selective import STEPS, SelectiveScan
from attnlab.nn.softmax import attention_weights, softmax_attention
from attnlab.points import visit
from attnlab.registry import Cost, Paper, Source, register
from pallas_kernels.dtypes import at_least_float32
from pallas_kernels.neighborhood_attention import neighborhood_attention, neighborhood_attention_weights

PAPER = Paper(
    "A2Mamba: Attention-augmented State Space Models for Visual Recognition",
    "Lou et al.",
    2025,
    arxiv="2507.16624",
    number=76,
)
_ENTRY: dict[str, Any] = {"paper": PAPER, "source": Source.AUTHORS_CODE, "repository": "LMMMEng/A2Mamba"}


class Maps:
    """The two maps of neighborhood attention, as what they are made of: `maps(half, values)` applies one.

    Args:
      q: queries, rotated, `(B, Hh, Ww, M, D)`.
      k: keys, rotated, in the same shape.
      kernel_size: K.
      dilations: of the first half of the heads, and of the second; each one number or one for each axis.
      bias: `(M / 2, 2K - 1, 2K - 1)` of both halves, or None.
    """

    def __init__(self, q: jax.Array, k: jax.Array, kernel_size: int, dilations: Any, bias: jax.Array | None):
        self.q, self.k = (jnp.split(each, 2, axis=-2) for each in (q, k))
        self.options = [{"kernel_size": kernel_size, "dilation": each, "bias": bias} for each in dilations]

    def __call__(self, half: int, values: jax.Array) -> jax.Array:
        """`(B, Hh, Ww, M / 2, D)` attended to, in their dtype."""
        q, k = (each[half].astype(values.dtype) for each in (self.q, self.k))
        return neighborhood_attention(q, k, values, **self.options[half])

    def weights(self) -> jax.Array:
        """Both maps, `(B, M, N, N)` in float32."""
        pairs = zip(self.q, self.k, self.options, strict=True)
        return jnp.concatenate([neighborhood_attention_weights(q, k, **each) for q, k, each in pairs], axis=1)


@register(
    "a2mamba.scan",
    **_ENTRY,
    cost=Cost(time="O(N·C·K²)", memory="O(N·C)"),
    kernel="selective_scan",
    summary="a raster scan with one number of state per channel, whose states may attend to each other",
)
class AttentionAugmentedScan(TokenMixer):
    """Images `(B, H, W, C)` to the same shape. See the module docstring for the equations.

    Called as a mixer it has no maps, and states are read as they are; `augmented` is given maps.

    Args:
      features: channels C.
      fused_heads: M, heads that are mixed behind the attention of states; None for a scan that is never given maps.
      kernel_size: side of the convolution, odd.
      step_range: of the step sizes at the start, log-uniform.
      dtype: of the computation and the result; that of the tokens when None. The scan is float32.
      param_dtype: of the parameters.
      rngs: stream `params`.

    Raises:
      ValueError: if an odd number of heads, or one that does not divide the channels, is to be mixed.
    """

    layouts = frozenset({Layout.IMAGE})
    layout = Layout.IMAGE

    def __init__(
        self,
        features: int,
        *,
        fused_heads: int | None = None,
        kernel_size: int = 5,
        step_range: tuple[float, float] = STEPS,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.features, self.dtype = features, dtype
        stored = {"param_dtype": param_dtype, "rngs": rngs}
        self.conv = DepthwiseConv(features, (kernel_size, kernel_size), activation=silu, dtype=dtype, **stored)
        self.scan = SelectiveScan(features, state_size=1, step_range=step_range, **stored)
        self.fusion = nnx.data(None)
        if fused_heads is not None:
            if fused_heads < 2 or fused_heads % 2 or features % fused_heads:
                raise ValueError(f"fused_heads must be even and divide the {features} channels, got {fused_heads}")
            self.fusion = Linear(fused_heads, fused_heads, axes=(None, None), **stored)

    def mix(self, x: jax.Array, given: Given) -> jax.Array:
        return self._scanned(x, None)

    def augmented(self, x: jax.Array, maps: Maps) -> jax.Array:
        """The scan of `(B, Hh, Ww, C)` whose states attend by these maps.

        Raises:
          ValueError: if it was built without heads to mix.
        """
        if self.fusion is None:
            raise ValueError("a scan without fused_heads has no use for maps")
        return self._scanned(jnp.asarray(x, self.dtype), maps)

    def _scanned(self, x: jax.Array, maps: Maps | None) -> jax.Array:
        y = self.conv(x)
        read, states = self.scan(to_tokens(y)[:, :, None], states=True)
        states = states.reshape(x.shape)  # float32, one number for each channel
        if maps is not None:
            heads = states.reshape(*x.shape[:-1], self.fusion.in_features, -1)
            first, second = jnp.split(heads, 2, axis=-2)
            heads = jnp.concatenate([maps(0, first), maps(1, second)], axis=-2)
            states = jnp.swapaxes(self.fusion(jnp.swapaxes(heads, -1, -2)), -1, -2).reshape(x.shape)
        skip = self.scan.skip[0].astype(states.dtype)
        return (read.reshape(*x.shape[:-1], 1) * states + skip * y.astype(states.dtype)).astype(x.dtype)


@register(
    "a2mamba",
    **_ENTRY,
    cost=Cost(time="O(N·C·(C+K²))", memory="O(N·C)"),
    kernel="neighborhood_attention",
    summary="neighborhood attention at two scales, and a scan whose states attend by the same maps",
    small={"kernel_size": 3},
)
class NeighborhoodScanAttention(TokenMixer):
    """Images `(B, H, W, C)` to the same shape. See the module docstring for the equations.

    Args:
      features: channels C.
      num_heads: heads M, an even number.
      kernel_size: K, odd; at most the sides of the image.
      dilation: of the first half of the heads.
      whole: whether softmax attention over all tokens takes the place of the scan, as in the last stage.
      grid: rows and columns of the image, which the bias of `whole` is for.
      bias_grid: the grid that this bias is for, if it is another; the bias is resized for all others.
      relative_bias: whether there are biases: of offsets in windows, and where whole of pairs of tokens.
      step_range: of the step sizes at the start, log-uniform.
      dtype: of the computation and the result; that of the tokens when None. States are float32.
      param_dtype: of the parameters.
      rngs: stream `params`.

    Raises:
      ValueError: for heads that are odd or do not divide the channels, heads of a size that rotary positions cannot
        turn, an even window, one that the grid does not hold, or `whole` with a bias and without a grid.
    """

    layouts = frozenset({Layout.IMAGE})
    layout = Layout.IMAGE
    points = frozenset({"qkv", "heads"})
    collectives = frozenset({"all-gather", "all-to-all", "collective-permute"})  # heads part, continue, and are mixed

    def __init__(
        self,
        features: int,
        *,
        num_heads: int,
        kernel_size: int = 7,
        dilation: int = 1,
        whole: bool = False,
        grid: tuple[int, int] | None = None,
        bias_grid: tuple[int, int] | None = None,
        relative_bias: bool = True,
        step_range: tuple[float, float] = STEPS,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if num_heads % 2 or features % num_heads:
            raise ValueError(f"num_heads must be even and divide the {features} channels, got {num_heads}")
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        if dilation < 1:
            raise ValueError(f"dilation must be at least 1, got {dilation}")
        bias_grid = grid if bias_grid is None else tuple(bias_grid)
        if whole and relative_bias and bias_grid is None:
            raise ValueError("a bias of pairs of tokens is for one grid: give grid or bias_grid, or no relative_bias")
        size = features // num_heads
        self.features, self.num_heads, self.dtype = features, num_heads, dtype
        self.kernel_size, self.dilation, self.whole, self.bias_grid = kernel_size, dilation, whole, bias_grid
        self.rotary = Rotary(interleaved=True, inclusive=True)
        self.rotary.check(size, 2)
        if grid is not None:
            self._dilations(grid)
        stored = {"param_dtype": param_dtype, "rngs": rngs}
        common = {"dtype": dtype, **stored}
        self.query, self.key, self.value = (ToHeads(features, num_heads, size, **common) for _ in range(3))
        self.gate = ConvNorm(features, features, (1, 1), norm=BatchNorm, activation=silu, **common)
        self.local = DepthwiseConv((num_heads, size), (5, 5), **common)
        self.norm, self.last_norm = LayerNorm((num_heads, size), **stored), LayerNorm((num_heads, size), **stored)
        self.out = FromHeads(num_heads, size, features, **common)
        self.scan = nnx.data(None)
        if not whole:
            self.scan = AttentionAugmentedScan(features, fused_heads=num_heads, step_range=step_range, **common)
        self.bias, self.pair_bias = nnx.data(None), nnx.data(None)
        if relative_bias:
            table = jnp.zeros((num_heads // 2, *(2 * kernel_size - 1,) * 2), param_dtype)
            self.bias = nnx.Param(table, logical_axes=(None, None, None), weight_decay=False)
        if relative_bias and whole:
            count = bias_grid[0] * bias_grid[1]
            table = jnp.zeros((num_heads, count, count), param_dtype)
            self.pair_bias = nnx.Param(table, logical_axes=("heads", None, None), weight_decay=False)

    @classmethod
    def site_defaults(cls, site: Site) -> dict[str, Any]:
        # The largest odd window up to the usual one that the grid holds.
        if site.grid is None:
            return {}
        side = min(7, *site.grid)
        return {"kernel_size": side - 1 + side % 2}

    def mix(self, x: jax.Array, given: Given) -> jax.Array:
        grid, tokens = x.shape[1:-1], to_tokens(x)
        dilations = self._dilations(grid)
        heads = visit(self, given.edits, "qkv", Heads(self.query(tokens), self.key(tokens), self.value(tokens)))
        at = jnp.asarray(grid_positions(grid))
        q, k = self.rotary(heads.q, at), self.rotary(heads.k, at)

        def on_grid(part: jax.Array) -> jax.Array:
            return part.reshape(x.shape[0], *grid, *part.shape[2:])

        v = on_grid(heads.v)
        bias = None if self.bias is None else self.bias[...]
        maps = Maps(on_grid(q), on_grid(k), self.kernel_size, dilations, bias)
        first, second = jnp.split(v, 2, axis=-2)
        first = maps(0, first)
        y = jnp.concatenate([first, maps(1, first + second)], axis=-2)
        if self.whole:
            pairs = self._pair_bias(grid)
            record(self, "attention", lambda: attention_weights(q, k, bias=pairs))
            y = on_grid(softmax_attention(q, k, y.reshape(q.shape), bias=pairs))
        else:
            record(self, "attention", maps.weights)
            y = self.scan.augmented(merge_heads(y), maps).reshape(v.shape)
        gate = self.gate(x, deterministic=given.deterministic).reshape(v.shape)
        y = (self.norm(y) + self.local(v)) * gate
        y = visit(self, given.edits, "heads", y.reshape(q.shape))
        return self.out(self.last_norm(y)).reshape(x.shape)

    def _dilations(self, grid: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        side = self.kernel_size
        if min(grid) < side * self.dilation:
            raise ValueError(
                f"kernel_size {side} at dilation {self.dilation} must fit the image of {tuple(grid)} tokens"
            )
        return (self.dilation,) * len(grid), tuple(min(length // side, side) for length in grid)

    def _pair_bias(self, grid: tuple[int, ...]) -> jax.Array | None:
        """`(1, M, N, N)` in float32, resized as a picture of pairs if it is for another grid."""
        if self.pair_bias is None:
            return None
        table = self.pair_bias[...]
        table = table.astype(at_least_float32(table.dtype))
        if tuple(grid) == self.bias_grid:
            return table[None]
        count = grid[0] * grid[1]
        return jnp.moveaxis(resize_bicubic(jnp.moveaxis(table, 0, -1)[None], (count, count)), -1, 1)
