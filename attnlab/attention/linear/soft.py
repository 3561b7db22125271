"""SOFT and SOFT++: attention with a Gaussian kernel through landmarks (Lu et al., IJCV 2024, arXiv:2207.03341).

Queries are keys, and similarity is G(x, y) = exp(-‖x − y‖²/2), without any normalisation of rows. It is approximated
(Nyström) through m landmarks L, which a strided convolution of the queries makes, shared by the heads. Per head, with
q ← q / D^¼:

    L = GELU(LN(conv_r(q)))       K₁ = G(q, L)  (N, m)       K₂ = G(L, L)  (m, m)
    y = K₁ K₂⁺ K₁ᵀ v + DWConv(v)

SOFT: K₂⁺ is 20 steps of Newton's iteration on K₂ + 0.01 I; its gradient is that of an inverse, with this value.
SOFT++ (`normalized`): K₂⁺ = d (K₂)⁺ d with d = (row sums of K₂)^-½, the iteration of K₂ itself, the gradient through
it; see `attnlab.nn.newton_inverse` for the start values. The authors take that of SOFT++ over batch and heads, so that
an example depends on its batch; `shared_start` has it so, the default is a start value for each matrix.

The convolution of the values has one kernel for each head, the same for all its channels. Cost O(N·m·D + m³) per head,
linear in N for fixed m. Exponents are at most 0 and computed in float32, as is the iteration. Names and defaults:
fudan-zvg/SOFT, whose classes of SOFT++ cannot be constructed as published; its branch for r = 1 is broken too.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from attnlab.contract import Given, Layout, Site, TokenMixer, record
from attnlab.nn.activations import gelu
from attnlab.nn.dense_mixer import Heads
from attnlab.nn.depthwise import DepthwiseConv
from attnlab.nn.grids import crop, to_tokens
from attnlab.nn.heads import FromHeads, ToHeads
from attnlab.nn.linear import Conv, compute_in_input_dtype
from attnlab.nn.newton_inverse import newton_inverse, symmetric_newton_inverse
from attnlab.nn.norms import LayerNorm
from attnlab.points import visit
from attnlab.registry import Cost, Paper, Source, register
from pallas_kernels.dtypes import at_least_float32

PAPER = Paper("Softmax-free Linear Transformers", "Lu et al.", 2024, arxiv="2207.03341", number=6)
_ENTRY = {"paper": PAPER, "source": Source.AUTHORS_CODE, "repository": "fudan-zvg/SOFT"}


def gaussian_kernel(x: ArrayLike, y: ArrayLike) -> jax.Array:
    """exp(-‖x_i − y_j‖²/2): `(…, N, D)` and `(…, M, D)` to `(…, N, M)` in float32 (or wider)."""
    wide = at_least_float32(jnp.result_type(x))
    x, y = jnp.asarray(x, wide), jnp.asarray(y, wide)
    product = jnp.einsum("...nd,...md->...nm", x, y, precision=jax.lax.Precision.HIGHEST)
    norms = jnp.square(x).sum(-1)[..., :, None] + jnp.square(y).sum(-1)[..., None, :]
    # Rounding may make a distance negative.
    return jnp.exp(jnp.minimum(product - norms / 2, 0))


def landmark_inverse(
    kernel: jax.Array, *, iterations: int = 20, normalized: bool = False, shared_start: bool = False
) -> jax.Array:
    """K₂⁺ of the landmarks' kernel `(…, m, m)`; arguments as `SoftmaxFreeAttention`."""
    if not normalized:
        return newton_inverse(kernel, iterations=iterations)
    inverse = symmetric_newton_inverse(kernel, iterations=iterations, shared_start=shared_start)
    d = jax.lax.rsqrt(kernel.sum(-1))
    return d[..., :, None] * inverse * d[..., None, :]


def softmax_free_attention(
    q: ArrayLike,
    landmarks: ArrayLike,
    v: ArrayLike,
    *,
    iterations: int = 20,
    normalized: bool = False,
    shared_start: bool = False,
) -> jax.Array:
    """K₁ K₂⁺ K₁ᵀ v, without the convolution.

    Args:
      q: queries, divided by D^¼, `(B, N, H, D)`.
      landmarks: L, `(B, m, H, D)`.
      v: values, `(B, N, H, E)`.
      iterations: of Newton's rule.
      normalized: the form of SOFT++.
      shared_start: a start value for the whole batch; of SOFT++ alone.

    Returns:
      `(B, N, H, E)` in the dtype of `v`.
    """
    first, inverse = _kernels(q, landmarks, iterations, normalized, shared_start)
    v = jnp.asarray(v)
    read = jnp.einsum("bhnm,bnhe->bhme", first, v.astype(first.dtype))
    solved = jnp.matmul(inverse, read, precision=jax.lax.Precision.HIGHEST)
    return jnp.einsum("bhnm,bhme->bnhe", first, solved).astype(v.dtype)


