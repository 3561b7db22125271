"""MHS-VM's multi-head scan (Ji, 2024, arXiv:2406.05992; code: PixDeep/MHS-VM): scans in subspaces, and their fusion.

Tokens of an image are projected into n subspaces of d = ⌊C / n⌋ channels, in each of which a selective state space
model (`attnlab.nn.selective`) runs along K = 4 routes of one pattern: two orders, each forwards and backwards, and each
with parameters of its own. Scan route attention fuses what the routes say of a token and channel, y_1 … y_K, all of the
same place of the grid:

    s = Σ_k y_k      v = std_k(y) / (mean_k(y - min_k y) + 1e-5)      out = s · ReLU(v - t)

with the standard deviation of a sample (K - 1 in the divisor), and a threshold t: where all routes say the same,
nothing is said, and the root's gradient is zero there. The heads are put side by side, and

    y = W LN(heads)                                          the mixer; without W the heads themselves
    a, g = W_in x;   a = SiLU(DWConv3×3(a));   y = LN(mixer(a)) · SiLU(g)                   `mhs_vm.gated`

The patterns are `attnlab.nn.scans`' snake (C there), zigzag (X), spiral (S) and raster (Z). All n·K routes go through
one call of the scan. Cost O(K·N·C·S). The U-Net around it is not here.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from attnlab.contract import Given, Layout, TokenMixer, record
from attnlab.nn.activations import silu
from attnlab.nn.depthwise import DepthwiseConv
from attnlab.nn.grids import to_tokens
from attnlab.nn.linear import Linear
from attnlab.nn.norms import LayerNorm
from attnlab.nn.scans import read_routes, scan_routes, write_routes
from attnlab.nn.selective import STEPS, SelectiveScan, Weights, selective_state_space
from attnlab.registry import Cost, Example, Kind, Paper, Source, register
from pallas_kernels.dtypes import at_least_float32

PAPER = Paper(
    "MHS-VM: Multi-Head Scanning in Parallel Subspaces for Vision Mamba", "Ji", 2024, arxiv="2406.05992", number=51
)
_ENTRY: dict[str, Any] = {"paper": PAPER, "source": Source.AUTHORS_CODE, "repository": "PixDeep/MHS-VM"}
PATTERNS = ("snake", "zigzag", "spiral", "raster")
ROUTES = 4


@register(
    "mhs_vm.route_attention",
    kind=Kind.FUNCTION,
    **_ENTRY,
    cost=Cost(time="O(K·N·C)", memory="O(K·N·C)"),
    summary="sums what scans along several routes say of a token, by how much they differ",
    small=lambda: Example(
        scan_route_attention, (jax.random.normal(jax.random.key(0), (2, 5, 4, 3)),), {"threshold": 0.5}
    ),
)
def scan_route_attention(y: ArrayLike, *, threshold: float = 0.0, axis: int = -2, eps: float = 1e-5) -> jax.Array:
    """Fuses routes: the sum, times ReLU(coefficient of variation - threshold), elementwise.

    Args:
      y: what each route says, such as `(B, N, K, C)`, K at least 2.
      threshold: t; below it nothing is said.
      axis: of the routes.
      eps: added to the mean that the standard deviation is divided by.

    Returns:
      y without that axis, in its dtype; computed in float32 (or wider). Equal routes give 0, for t ≥ 0.

    Raises:
      ValueError: for fewer than two routes.
    """
    y = jnp.asarray(y)
    return _fused(y.astype(at_least_float32(y.dtype)), threshold, axis, eps)[0].astype(y.dtype)


def _fused(y: jax.Array, threshold: float, axis: int, eps: float = 1e-5) -> tuple[jax.Array, jax.Array]:
    """The fused routes and the gate that they passed."""
    count = y.shape[axis]
    if count < 2:
        raise ValueError(f"routes differ only where there are at least two, got {count} on axis {axis} of {y.shape}")
    variance = jnp.square(y - y.mean(axis, keepdims=True)).sum(axis) / (count - 1)
    differ = variance > 0
    deviation = jnp.where(differ, jnp.sqrt(jnp.where(differ, variance, 1)), 0)
    above_least = (y - y.min(axis, keepdims=True)).mean(axis)
    gate = jax.nn.relu(deviation / (above_least + eps) - threshold)
    return y.sum(axis) * gate, gate


class ScanHead(nnx.Module):
    """One head: an image's channels d along the routes of one pattern, fused.

    Args:
      features: channels d.
      pattern: of the routes, an order of `attnlab.nn.scans` for images.
      state_size: S.
      threshold: t.
      step_range: of the step sizes at the start.
      param_dtype: of the parameters.
      rngs: stream `params`.

    Raises:
      ValueError: for another pattern.
    """

    def __init__(
        self,
        features: int,
        pattern: str,
        *,
        state_size: int = 16,
        threshold: float = 0.0,
        step_range: tuple[float, float] = STEPS,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if pattern not in PATTERNS:
            raise ValueError(f"pattern must be one of {', '.join(PATTERNS)}, got {pattern!r}")
        self.pattern, self.threshold = pattern, threshold
        sizes = {"routes": ROUTES, "state_size": state_size}
        self.scan = SelectiveScan(features, **sizes, step_range=step_range, param_dtype=param_dtype, rngs=rngs)

    def __call__(self, x: ArrayLike) -> jax.Array:
        """`(B, Hh, Ww, d)` to `(B, N, d)` in the same dtype."""
        x = jnp.asarray(x)
        return _scanned(to_tokens(x)[:, :, None], x.shape[1:-1], [self])[:, :, 0].astype(x.dtype)


def _scanned(
    x: jax.Array, grid: tuple[int, ...], heads: Sequence[ScanHead], mixer: nnx.Module | None = None
) -> jax.Array:
    """Heads `(B, N, n, d)` of a grid along their routes, fused: the same shape, in float32 (or wider)."""
    batch, n, count, size = x.shape
    routes = [scan_routes(head.pattern, grid, paired=True) for head in heads]
    read = jnp.concatenate([read_routes(x[:, :, i], each) for i, each in enumerate(routes)], axis=2)
    y = selective_state_space(read, Weights.joined([head.scan.weights for head in heads]))
    y = y.reshape(batch, n, count, ROUTES, size)
    y = jnp.stack([write_routes(y[:, :, i], each) for i, each in enumerate(routes)], axis=2)
    fused, gate = _fused(y, heads[0].threshold, 3)
    if mixer is not None:
        record(mixer, "gate", lambda: gate)
    return fused


@register(
    "mhs_vm",
    **_ENTRY,
    cost=Cost(time="O(N·C·(C+S))", memory="O(N·C)"),
    kernel="selective_scan",
    summary="selective scans along several routes in each of several subspaces, fused by how much the routes differ",
    small={"state_size": 4},
)
class MultiHeadScan(TokenMixer):
    """Images `(B, H, W, C)` to the same shape. See the module docstring for the equations.

    Args:
      features: channels C.
      patterns: of the heads' routes, one for each of n heads: snake, zigzag, spiral or raster.
      state_size: S.
      threshold: t, below which a coefficient of variation says nothing.
      projected: whether the heads are normed and projected; otherwise n must divide the channels.
      step_range: of the step sizes at the start, log-uniform.
      dtype: of the computation and the result; that of the tokens when None. The scans are float32.
      param_dtype: of the parameters.
      rngs: stream `params`.

    Raises:
      ValueError: for no pattern or another one, more heads than channels, or without projection heads that do not
        divide the channels.
    """

    layouts = frozenset({Layout.IMAGE})
    layout = Layout.IMAGE

    def __init__(
        self,
        features: int,
        *,
        patterns: Sequence[str] = PATTERNS[:3],
        state_size: int = 16,
        threshold: float = 0.0,
        projected: bool = True,
        step_range: tuple[float, float] = STEPS,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        count = len(patterns)
        if not 1 <= count <= features or (not projected and features % count):
            raise ValueError(
                f"patterns must be 1 to {features}, the channels, and divide these where projected=False, got {count}"
            )
        self.features, self.dtype = features, dtype
        stored = {"param_dtype": param_dtype, "rngs": rngs}
        size = features // count
        map_ = {"use_bias": False, "dtype": dtype, **stored}
        self.subspaces = Linear(features, count * size, axes=("embed", None), **map_)
        options: dict[str, Any] = {"state_size": state_size, "threshold": threshold, "step_range": step_range}
        self.heads = nnx.List(ScanHead(size, pattern, **options, **stored) for pattern in patterns)
        self.norm, self.out = nnx.data(None), nnx.data(None)
        if projected:
            self.norm = LayerNorm(count * size, eps=1e-5, **stored)
            self.out = Linear(count * size, features, axes=(None, "embed"), **map_)

    def mix(self, x: jax.Array, given: Given) -> jax.Array:
        z = self.subspaces(to_tokens(x))
        y = _scanned(z.reshape(*z.shape[:2], len(self.heads), -1), x.shape[1:-1], self.heads, self)
        y = y.reshape(z.shape)
        if self.out is not None:
            y = self.out(self.norm(y).astype(x.dtype))
        return y.astype(x.dtype).reshape(x.shape)


@register(
    "mhs_vm.gated",
    **_ENTRY,
    cost=Cost(time="O(N·C·(C+S))", memory="O(N·C)"),
    kernel="selective_scan",
    summary="the multi-head scan behind a depthwise convolution, normed and gated",
    small={"state_size": 4},
)
class GatedMultiHeadScan(TokenMixer):
    """Images `(B, H, W, C)` to the same shape. See the module docstring for the equations.

    Args:
      features: channels C.
      gated: whether the tokens are projected to what is scanned and a gate; otherwise they themselves are convolved.
      kernel_size: side of the convolution, odd.
      patterns: of the heads' routes: see `MultiHeadScan`.
      state_size: S.
      threshold: t.
      projected: whether the heads are normed and projected.
      step_range: of the step sizes at the start.
      dtype: of the computation and the result; that of the tokens when None. The scans are float32.
      param_dtype: of the parameters.
      rngs: stream `params`.

    Raises:
      ValueError: as `MultiHeadScan`.
    """

    layouts = frozenset({Layout.IMAGE})
    layout = Layout.IMAGE

    def __init__(
        self,
        features: int,
        *,
        gated: bool = True,
        kernel_size: int = 3,
        patterns: Sequence[str] = PATTERNS[:3],
        state_size: int = 16,
        threshold: float = 0.0,
        projected: bool = True,
        step_range: tuple[float, float] = STEPS,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.features, self.dtype = features, dtype
        stored = {"param_dtype": param_dtype, "rngs": rngs}
        common = {"dtype": dtype, **stored}
        self.proj_in = nnx.data(None)
        if gated:
            self.proj_in = Linear(features, 2 * features, use_bias=False, **common)
        self.conv = DepthwiseConv(features, (kernel_size, kernel_size), activation=silu, **common)
        self.mixer = MultiHeadScan(
            features,
            patterns=patterns,
            state_size=state_size,
            threshold=threshold,
            projected=projected,
            step_range=step_range,
            **common,
        )
        self.norm = LayerNorm(features, eps=1e-5, **stored)

    def mix(self, x: jax.Array, given: Given) -> jax.Array:
        if self.proj_in is None:
            return self.norm(self.mixer(self.conv(x)))
        inner, gate = jnp.split(self.proj_in(x), 2, axis=-1)
        return self.norm(self.mixer(self.conv(inner))) * silu(gate)
