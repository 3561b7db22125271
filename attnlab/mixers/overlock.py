"""ContMix of OverLoCK (Lou and Yu, CVPR 2025, arXiv:2502.20087): a convolution whose kernels mix the context.

Each token makes its own kernels of its affinity to 49 means of the context, the cells of a 7 × 7 grid over it, in G
groups of C/2G channels each (the authors' code has half as many heads):

    q = BN(x W),  k = BN(pool_7×7(z) W)          C/2 channels each, in G groups; z is the context, or x
    a_i = (C/G)^-1/2 q_i kᵀ                      (G, 49), no softmax
    [w¹ | w²] = a W + b                          S² + K² taps; W and b are those of all groups
    w¹ = softmax(w¹ + rpb¹),  w² = softmax(w² + rpb²)          over the taps; rpb by offset, as neighborhood attention

    v = BN(x W): its first half is summed with w¹ over windows of S × S, its second with w² over K × K;   BN(· W)

Windows are shifted at borders, never cut. Maps with a side below K are enlarged first, and what comes out is averaged
back. Cost O(N·C·(49 + K²)) time; the kernels take O(N·G·K²) memory.

Reference: LMMMEng/OverLoCK.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attnlab.contract import Given, Layout, Pattern, Site, TokenMixer, record
from attnlab.nn.conv import ConvNorm
from attnlab.nn.linear import Linear, trunc_normal
from attnlab.nn.norms import BatchNorm
from attnlab.nn.resampling import adaptive_avg_pool, resize_bilinear
from attnlab.registry import Cost, Paper, Source, register
from pallas_kernels.dtypes import at_least_float32
from pallas_kernels.neighborhood_attention import neighborhood_places, neighborhood_sum

PAPER = Paper(
    "OverLoCK: An Overview-first-Look-Closely-next ConvNet with Context-Mixing Dynamic Kernels",
    "Lou and Yu",
    2025,
    arxiv="2502.20087",
    number=92,
)
REPOSITORY = "LMMMEng/OverLoCK"
COST = Cost(time="O(N·C·(49+K²))", memory="O(N·G·K²)")
CELLS = 7


def offset_bias(table: jax.Array, grid: tuple[int, int], kernel_size: int) -> jax.Array:
    """The bias of each tap of each token's window: `(G, 2k-1, 2k-1)` to `(*grid, G, k²)`.

    Entry j - i + k - 1 along each axis is that of token i and its tap at j.
    """
    rows, columns = (
        place - np.arange(len(place))[:, None] + kernel_size - 1 for place in neighborhood_places(grid, kernel_size)
    )
    bias = table[:, rows[:, None, :, None], columns[None, :, None, :]]
    return jnp.moveaxis(bias, 0, 2).reshape(*grid, table.shape[0], -1)


class DynamicKernels(nnx.Module):
    """Values summed with kernels that queries make of a context; see the module docstring.

    Args:
      features: channels C.
      context_features: channels of the context.
      num_groups: G.
      kernel_size: K, odd.
      small_size: S, odd and at most K.
      init: of the tables of offsets.
      dtype: of the computation and the result; that of the values when None.
      param_dtype: of the parameters.
      rngs: stream `params`.

    Raises:
      ValueError: if 2 G does not divide the channels, or for other sizes.
    """

    def __init__(
        self,
        features: int,
        context_features: int,
        *,
        num_groups: int,
        kernel_size: int = 7,
        small_size: int = 5,
        init: nnx.Initializer = trunc_normal,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if num_groups < 1 or features % (2 * num_groups):
            raise ValueError(f"2 num_groups must divide the {features} channels, got {num_groups=}")
        if kernel_size % 2 == 0 or small_size % 2 == 0 or not 1 <= small_size <= kernel_size:
            raise ValueError(f"kernel_size and small_size must be odd, the latter no more: {kernel_size}, {small_size}")
        self.groups, self.kernel_size, self.small_size, self.dtype = num_groups, kernel_size, small_size, dtype
        self.scale = (features // self.groups) ** -0.5
        stored = {"param_dtype": param_dtype, "rngs": rngs}
        norm: dict[str, Any] = {"norm": BatchNorm, "use_bias": False, "dtype": dtype, **stored}
        self.query = ConvNorm(features, features // 2, 1, **norm)
        self.key = ConvNorm(context_features, features // 2, 1, **norm)
        taps = small_size**2 + kernel_size**2
        self.taps = Linear(CELLS**2, taps, kernel_init=trunc_normal, axes=(None, None), **stored)
        self.small_bias, self.large_bias = (
            nnx.Param(init(rngs.params(), (self.groups, 2 * k - 1, 2 * k - 1), param_dtype), weight_decay=False)
            for k in (small_size, kernel_size)
        )

    def kernels(self, x: jax.Array, context: jax.Array, *, deterministic: bool = True) -> tuple[jax.Array, jax.Array]:
        """The kernels `(B, H, W, G, S²)` and `(B, H, W, G, K²)` of each token, in float32 (or wider).

        Args:
          x: what asks, `(B, H, W, C)`, no side below K.
          context: `(B, h, w, C')`.
          deterministic: False in training.
        """
        wide, grid = at_least_float32(x.dtype), (x.shape[1], x.shape[2])
        q = self.query(x, deterministic=deterministic).astype(wide) * self.scale
        k = self.key(adaptive_avg_pool(context, CELLS), deterministic=deterministic).astype(wide)
        q, k = (part.reshape(part.shape[0], -1, self.groups, part.shape[-1] // self.groups) for part in (q, k))
        affinity = jnp.einsum("bngc,blgc->bngl", q, k)
        taps = self.taps(affinity).reshape(x.shape[0], *grid, self.groups, -1)
        small, large = jnp.split(taps, [self.small_size**2], axis=-1)
        small = small + offset_bias(self.small_bias[...].astype(wide), grid, self.small_size)
        large = large + offset_bias(self.large_bias[...].astype(wide), grid, self.kernel_size)
        return jax.nn.softmax(small), jax.nn.softmax(large)

    def enlarged(self, grid: tuple[int, int]) -> tuple[int, int]:
        """The grid on which the kernels are: no side below K, the other in proportion."""
        rows, columns = grid
        if min(grid) >= self.kernel_size:
            return grid
        if rows < columns:
            return self.kernel_size, int(self.kernel_size / rows * columns)
        return int(self.kernel_size / columns * rows), self.kernel_size

    def __call__(self, v: jax.Array, x: jax.Array, context: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Sums values.

        Args:
          v: values `(B, H, W, C)`, no side below K.
          x: what asks, the same.
          context: `(B, h, w, C')`.
          deterministic: False in training.

        Returns:
          `(B, H, W, C)`.
        """
        small, large = self.kernels(x, context, deterministic=deterministic)
        halves = v.reshape(*v.shape[:-1], 2, self.groups, -1)
        sums = (
            neighborhood_sum(small, halves[..., 0, :, :], self.small_size),
            neighborhood_sum(large, halves[..., 1, :, :], self.kernel_size),
        )
        return jnp.stack(sums, -3).reshape(v.shape)