def _kernels(
    q: ArrayLike, landmarks: ArrayLike, iterations: int, normalized: bool, shared_start: bool
) -> tuple[jax.Array, jax.Array]:
    """K₁ `(B, H, N, m)` and K₂⁺ `(B, H, m, m)`."""
    q, landmarks = jnp.swapaxes(jnp.asarray(q), 1, 2), jnp.swapaxes(jnp.asarray(landmarks), 1, 2)
    second = gaussian_kernel(landmarks, landmarks)
    options = {"iterations": iterations, "normalized": normalized, "shared_start": shared_start}
    return gaussian_kernel(q, landmarks), landmark_inverse(second, **options)


class LandmarkKernel(nnx.Module):
    """All between the projections: landmarks of the queries, the kernel through them, the convolution of the values.

    Args:
      num_heads: heads H.
      head_dim: D.
      ratio: r, tokens along each axis that make one landmark; those at the end that make no whole one are left out.
      conv_size: side of the kernel of the convolution of the values, odd; 0 for none.
      iterations: of Newton's rule.
      normalized: the form of SOFT++.
      shared_start: a start value for the whole batch; of SOFT++ alone.
      axes: number of axes of the tokens' grid.
      dtype: of the computation outside the kernels; that of the queries when None.
      param_dtype: of the parameters.
      rngs: stream `params`.

    Raises:
      ValueError: for a ratio below 1, or a shared start value without `normalized`.
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        *,
        ratio: int,
        conv_size: int = 3,
        iterations: int = 20,
        normalized: bool = False,
        shared_start: bool = False,
        axes: int = 2,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if ratio < 1:
            raise ValueError(f"ratio must be at least 1, got {ratio}")
        if shared_start and not normalized:
            raise ValueError("shared_start is an option of the normalized form: the other has a start for each matrix")
        self.ratio, self.iterations = ratio, iterations
        self.normalized, self.shared_start = normalized, shared_start
        common = {"use_bias": False, "dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        place = {"strides": ratio, "padding": "VALID", "axes": (None, None)}
        self.landmark = Conv(head_dim, head_dim, (ratio,) * axes, **place, **common)
        self.norm = LayerNorm(head_dim, eps=1e-5, param_dtype=param_dtype, rngs=rngs)
        self.local = nnx.data(None)
        if conv_size:
            self.local = DepthwiseConv(num_heads, (conv_size,) * axes, axes=("heads",), **common)

    def landmarks(self, q: jax.Array, grid: tuple[int, ...]) -> jax.Array:
        """L `(B, m, H, D)` of scaled queries `(B, N, H, D)`.

        Raises:
          ValueError: for a grid that is shorter than the ratio.
        """
        if min(grid) < self.ratio:
            raise ValueError(f"ratio {self.ratio} makes no landmark of a grid {tuple(grid)}")
        # Patches side by side are mapped linearly, heads apart: in a convolution heads would be examples of a batch,
        # and gathered where they are cut over devices.
        batch, _, heads, size = q.shape
        axes, counts = len(grid), [length // self.ratio for length in grid]
        image = crop(q.reshape(batch, *grid, heads * size), [count * self.ratio for count in counts])
        cut = [length for count in counts for length in (count, self.ratio)]
        order = (0, *range(1, 2 * axes, 2), 2 * axes + 1, *range(2, 2 * axes + 1, 2), 2 * axes + 2)
        patches = image.reshape(batch, *cut, heads, size).transpose(order)
        patches = patches.reshape(batch, math.prod(counts), heads, self.ratio**axes * size)
        kernel = self.landmark.kernel[...].reshape(-1, size)
        patches, kernel = compute_in_input_dtype((patches, kernel), dtype=self.landmark.dtype)
        return gelu(self.norm(patches @ kernel))

    def __call__(self, q: jax.Array, landmarks: jax.Array, v: jax.Array, grid: tuple[int, ...]) -> jax.Array:
        """`(B, N, H, E)` from scaled queries, their landmarks and values."""
        options = {"normalized": self.normalized, "shared_start": self.shared_start}
        y = softmax_free_attention(q, landmarks, v, iterations=self.iterations, **options)
        if self.local is None:
            return y
        batch, _, heads, size = v.shape
        image = jnp.moveaxis(v.reshape(batch, *grid, heads, size), -1, 1).reshape(-1, *grid, heads)
        local = self.local(image).reshape(batch, size, -1, heads)
        return y + jnp.moveaxis(local, 1, -1)

    def weights(self, q: jax.Array, landmarks: jax.Array) -> jax.Array:
        """K₁ K₂⁺ K₁ᵀ `(B, H, N, N)`."""
        first, inverse = _kernels(q, landmarks, self.iterations, self.normalized, self.shared_start)
        return first @ inverse @ first.swapaxes(-1, -2)


@register(
    "soft",
    **_ENTRY,
    cost=Cost(time="O(N·m·C + H·m³)", memory="O(N·m·H)"),
    summary="Gaussian kernel in place of softmax, through landmarks and Newton's inverse of their kernel",
    small={"ratio": 2, "iterations": 6},
)
class SoftmaxFreeAttention(TokenMixer):
    """Tokens of any layout to the same shape. See the module docstring for the equations.

    Args:
      features: channels C.
      num_heads: heads H.
      layout: of the tokens.
      ratio: r, tokens along each axis that make one landmark.
      conv_size: side of the kernel of the convolution of the values, odd; 0 for none.
      iterations: of Newton's rule.
      normalized: the form of SOFT++.
      shared_start: a start value for the whole batch, as the authors have it; of SOFT++ alone.
      dtype: of the computation and the result; that of the tokens when None.
      param_dtype: of the parameters.
      rngs: stream `params`.

    Raises:
      ValueError: for sizes that do not fit, or options that exclude each other.
    """

    layouts = frozenset(Layout)
    points = frozenset({"qkv", "heads"})

    def __init__(
        self,
        features: int,
        *,
        num_heads: int,
        layout: Layout = Layout.IMAGE,
        ratio: int = 8,
        conv_size: int = 3,
        iterations: int = 20,
        normalized: bool = False,
        shared_start: bool = False,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if features % num_heads:
            raise ValueError(f"num_heads must divide the {features} channels, got {num_heads}")
        self.features, self.num_heads, self.layout, self.dtype = features, num_heads, Layout(layout), dtype
        size, common = features // num_heads, {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.query, self.value = (ToHeads(features, num_heads, size, **common) for _ in range(2))
        self.kernel = LandmarkKernel(
            num_heads,
            size,
            ratio=ratio,
            conv_size=conv_size,
            iterations=iterations,
            normalized=normalized,
            shared_start=shared_start,
            axes=self.layout.axes,
            **common,
        )
        self.out = FromHeads(num_heads, size, features, **common)

    @classmethod
    def site_defaults(cls, site: Site) -> dict[str, Any]:
        """A ratio for about 7 landmarks along the shortest axis of the grid, as the authors' stages have."""
        return {} if site.grid is None else {"ratio": max(1, min(8, min(site.grid) // 7))}

    def mix(self, x: jax.Array, given: Given) -> jax.Array:
        tokens, grid = to_tokens(x), x.shape[1:-1]
        q = self.query(tokens)
        q = q * q.shape[-1] ** -0.25
        heads = visit(self, given.edits, "qkv", Heads(q, self.kernel.landmarks(q, grid), self.value(tokens)))
        record(self, "attention", lambda: self.kernel.weights(heads.q, heads.k))
        y = visit(self, given.edits, "heads", self.kernel(*heads[:3], grid))
        return self.out(y).reshape(x.shape)


@register(
    "soft.normalized",
    **_ENTRY,
    cost=Cost(time="O(N·m·C + H·m³)", memory="O(N·m·H)"),
    summary="SOFT++: the same with a symmetrically normalised kernel of the landmarks",
    small={"ratio": 2, "iterations": 6},
)
class NormalizedSoftmaxFreeAttention(SoftmaxFreeAttention):
    """SOFT++: `SoftmaxFreeAttention` with `normalized`.

    Args:
      features: channels C.
      num_heads: heads H.
      rngs: stream `params`.
      **options: further arguments of `SoftmaxFreeAttention`.

    Raises:
      ValueError: for sizes that do not fit.
    """

    def __init__(self, features: int, *, num_heads: int, rngs: nnx.Rngs, **options: Any):
        super().__init__(features, num_heads=num_heads, **{**options, "normalized": True}, rngs=rngs)
