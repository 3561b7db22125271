"""Bi-level routing attention, BRA (Zhu et al., 2023, arXiv:2303.08810), code at rayleizhu/BiFormer.

The image is cut into regions (S × S of them). Each region asks which k regions matter to it; its tokens then attend to
the tokens of those alone:

    Q_r, K_r = region means of q, k                       (P, C)
    I        = top-k of s Q_r K_rᵀ                        (P, k)     routing; no gradient passes through it
    y_p      = softmax(s q_p [k_i]ᵀ) [v_i], i ∈ I_p                  tokens of region p, heads apart
    out      = (y + LePE(v)) W_o                                     LePE: a depthwise convolution of v

s = C^-1/2 with all the channels of the queries, not those of a head: kept, since the published weights were trained so.

Options of the code beyond the paper: keys and values pooled inside each region before they are gathered; soft routing,
which multiplies gathered keys and values by the softmax r of the k kept scores; with it, differentiable routing, with a
linear map of the region means if wanted.

Two forms differ where S does not divide the image. `BiLevelRoutingAttention` (the released models) pads the image
before the projection, so padding carries the bias. `RegionalRoutingAttention` (the authors' later refactoring) pads
with zeros after it, leaves padding out of the means, scores regions without s, and fixes the size of a region to
Hh // S × Ww // S, so that there may be more than S². In both, padding is attended to like any token.

Cost O(N·k·(N/S²)·C + S⁴·C), at its least O(N^4/3). Memory is O(N·C) where the regions are read in
place (`listed_attention`); keys and values that are gathered, with soft routing or pooling, take O(k·N·C).
"""

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from attnlab.contract import Given, Layout, Site, TokenMixer, record
from attnlab.nn.dense_mixer import Heads
from attnlab.nn.depthwise import DepthwiseConv
from attnlab.nn.grids import Lengths, crop, pad_to_multiple, to_tokens, window_merge, window_partition
from attnlab.nn.heads import FromHeads, ToHeads, merge_heads, split_heads
from attnlab.nn.linear import uniform_init
from attnlab.nn.resampling import adaptive_avg_pool, adaptive_max_pool, avg_pool, max_pool
from attnlab.nn.softmax import scaled_product
from attnlab.points import Edits, visit
from attnlab.registry import Cost, Paper, Source, register
from pallas_kernels.block_sparse_attention import Blocks, block_sparse_attention
from pallas_kernels.dtypes import at_least_float32

FEW_KEYS = 1024
"""Keys that the regions of an image are given, below which gathering them takes less time than lists of blocks do; the
README of `pallas_kernels.block_sparse_attention` has the numbers."""

KVPooling = Literal["identity", "ada_avgpool", "ada_maxpool", "avgpool", "maxpool"]
_KV_POOLINGS = ("identity", "ada_avgpool", "ada_maxpool", "avgpool", "maxpool")
PAPER = Paper(
    "BiFormer: Vision Transformer with Bi-Level Routing Attention", "Zhu et al.", 2023, arxiv="2303.08810", number=16
)
_COST = Cost(time="O(N·k·(N/S²)·C + S⁴·C)", memory="O(k·N·C)")


def route(q: jax.Array, k: jax.Array, topk: int, scale: float = 1.0) -> tuple[jax.Array, jax.Array]:
    """The regions that each region attends to.

    Args:
      q: descriptors of the asking regions, (B, P, C).
      k: descriptors of the regions asked, (B, R, C).
      topk: regions kept, at most R.
      scale: of the scores.

    Returns:
      Indices (B, P, topk) int32 by descending score, and the softmax of the kept scores, (B, P, topk).

    Raises:
      ValueError: if `topk` exceeds R.
    """
    if not 1 <= topk <= k.shape[1]:
        raise ValueError(f"topk must be from 1 to the number of regions {k.shape[1]}, got {topk}")
    # Rounding the scores would change which regions are chosen; the product is tiny.
    scores = jnp.einsum("bpc,brc->bpr", q * scale, k, precision=jax.lax.Precision.HIGHEST)
    kept, indices = jax.lax.top_k(scores, topk)
    return indices, jax.nn.softmax(kept)