@register(
    "overlock",
    paper=PAPER,
    source=Source.AUTHORS_CODE,
    repository=REPOSITORY,
    cost=COST,
    kernel="neighborhood_attention",
    summary="convolution by kernels that each token makes of its affinity to 49 cells of the context",
    small={"kernel_size": 3, "small_size": 3},
)
class ContextMixing(TokenMixer):
    """ContMix with its projections, on images; the context may be another map of the same grid, as tokens.

    Args:
      features: channels C.
      num_groups: G; 2 G divides C.
      context_features: channels of a context in place of the tokens themselves, which makes the kernels; values stay
        the tokens'.
      kernel_size: K, the larger side of kernels, odd.
      small_size: S, the smaller side, odd.
      dtype: of the computation and the result; that of the tokens when None.
      param_dtype: of the parameters.
      rngs: stream `params`.

    Raises:
      ValueError: as `DynamicKernels`; in the call, for a context of another number of tokens.
    """

    patterns = frozenset({Pattern.SELF, Pattern.CROSS})
    layouts = frozenset({Layout.IMAGE})
    layout = Layout.IMAGE

    def __init__(
        self,
        features: int,
        *,
        num_groups: int = 4,
        context_features: int | None = None,
        kernel_size: int = 7,
        small_size: int = 5,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.features, self.context_features, self.dtype = features, context_features, dtype
        norm: dict[str, Any] = {"norm": BatchNorm, "use_bias": False, "dtype": dtype, "param_dtype": param_dtype}
        self.kernels = DynamicKernels(
            features,
            features if context_features is None else context_features,
            num_groups=num_groups,
            kernel_size=kernel_size,
            small_size=small_size,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        self.value, self.out = (ConvNorm(features, features, 1, **norm, rngs=rngs) for _ in range(2))

    @classmethod
    def site_defaults(cls, site: Site) -> dict[str, Any]:
        """As many groups as the channels allow, up to the usual number."""
        return {"num_groups": next(g for g in (4, 2, 1) if site.features % (2 * g) == 0 or g == 1)}

    def mix(self, x: jax.Array, given: Given) -> jax.Array:
        grid, deterministic = (x.shape[1], x.shape[2]), given.deterministic
        context = given.context
        if context is not None:
            if context.shape[1] != grid[0] * grid[1]:
                raise ValueError(f"context must be of the {grid[0] * grid[1]} tokens' grid, got {context.shape[1]}")
            context = context.reshape(x.shape[0], *grid, -1)
        size = self.kernels.enlarged(grid)
        large = x if size == grid else resize_bilinear(x, size)
        context = large if context is None else context if size == grid else resize_bilinear(context, size)
        record(self, "gate", lambda: self.kernels.kernels(large, context, deterministic=True)[1])
        v = self.value(large, deterministic=deterministic)
        y = self.kernels(v, large, context, deterministic=deterministic)
        y = y if size == grid else adaptive_avg_pool(y, grid)
        return self.out(y, deterministic=deterministic)
