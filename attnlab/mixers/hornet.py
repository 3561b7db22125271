"""HorNet's recursive gated convolution, gnConv (Rao et al., NeurIPS 2022, arXiv:2207.14284; code: raoyongming/HorNet).

Products of neighbourhoods of an order n, each wider than the one before: with widths d_i = C / 2^(n-1-i), i = 0..n-1,
which sum to T, and 2^(n-1) a divisor of C,

    [p | a] = x W_in,   p of width d_0, a of width T
    [g_0 | … | g_{n-1}] = s · conv(a)         a kernel per channel: 7 tokens on a side, or a filter of the whole grid
    y = p ⊙ g_0;   y = (y W_i) ⊙ g_{i+1}, i = 0..n-2;   result = y W_out

Without biases it is homogeneous of degree n + 1. s multiplies the convolution alone. The filter of the whole grid, the
authors' GlobalLocalFilter, convolves half of the channels locally and filters the other half in the spectrum:

    z = LN(a);   result = LN(interleave(conv3(z_1), irfft(W ⊙ rfft(z_2))))       channels [local, global, local, …]

with LN over channels, of eps 1e-6; weights of another grid are interpolated. Cost O(N·C·(C + 49)).
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab.contract import Given, Layout, Site, TokenMixer
from attnlab.nn.depthwise import DepthwiseConv
from attnlab.nn.linear import Linear, trunc_normal
from attnlab.nn.norms import LayerNorm
from attnlab.nn.spectral import GlobalFilter
from attnlab.registry import Cost, Paper, Source, register

PAPER = Paper(
    "HorNet: Efficient High-Order Spatial Interactions with Recursive Gated Convolutions",
    "Rao et al.",
    2022,
    arxiv="2207.14284",
    number=39,
)
_INIT = {"kernel_init": trunc_normal, "bias_init": nnx.initializers.zeros}


class GlobalLocalFilter(nnx.Module):
    """Half of the channels convolved locally, half filtered in the spectrum; `(B, *S, C)` to the same shape.

    Args:
      features: channels C, an even number.
      spectrum: frequencies along each axis, see `attnlab.nn.spectral.spectrum_of`; interpolated for other grids.
      kernel_size: tokens on a side of the local kernels.
      dtype: of the computation; that of the input when None.
      param_dtype: of the parameters.
      rngs: stream `params`.

    Raises:
      ValueError: for an odd number of channels.
    """

    def __init__(
        self,
        features: int,
        spectrum: tuple[int, ...],
        *,
        kernel_size: int = 3,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if features % 2:
            raise ValueError(f"features must be even, half local and half global, got {features}")
        stored = {"param_dtype": param_dtype, "rngs": rngs}
        sides = (kernel_size,) * len(spectrum)
        self.pre_norm, self.post_norm = (LayerNorm(features, eps=1e-6, **stored) for _ in range(2))
        self.local = DepthwiseConv(features // 2, sides, use_bias=False, dtype=dtype, **_INIT, **stored)
        self.filter = GlobalFilter(features // 2, spectrum, resize=True, init=trunc_normal, **stored)

    def __call__(self, x: jax.Array) -> jax.Array:
        near, far = jnp.split(self.pre_norm(x), 2, axis=-1)
        y = jnp.stack([self.local(near), self.filter(far)], axis=-1)
        return self.post_norm(y.reshape(x.shape))


@register(
    "hornet",
    paper=PAPER,
    source=Source.AUTHORS_CODE,
    repository="raoyongming/HorNet",
    cost=Cost(time="O(N·C·(C+K))", memory="O(N·C)"),
    summary="products of neighbourhoods, recursively, each of twice the channels of the one before",
    small={"order": 3, "kernel_size": 3},
)
class RecursiveGatedConv(TokenMixer):
    """Tokens of any layout to the same shape. See the module docstring for the equations.

    Args:
      features: channels C.
      order: n, how many neighbourhoods are multiplied.
      scale: s.
      kernel_size: tokens on a side of the kernels, odd.
      spectrum: frequencies along each axis, for a `GlobalLocalFilter` in place of the convolution.
      layout: of the tokens.
      dtype: of the computation and the result; that of the tokens when None.
      param_dtype: of the parameters.
      rngs: stream `params`.

    Raises:
      ValueError: if 2^(n-1) does not divide the channels, or the spectrum is of another layout.
    """

    layouts = frozenset(Layout)

    @classmethod
    def site_defaults(cls, site: Site) -> dict[str, Any]:
        # The highest order up to the usual one that the channels allow.
        return {"order": next(order for order in (5, 4, 3, 2, 1) if site.features % 2 ** (order - 1) == 0)}

    def __init__(
        self,
        features: int,
        *,
        order: int = 5,
        scale: float = 1.0,
        kernel_size: int = 7,
        spectrum: tuple[int, ...] | None = None,
        layout: Layout = Layout.IMAGE,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if order < 1 or features % 2 ** (order - 1):
            raise ValueError(f"order must be at least 1 and 2^(order - 1) divide the {features} channels, got {order}")
        self.features, self.scale, self.layout, self.dtype = features, scale, Layout(layout), dtype
        self.widths = tuple(features // 2**i for i in reversed(range(order)))
        if spectrum is not None and len(spectrum) != self.layout.axes:
            raise ValueError(f"spectrum must have {self.layout.axes} axes for the {layout}, got {spectrum}")
        common = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        total = sum(self.widths)
        self.proj_in = Linear(features, 2 * features, **_INIT, **common)
        if spectrum is None:
            self.conv = DepthwiseConv(total, (kernel_size,) * self.layout.axes, **_INIT, **common)
        else:
            self.conv = GlobalLocalFilter(total, tuple(spectrum), **common)
        self.widen = nnx.List(
            Linear(width, wider, **_INIT, **common)
            for width, wider in zip(self.widths[:-1], self.widths[1:], strict=True)
        )
        self.proj_out = Linear(features, features, **_INIT, **common)

    def mix(self, x: jax.Array, given: Given) -> jax.Array:
        y, wide = jnp.split(self.proj_in(x), [self.widths[0]], axis=-1)
        ends = [sum(self.widths[: i + 1]) for i in range(len(self.widths) - 1)]
        gates = jnp.split(self.conv(wide) * self.scale, ends, axis=-1)
        y = y * gates[0]
        for widen, gate in zip(self.widen, gates[1:], strict=True):
            y = widen(y) * gate
        return self.proj_out(y)