def routed_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    indices: jax.Array,
    *,
    scale: float,
    region_weights: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Attention of the tokens of each region to the tokens of the regions routed to it.

    Args:
      q: (B, P, n, H, D), n tokens in each of P regions.
      k: (B, R, m, H, D).
      v: (B, R, m, H, E).
      indices: of regions, (B, P, K).
      scale: of the scores.
      region_weights: (B, P, K) by which gathered keys and values are multiplied, or None.

    Returns:
      (B, P, n, H, E) in the dtype of `v`, and the weights (B, P, H, n, K, m) in float32 (or wider).
    """
    gather = jax.vmap(lambda tokens, chosen: tokens[chosen])
    k, v = gather(k, indices), gather(v, indices)  # (B, P, K, m, H, D)
    if region_weights is not None:
        factor = region_weights.astype(v.dtype)[..., None, None, None]
        k, v = factor * k, factor * v
    accumulator = at_least_float32(v.dtype)
    weights = jax.nn.softmax(scaled_product("bpnhd,bpkmhd->bphnkm", q, k, scale), axis=(-2, -1))
    y = jnp.einsum("bphnkm,bpkmhe->bpnhe", weights.astype(v.dtype), v, preferred_element_type=accumulator)
    return y.astype(v.dtype), weights


def listed_attention(q: jax.Array, k: jax.Array, v: jax.Array, indices: jax.Array, *, scale: float) -> jax.Array:
    """`routed_attention` without region weights, of regions that are read where they are: nothing is gathered.

    Args:
      q: (B, P, n, H, D).
      k: (B, R, m, H, D).
      v: (B, R, m, H, E).
      indices: of regions, (B, P, K), no region twice.
      scale: of the scores.

    Returns:
      (B, P, n, H, E) in the dtype of `v`.
    """
    blocks = Blocks.from_indices(indices[:, None], q.shape[2], k.shape[2])
    y = block_sparse_attention(*(_flat(x) for x in (q, k, v)), blocks=blocks, scale=scale)
    return y.reshape(*q.shape[:-1], -1)


def region_attention(q: jax.Array, k: jax.Array, v: jax.Array, indices: jax.Array, *, scale: float) -> jax.Array:
    """`listed_attention`, or for few keys in all `routed_attention`, which gathers them in less time."""
    if indices.shape[1] * indices.shape[2] * k.shape[2] < FEW_KEYS:
        return routed_attention(q, k, v, indices, scale=scale)[0]
    return listed_attention(q, k, v, indices, scale=scale)


def _flat(regions: jax.Array) -> jax.Array:
    """(B, P, n, H, D) to (B, P·n, H, D)."""
    return regions.reshape(regions.shape[0], -1, *regions.shape[3:])


def scatter_map(
    weights: jax.Array, indices: jax.Array, region: tuple[int, int], padded: tuple[int, int], grid: tuple[int, int]
) -> jax.Array:
    """Weights of `routed_attention` as one map over the image, zero where nothing was routed.

    Args:
      weights: (B, P, H, n, K, m), one key for each token of a region.
      indices: (B, P, K).
      region: (h, w), n = m = h·w.
      padded: (Hh', Ww') that the regions tile.
      grid: (Hh, Ww); padding beyond it is cut off.

    Returns:
      (B, H, N, N), tokens in row-major order.
    """
    (batch, regions, heads, tokens), count = weights.shape[:4], math.prod(grid)
    chosen = jax.nn.one_hot(indices, regions, dtype=weights.dtype)
    full = jnp.einsum("bphnkm,bpkr->bhpnrm", weights, chosen)
    full = crop(window_merge(full.reshape(-1, regions, tokens, 1), region, padded), grid)
    full = full.reshape(batch * heads, regions, tokens, count)
    return crop(window_merge(full, region, padded), grid).reshape(batch, heads, count, count)


class _RoutedAttention(TokenMixer):
    """What both forms share: projections, local enhancement, and attention once regions are chosen."""

    layouts = frozenset({Layout.IMAGE})
    layout = Layout.IMAGE
    points = frozenset({"qkv", "heads"})
    scale: float

    def __init__(
        self,
        features: int,
        *,
        num_heads: int,
        n_win: int,
        topk: int,
        qk_dim: int,
        side_dwconv: int,
        has_out: bool = True,
        kernel_init: nnx.Initializer | None = None,
        dtype: Any,
        param_dtype: Any,
        rngs: nnx.Rngs,
    ):
        if features % num_heads or qk_dim % num_heads:
            raise ValueError(f"num_heads must divide features {features} and qk_dim {qk_dim}, got {num_heads}")
        if n_win < 1:
            raise ValueError(f"n_win must be at least 1, got {n_win}")
        if topk < 1:
            raise ValueError(f"topk must be at least 1, got {topk}")
        if side_dwconv < 0 or (side_dwconv and side_dwconv % 2 == 0):
            raise ValueError(f"side_dwconv must be odd, or 0 for none, got {side_dwconv}")
        self.features, self.num_heads, self.n_win, self.topk, self.dtype = features, num_heads, n_win, topk, dtype
        key_size, size = qk_dim // num_heads, features // num_heads
        common = {"param_dtype": param_dtype, "rngs": rngs}
        drawn = common if kernel_init is None else common | {"kernel_init": kernel_init, "bias_init": kernel_init}
        self.query, self.key, self.value = (
            ToHeads(features, num_heads, d, **drawn) for d in (key_size, key_size, size)
        )
        side = (side_dwconv, side_dwconv)
        self.lepe = DepthwiseConv((num_heads, size), side, **common) if side_dwconv else nnx.data(None)
        self.out = FromHeads(num_heads, size, features, **drawn) if has_out else nnx.data(None)

    @classmethod
    def site_defaults(cls, site: Site) -> dict[str, Any]:
        """Regions of at least two tokens that tile the grid, up to the usual 7 × 7 of them; at most half are kept."""
        if site.grid is None:
            return {}
        tokens = math.prod(site.grid)
        sides = [n for n in range(1, 8) if not any(length % n for length in site.grid) and tokens >= 2 * n**2]
        n_win = max(sides, default=1)
        return {"n_win": n_win, "topk": min(4, max(1, n_win**2 // 2))}

    def _project(self, x: jax.Array, edits: Edits | None) -> list[jax.Array]:
        """Queries, keys and values as images (B, Hh, Ww, H, D)."""
        tokens = to_tokens(x)
        heads = visit(self, edits, "qkv", Heads(self.query(tokens), self.key(tokens), self.value(tokens)))
        return [part.reshape(*x.shape[:3], *part.shape[2:]) for part in heads[:3]]

    def _merge(self, y: jax.Array, local_of: jax.Array, grid: tuple[int, ...], edits: Edits | None) -> jax.Array:
        """Attention (B, Hh', Ww', H, E) and the local term of values, without what is beyond the grid, to tokens."""
        y = crop(y, grid)
        y = y if self.lepe is None else y + crop(self.lepe(local_of), grid)
        y = visit(self, edits, "heads", y.reshape(y.shape[0], -1, *y.shape[3:]))
        y = merge_heads(y) if self.out is None else self.out(y)
        return y.reshape(y.shape[0], *grid, -1)


def _pad(x: jax.Array, multiple: Lengths, fill: jax.Array | None = None) -> jax.Array:
    """Images of heads, lengthened at their ends to multiples: by zeros, or by `fill` (H, D)."""
    image, real = pad_to_multiple(merge_heads(x), multiple)
    image = split_heads(image, x.shape[3])
    return image if fill is None or real is None else jnp.where(real[..., None, None], image, fill.astype(x.dtype))


def _regions(x: jax.Array, region: tuple[int, int]) -> jax.Array:
    """Images of heads (B, Hh, Ww, H, D) to regions (B, P, n, H, D)."""
    return split_heads(window_partition(merge_heads(x), region), x.shape[3])


def _image(regions: jax.Array, region: tuple[int, int], grid: tuple[int, ...]) -> jax.Array:
    """The inverse of `_regions`."""
    return split_heads(window_merge(merge_heads(regions), region, grid), regions.shape[3])


@register(
    "biformer_bra",
    paper=PAPER,
    source=Source.AUTHORS_CODE,
    repository="rayleizhu/BiFormer",
    cost=_COST,
    summary="each region attends to the tokens of the k regions whose mean keys match its mean query",
)
class BiLevelRoutingAttention(_RoutedAttention):
    """Attention of images (B, Hh, Ww, C) among routed regions, as in the released BiFormer.

    Args:
      features: channels C.
      num_heads: heads H.
      n_win: regions per side, S.
      topk: regions that each region attends to, at most S².
      qk_dim: channels of queries and keys; C when None.
      qk_scale: s, of both the routing and the token scores; qk_dim^-1/2 when None.
      kv_downsample_mode: how keys and values are pooled inside a region: "identity" (not at all), "ada_avgpool" or
        "ada_maxpool" (to `kv_per_win` a side), "avgpool" or "maxpool" (by `kv_downsample_ratio` a side).
      kv_per_win: keys per side of a region, for the adaptive modes.
      kv_downsample_ratio: side of a pooling window, for the other modes; 1 pools nothing.
      param_attention: "qkvo", or "qkv" for no output projection.
      param_routing: whether the region means pass a linear map; needs `diff_routing`.
      diff_routing: whether gradients pass through the kept scores; needs `soft_routing`.
      soft_routing: whether gathered keys and values are multiplied by the softmax of the kept scores.
      side_dwconv: side of the local enhancement's kernel, odd; 0 for none.
      auto_pad: whether images that S does not divide are padded; else they are refused.
      dtype: of the computation and the result; that of the input when None.
      param_dtype: of the parameters.
      rngs: stream `params`.

    Raises:
      ValueError: for options that do not fit together or are out of range, in words.
    """

    def __init__(
        self,
        features: int,
        *,
        num_heads: int = 8,
        n_win: int = 7,
        topk: int = 4,
        qk_dim: int | None = None,
        qk_scale: float | None = None,
        kv_downsample_mode: KVPooling = "identity",
        kv_per_win: int = 4,
        kv_downsample_ratio: int = 4,
        param_attention: Literal["qkvo", "qkv"] = "qkvo",
        param_routing: bool = False,
        diff_routing: bool = False,
        soft_routing: bool = False,
        side_dwconv: int = 3,
        auto_pad: bool = False,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        qk_dim = features if qk_dim is None else qk_dim
        super().__init__(
            features,
            num_heads=num_heads,
            n_win=n_win,
            topk=topk,
            qk_dim=qk_dim,
            side_dwconv=side_dwconv,
            has_out=param_attention == "qkvo",
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        if topk > n_win**2:
            raise ValueError(f"topk must be at most the number of regions {n_win**2}, got {topk}")
        if kv_downsample_mode not in _KV_POOLINGS:
            raise ValueError(f"kv_downsample_mode must be one of {', '.join(_KV_POOLINGS)}, got {kv_downsample_mode!r}")
        if param_attention not in ("qkvo", "qkv"):
            raise ValueError(f"param_attention must be 'qkvo' or 'qkv', got {param_attention!r}")
        if param_routing and not diff_routing:
            raise ValueError("param_routing learns nothing without diff_routing")
        if diff_routing and not soft_routing:
            raise ValueError("diff_routing needs soft_routing: the choice of regions alone has no gradient")
        if kv_downsample_mode.startswith("ada_") and kv_per_win < 1:
            raise ValueError(f"kv_per_win must be at least 1 with {kv_downsample_mode}, got {kv_per_win}")
        self.scale = qk_dim**-0.5 if qk_scale is None else qk_scale
        self.kv_downsample_mode, self.kv_per_win, self.kv_ratio = kv_downsample_mode, kv_per_win, kv_downsample_ratio
        self.diff_routing, self.soft_routing, self.auto_pad = diff_routing, soft_routing, auto_pad
        options = {"param_dtype": param_dtype, "rngs": rngs}
        self.router = FromHeads(num_heads, qk_dim // num_heads, qk_dim, **options) if param_routing else nnx.data(None)

    @classmethod
    def site_defaults(cls, site: Site) -> dict[str, Any]:
        return super().site_defaults(site) | {"auto_pad": True}

    def mix(self, x: jax.Array, given: Given) -> jax.Array:
        grid = x.shape[1:3]
        q, k, v = self._padded(x, given.edits)
        padded = v.shape[1:3]
        region = self._region(padded)
        indices, region_weights = self._route(q, k, region)
        arrays = _regions(q, region), *(self._pool(_regions(a, region), region) for a in (k, v))
        options = {"scale": self.scale, "region_weights": region_weights if self.soft_routing else None}

        def weights() -> jax.Array:
            return routed_attention(*arrays, indices, **options)[1]

        # Regions of a few pooled keys are small blocks, and small to gather; a weight per pair of regions is no block.
        if self.kv_downsample_mode == "identity" and not self.soft_routing:
            y = region_attention(*arrays, indices, scale=self.scale)
        else:
            y, _ = routed_attention(*arrays, indices, **options)
        record(self, "attention", lambda: scatter_map(self._unpool(weights(), region), indices, region, padded, grid))
        return self._merge(_image(y, region, padded), v, grid, given.edits)

    def routing(self, x: ArrayLike) -> tuple[jax.Array, jax.Array]:
        """Which regions each region of `x` attends to, and their softmaxed scores: two arrays (B, S², topk)."""
        self.check_call(x)
        q, k, v = self._padded(jnp.asarray(x, self.dtype), None)
        return self._route(q, k, self._region(v.shape[1:3]))

    def _padded(self, x: jax.Array, edits: Edits | None) -> list[jax.Array]:
        """Projected images; padding is what the projections make of zeros."""
        parts, layers = self._project(x, edits), (self.query, self.key, self.value)
        if not self.auto_pad:
            return parts
        return [_pad(part, self.n_win, layer.bias[...]) for part, layer in zip(parts, layers, strict=True)]

    def _region(self, grid: tuple[int, int]) -> tuple[int, int]:
        if any(length % self.n_win for length in grid):
            raise ValueError(
                f"n_win {self.n_win} does not divide the image {tuple(grid)}; auto_pad=True pads it with zeros"
            )
        return grid[0] // self.n_win, grid[1] // self.n_win

    def _route(self, q: jax.Array, k: jax.Array, region: tuple[int, int]) -> tuple[jax.Array, jax.Array]:
        means = [_means(_regions(a, region)) for a in (q, k)]
        if not self.diff_routing:
            means = [jax.lax.stop_gradient(a) for a in means]
        means = [merge_heads(a) if self.router is None else self.router(a) for a in means]
        return route(*means, self.topk, self.scale)

    def _pool(self, x: jax.Array, region: tuple[int, int]) -> jax.Array:
        """Tokens of regions (B, P, h·w, H, D) pooled to (B, P, m, H, D)."""
        if self.kv_downsample_mode == "identity":
            return x
        maps = x.reshape(-1, *region, math.prod(x.shape[3:]))
        if self.kv_downsample_mode.startswith("ada_"):
            pool = adaptive_avg_pool if self.kv_downsample_mode == "ada_avgpool" else adaptive_max_pool
            maps = pool(maps, self.kv_per_win)
        elif self.kv_ratio > 1:
            maps = (avg_pool if self.kv_downsample_mode == "avgpool" else max_pool)(maps, self.kv_ratio)
        return maps.reshape(*x.shape[:2], -1, *x.shape[3:])

    def _unpool(self, weights: jax.Array, region: tuple[int, int]) -> jax.Array:
        """Weights (..., m) of pooled keys to weights (..., h·w) of tokens: a key's is shared evenly by its tokens."""
        if self.kv_downsample_mode == "identity":
            return weights

        def pool(tokens: jax.Array) -> jax.Array:
            maps = tokens.reshape(-1, *region, 1)
            if self.kv_downsample_mode.startswith("ada_"):
                maps = adaptive_avg_pool(maps, self.kv_per_win)
            elif self.kv_ratio > 1:
                maps = avg_pool(maps, self.kv_ratio)
            return maps.reshape(weights.shape)

        tokens = jax.ShapeDtypeStruct((*weights.shape[:-1], math.prod(region)), weights.dtype)
        return jax.linear_transpose(pool, tokens)(weights)[0]


