"""Selective scans of images along orders of choice: what the designs of "A Survey on Visual Mamba" have in common.

    u, g = W_in x;   a = SiLU(DWConv(u))
    y_k = scan of a along route k, k = 1 … K, each with parameters of its own            put back in the grid's order
    out = W_out (LN(merge_k y_k) · SiLU(g))

The scan is Mamba's (`attnlab.nn.selective`), and a route an order of `attnlab.nn.scans`, a second one across it, or one
of them backwards:

| design | order | second, reverse | K |
|---|---|---|---|
| raster, one way | raster | no, no | 1 |
| Vision Mamba | raster | no, yes | 2 |
| VMamba's cross-scan, VideoMamba | raster | yes, yes | 4 |
| PlainMamba | snake | yes, yes | 4 |
| diagonals; spirals | zigzag; spiral | yes, yes | 4 |
| LocalMamba | window | no, no | 1 |
| EfficientVMamba | dilated, restarted in each sub-grid | no, no | 1 |

Routes are merged by their sum or mean, by a linear map of all side by side, or gated by how much they differ (MHS-VM's
scan route attention). With tied parameters and a convolution of one token the cross-scan commutes with transposition
and with half a turn of the image, exactly; with a quarter of a turn it does not. One route of a sequence is causal, and
then decodes with the states of scan and convolution. The survey has no code: orders are those of the designs that it
names. Cost O(K·N·C·S).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from attnlab.contract import Given, Layout, Pattern, Site, TokenMixer, UnsupportedArgument, View
from attnlab.mixers.mhs_vm import scan_route_attention
from attnlab.nn.activations import silu
from attnlab.nn.causal_conv import CausalConv
from attnlab.nn.depthwise import DepthwiseConv
from attnlab.nn.grids import to_tokens
from attnlab.nn.linear import Linear
from attnlab.nn.norms import LayerNorm
from attnlab.nn.scans import inverse_order, read_routes, scan_order, scan_routes, scan_segments, write_routes
from attnlab.nn.selective import STEPS, SelectiveScan, Weights, selective_state_space
from attnlab.points import Edits
from attnlab.registry import Cost, Paper, Source, register

MERGES = ("sum", "mean", "concat", "gated")


class ScanState(NamedTuple):
    """Decode state.

    Attributes:
      memory: state of the scan, `(B, D, S)` float32.
      conv: the last tokens of the convolution, `(B, k - 1, D)` float32.
      length: `(B,)` int32, tokens seen so far.
    """

    memory: jax.Array
    conv: jax.Array
    length: jax.Array


@register(
    "visual_mamba_survey",
    paper=Paper("A Survey on Visual Mamba", "Zhang et al.", 2024, number=75),
    source=Source.ABSTRACT_ONLY,
    cost=Cost(time="O(N·C·(C+S))", memory="O(N·C)", state="C·S"),
    kernel="selective_scan",
    summary="selective scans along a choice of orders of the grid, each way, merged",
    small={"state_size": 4},
)
class Scan2d(TokenMixer):
    """Tokens of any layout to the same shape. See the module docstring for the equations.

    Args:
      features: channels C.
      order: of the routes, one of `attnlab.nn.scans`.
      second: whether there are routes across the first; where there are axes for it when None.
      reverse: whether there are routes backwards; unless causal when None.
      size: sides of windows, or steps of sub-grids, of the orders that have them.
      restart: whether the state is emptied in each window or sub-grid.
      merge: of the routes: sum, mean, concat or gated.
      tied: whether all routes have the same parameters.
      expand: channels D of the scan over C.
      state_size: S.
      kernel_size: tokens on a side of the convolution, odd unless causal.
      step_range: of the step sizes at the start, log-uniform.
      layout: of the tokens.
      causal: whether no token sees a later one: of sequences, along one route.
      dtype: of the computation and the result; that of the tokens when None. Scans are float32.
      param_dtype: of the parameters.
      rngs: stream `params`.

    Raises:
      ValueError: for an unknown merge, a causal mixer with more than one route or on a grid, `restart` of an order
        without windows, or a gate on one route.
    """

    patterns = frozenset({Pattern.SELF, Pattern.CAUSAL_SELF})
    layouts = frozenset(Layout)

    def __init__(
        self,
        features: int,
        *,
        order: str = "raster",
        second: bool | None = None,
        reverse: bool | None = None,
        size: int | tuple[int, ...] | None = None,
        restart: bool = False,
        merge: str = "sum",
        tied: bool = False,
        expand: int = 2,
        state_size: int = 16,
        kernel_size: int = 3,
        step_range: tuple[float, float] = STEPS,
        layout: Layout = Layout.IMAGE,
        causal: bool = False,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.layout, self.causal = Layout(layout), causal
        axes = self.layout.axes
        second = axes > 1 if second is None else second
        reverse = not causal if reverse is None else reverse
        if merge not in MERGES:
            raise ValueError(f"merge must be one of {', '.join(MERGES)}, got {merge!r}")
        if causal and (second or reverse or axes > 1 or order != "raster"):
            raise ValueError(
                f"causal scans are of sequences, along one raster route, got layout {self.layout}, order {order!r}, "
                f"second={second}, reverse={reverse}"
            )
        if second and axes == 1:
            raise ValueError("a sequence has no second route, got second=True")
        if restart and size is None:
            raise ValueError(f"restart needs an order of windows or sub-grids, and their size, got {order!r}")
        self.routes = (2 if second else 1) * (2 if reverse else 1)
        if merge == "gated" and self.routes < 2:
            raise ValueError("a gate looks at how routes differ, and there is one: give second or reverse")
        self.features, self.dtype, self.merge, self.restart = features, dtype, merge, restart
        self.order, self.second, self.reverse = order, second, reverse
        self.size = size if size is None or isinstance(size, int) else tuple(size)
        self.accepts = frozenset({"key_mask", "segment_ids"}) if causal else frozenset({"key_mask"})
        stored = {"param_dtype": param_dtype, "rngs": rngs}
        map_ = {"use_bias": False, "dtype": dtype, **stored}
        width = expand * features
        self.proj_in = Linear(features, 2 * width, axes=("embed", None), **map_)
        if causal:
            self.conv = CausalConv(width, kernel_size, use_bias=True, dtype=dtype, **stored)
        else:
            self.conv = DepthwiseConv(width, (kernel_size,) * axes, axes=(None,), dtype=dtype, **stored)
        routes = {"routes": 1 if tied else self.routes, "state_size": state_size}
        self.scan = SelectiveScan(width, **routes, step_range=step_range, **stored)
        self.concat = nnx.data(None)
        if merge == "concat":
            self.concat = Linear(self.routes * width, width, axes=(None, None), **map_)
        self.norm = LayerNorm(width, eps=1e-5, **stored)
        self.proj_out = Linear(width, features, axes=(None, "embed"), **map_)

    @classmethod
    def check_site(cls, site: Site) -> None:
        super().check_site(site)
        if site.causal and site.layout is not Layout.SEQUENCE:
            raise UnsupportedArgument(f"{cls.__name__} is causal on sequences alone, not on the layout {site.layout}")

    def mix(self, x: jax.Array, given: Given) -> jax.Array:
        grid, mask = x.shape[1:-1], given.mask
        inner, gate = self._projected(x, mask)
        if self.causal:
            inner, _ = self.conv(inner, real=mask, segment_ids=given.segment_ids)
        else:
            inner = self.conv(inner)
        y = self._scanned(to_tokens(silu(inner)), grid, mask, given.segment_ids).reshape(inner.shape)
        return self._merged(y, gate, mask)

    def init_state(self, batch_size: int, max_length: int | None = None, *, dtype: Any = None) -> ScanState:
        """No tokens yet; the size of the state does not depend on `max_length`, and it is float32, or float64.

        Raises:
          UnsupportedArgument: if the mixer is not causal.
        """
        self.check_decodes(False)
        wide = jnp.float64 if dtype is not None and jnp.dtype(dtype) == jnp.float64 else jnp.float32
        memory, conv = self.scan.init_state(batch_size), self.conv.init_state(batch_size)
        return ScanState(memory.astype(wide), conv.astype(wide), jnp.zeros((batch_size,), jnp.int32))

    def prefill(
        self,
        x: ArrayLike,
        state: ScanState,
        *,
        mask: ArrayLike | View | None = None,
        positions: ArrayLike | None = None,
        edits: Edits | None = None,
    ) -> tuple[jax.Array, ScanState]:
        self.check_decodes(False)
        self.check_call(x, mask=mask, positions=positions, decoding=True)
        x = jnp.asarray(x, self.dtype)
        mask = mask.mask if isinstance(mask, View) else mask
        mask = None if mask is None else jnp.asarray(mask)
        inner, gate = self._projected(x, mask)
        inner, conv = self.conv(inner, state.conv, real=mask)
        given = {"initial_state": state.memory, "return_state": True, "real": mask}
        y, memory = self.scan(silu(inner)[:, :, None], **given)
        seen = x.shape[1] if mask is None else jnp.sum(mask, axis=1, dtype=jnp.int32)
        new = ScanState(memory.astype(state.memory.dtype), conv.astype(state.conv.dtype), state.length + seen)
        return self._merged(y[:, :, 0], gate, mask), new

    def step(
        self,
        x_t: ArrayLike,
        state: ScanState,
        *,
        positions: ArrayLike | None = None,
        edits: Edits | None = None,
    ) -> tuple[jax.Array, ScanState]:
        self.check_decodes(False)
        x = jnp.asarray(x_t, self.dtype)[:, None]
        self.check_call(x, positions=positions, decoding=True)
        inner, gate = self._projected(x, None)
        inner, conv = self.conv(inner, state.conv)
        y, memory = self.scan.advance(silu(inner), state.memory)
        new = ScanState(memory.astype(state.memory.dtype), conv.astype(state.conv.dtype), state.length + 1)
        return self._merged(y, gate, None)[:, 0], new

    def _projected(self, x: jax.Array, mask: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """What is scanned, nothing where there is no token, and the gate: `(B, *S, D)` each."""
        inner, gate = jnp.split(self.proj_in(x), 2, axis=-1)
        if mask is not None:
            inner = jnp.where(mask.reshape(*x.shape[:-1], 1), inner, 0)
        return inner, gate

    def _scanned(self, x: jax.Array, grid: tuple[int, ...], mask: jax.Array | None, ids: Any) -> jax.Array:
        """Tokens `(B, N, D)` along all routes, put back and merged: the same shape, in float32 (or wider)."""
        options = {"second": self.second, "reverse": self.reverse, "size": self.size}
        routes = scan_routes(self.order, grid, **options)
        weights = self.scan.weights
        if len(weights.skip) < self.routes:
            weights = Weights(*(jnp.broadcast_to(each, (self.routes, *each.shape[1:])) for each in weights))
        read = read_routes(x, routes)
        real = None if mask is None else mask[:, jnp.asarray(routes.T)]
        if self.restart:
            y = self._restarted(read, weights, real, routes, grid)
        else:
            y = selective_state_space(read, weights, real=real, segment_ids=ids)
        y = write_routes(y, routes)
        match self.merge:
            case "concat":
                return self.concat(y.astype(x.dtype).reshape(*x.shape[:2], -1)).astype(y.dtype)
            case "gated":
                return scan_route_attention(y)
            case "mean":
                return y.mean(2)
        return y.sum(2)

    def _restarted(
        self, x: jax.Array, weights: Weights, real: jax.Array | None, routes: np.ndarray, grid: tuple[int, ...]
    ) -> jax.Array:
        """A call for each route, since they enter windows at steps of their own."""
        of_step = scan_segments(self.order, grid, self.size)
        window = of_step[inverse_order(scan_order(self.order, grid, size=self.size))]  # of each place
        parts = []
        for k, route in enumerate(routes):
            own = Weights(*(each[k : k + 1] for each in weights))
            ids = jnp.broadcast_to(jnp.asarray(window[route]), x.shape[:2])
            there = None if real is None else real[:, :, k]
            parts.append(selective_state_space(x[:, :, k : k + 1], own, real=there, segment_ids=ids))
        return jnp.concatenate(parts, axis=2)

    def _merged(self, y: jax.Array, gate: jax.Array, mask: jax.Array | None) -> jax.Array:
        y = self.proj_out(self.norm(y).astype(gate.dtype) * silu(gate))
        return y if mask is None else jnp.where(mask.reshape(*y.shape[:-1], 1), y, 0)