def _means(regions: jax.Array) -> jax.Array:
    """(B, P, n, H, D) to (B, P, H, D), in float32 (or wider): scores that are close must not be rounded together."""
    return regions.astype(at_least_float32(regions.dtype)).mean(2)


@register(
    "biformer_bra.nchw",
    paper=PAPER,
    source=Source.AUTHORS_CODE,
    repository="rayleizhu/BiFormer",
    cost=_COST,
    summary="bi-level routing attention as its authors refactored it: any image size, padding after the projection",
)
class RegionalRoutingAttention(_RoutedAttention):
    """Attention of images (B, Hh, Ww, C) among routed regions of Hh // S × Ww // S tokens.

    The authors' `nchwBRA`; the name of the registered variant remembers its channel-first layout, here channels are
    last as everywhere.

    Args:
      features: channels C.
      num_heads: heads H.
      n_win: S, which fixes the size of a region; an image that it does not divide has more than S² regions.
      topk: regions that each region attends to.
      qk_scale: of the token scores; C^-1/2 when None.
      side_dwconv: side of the local enhancement's kernel, odd; 0 for none.
      dtype: of the computation and the result; that of the input when None.
      param_dtype: of the parameters.
      rngs: stream `params`.

    Raises:
      ValueError: if the heads do not divide the channels, or an option is out of range; in the call, if the image has
        fewer than S rows or columns, or fewer than `topk` regions.
    """

    def __init__(
        self,
        features: int,
        *,
        num_heads: int = 8,
        n_win: int = 7,
        topk: int = 4,
        qk_scale: float | None = None,
        side_dwconv: int = 3,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        super().__init__(
            features,
            num_heads=num_heads,
            n_win=n_win,
            topk=topk,
            qk_dim=features,
            side_dwconv=side_dwconv,
            kernel_init=uniform_init(features),
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        self.scale = features**-0.5 if qk_scale is None else qk_scale

    def mix(self, x: jax.Array, given: Given) -> jax.Array:
        grid = x.shape[1:3]
        if min(grid) < self.n_win:
            raise ValueError(f"n_win {self.n_win} is more than the image {tuple(grid)} has rows or columns")
        region = grid[0] // self.n_win, grid[1] // self.n_win
        q, k, v = self._project(x, given.edits)
        indices, _ = route(*(self._region_means(merge_heads(a), region) for a in (q, k)), self.topk)
        q, k, padded_v = (_pad(a, region) for a in (q, k, v))
        padded = q.shape[1:3]
        arrays = [_regions(a, region) for a in (q, k, padded_v)]
        y = region_attention(*arrays, indices, scale=self.scale)

        def weights() -> jax.Array:
            return routed_attention(*arrays, indices, scale=self.scale)[1]

        record(self, "attention", lambda: scatter_map(weights(), indices, region, padded, grid))
        return self._merge(_image(y, region, padded), v, grid, given.edits)

    @staticmethod
    def _region_means(x: jax.Array, region: tuple[int, int]) -> jax.Array:
        """(B, Hh, Ww, C) to (B, P, C), padding not counted; gradients pass the token attention alone."""
        wide = jax.lax.stop_gradient(x).astype(at_least_float32(x.dtype))
        means = avg_pool(wide, region, ceil_mode=True, count_include_pad=False)
        return means.reshape(x.shape[0], -1, x.shape[-1])
