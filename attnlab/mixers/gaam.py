"""Gaussian adaptive attention, GAAM (Ioannides et al., 2024, arXiv:2401.11143), code at
gioannides/Gaussian-Adaptive-Attention.

Values are weighted by how they stand to their own mean; there are no queries, keys or projections. An axis of n values
is cut into H chunks of n // H values, the last of which takes the remainder, and chunk h has G offsets δ and widths c
of its own, the same at all places beside the axis. With the chunk's mean μ and unbiased variance plus eps σ²:

    p_i = Π_g exp(-(x_i - μ - δ_g)² / 2c_g²σ²) / √(2π c_g²)         w_i = p_i / max(Σ_j p_j, eps)         y_i = w_i x_i

The weights of a chunk sum to 1, so that y is about n/H times smaller than x; a stack of layers adds x. A product of
Gaussians is one Gaussian: the weights have one maximum, at the precision-weighted mean of the offsets, although the
paper speaks of a mixture for any distribution. Where p is nowhere large, because the Gaussians are many and wide, or
narrow and far from all values of a small chunk, the floor of the sum takes weight away, and may leave none. Cost
O(N·C): two reductions and a softmax.

There are two kinds of padding. `padding_value` is the authors': every element that equals it is set to zero in mean and
variance, which still count it; it has a share in the sum of the weights, and passes unchanged. A key mask is ours:
tokens that do not exist are as if they were not there, chunks are cut among those that do, and the result at the others
is zero. Packed segments are each as they would be alone.

A chunk of one value has variance eps here, where the authors' code gives NaN. Their multi-head class computes with
eps = 1e-8, whatever it is given.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from attnlab.contract import Given, Layout, Pattern, TokenMixer, record
from attnlab.nn.gaussian_weights import Gaussian, GaussianHead, head_arrays, product
from attnlab.nn.masking import SegmentIds, segment_pair, segment_positions
from attnlab.registry import Cost, Paper, Source, register
from pallas_kernels.dtypes import at_least_float32

PAPER = Paper(
    "Gaussian Adaptive Attention is All You Need: Robust Contextual Representations Across Multiple Modalities",
    "Ioannides et al.",
    2024,
    arxiv="2401.11143",
    number=55,
)
REPOSITORY = "gioannides/Gaussian-Adaptive-Attention"

Reduce = Callable[[jax.Array], jax.Array]


def gaussian_attention(
    x: ArrayLike,
    mean_offsets: ArrayLike,
    widths: ArrayLike,
    *,
    axis: int = -1,
    mask: ArrayLike | None = None,
    segment_ids: SegmentIds | None = None,
    padding_value: float | None = None,
    eps: float = 1e-8,
) -> tuple[jax.Array, jax.Array]:
    """Weighs the values along an axis; arguments as `gaussian_weights`.

    Returns:
      y of the shape and dtype of `x`, and the weights of the same shape in float32.
    """
    x = jnp.asarray(x)
    weights = gaussian_weights(
        x, mean_offsets, widths, axis=axis, mask=mask, segment_ids=segment_ids, padding_value=padding_value, eps=eps
    )
    y = (x.astype(weights.dtype) * weights).astype(x.dtype)
    if padding_value is not None:
        y = jnp.where(_padded(x, padding_value), x, y)
    return y if mask is None else jnp.where(jnp.asarray(mask)[..., None], y, 0), weights


def gaussian_weights(
    x: ArrayLike,
    mean_offsets: ArrayLike,
    widths: ArrayLike,
    *,
    axis: int = -1,
    mask: ArrayLike | None = None,
    segment_ids: SegmentIds | None = None,
    padding_value: float | None = None,
    eps: float = 1e-8,
) -> jax.Array:
    """The weights w of the module docstring, of the shape of `x`, in float32 (or wider).

    Args:
      x: values of any shape.
      mean_offsets: δ, (H, G), in the units of `x`.
      widths: c, (H, G), in standard deviations.
      axis: along which chunks are cut, one for each head. Fewer values than heads are all the last head's.
      mask: (B, N) boolean, which tokens of `x` (B, N, C) exist; the axis must be that of the tokens. The weights of
        the others are zero.
      segment_ids: (B, N), for such an `x`: every run of equal ids is treated as it would be alone.
      padding_value: elements of this value are zero in mean and variance.
      eps: added to the variance, and the least that weights are divided by.

    Raises:
      ValueError: for an axis that `x` does not have, offsets and widths that are not (H, G) both, and for a mask or
        ids that do not fit.
    """
    x = jnp.asarray(x)
    x = x.astype(at_least_float32(x.dtype))
    if not -x.ndim <= axis < x.ndim:
        raise ValueError(f"axis {axis} is none of x, which has shape {x.shape}")
    if jnp.ndim(widths) != 2 or jnp.shape(mean_offsets) != jnp.shape(widths):
        raise ValueError(
            f"mean_offsets and widths must both be (H, G), got {jnp.shape(mean_offsets)} and {jnp.shape(widths)}"
        )
    counted = x if padding_value is None else jnp.where(_padded(x, padding_value), 0, x)
    gaussian = product(mean_offsets, widths)
    if mask is None and segment_ids is None:
        return _along_axis(x, counted, gaussian, axis, eps)
    if x.ndim != 3 or axis % 3 != 1:
        raise ValueError(f"a mask and segment_ids are for axis 1 of tokens (B, N, C), got axis {axis} of {x.shape}")
    return _along_tokens(x, counted, gaussian, mask, segment_ids, eps)


def importance_factor(weights: ArrayLike, axis: int | tuple[int, ...] = 0) -> jax.Array:
    """The paper's importance of features: their mean weights, scaled to 0 for the least and 1 for the largest of them.

        IF_i = (W_i - min W) / (max W - min W)        W = mean of the weights over `axis`

    Args:
      weights: w of examples, at least one axis more than `axis` names.
      axis: of samples and times, over which weights are averaged.

    Returns:
      Float32 (or wider) of the shape that is left; zeros where all are equal.
    """
    weights = jnp.asarray(weights)
    mean = weights.astype(at_least_float32(weights.dtype)).mean(axis)
    span = mean.max() - mean.min()
    return (mean - mean.min()) / jnp.where(span == 0, 1, span)


def _padded(x: jax.Array, padding_value: float) -> jax.Array:
    return x == jnp.asarray(padding_value, x.dtype)


class _Chunks(NamedTuple):
    """How values are summed over their chunk: `total` and `largest` give results that broadcast against the values."""

    total: Reduce
    largest: Reduce
    size: jax.Array | int

    def weights(self, x: jax.Array, counted: jax.Array, gaussian: Gaussian, eps: float) -> jax.Array:
        """w of values x, with mean and variance of the values `counted`."""
        mean = self.total(counted) / self.size
        variance = self.total(jnp.square(counted - mean)) / jnp.maximum(self.size - 1, 1) + eps
        exponent = gaussian.exponent(x - mean, variance)
        top = jax.lax.stop_gradient(self.largest(exponent))
        log_sum = jnp.log(self.total(jnp.exp(exponent - top))) + top
        if eps > 0:  # the floor of Σ p, without the factor that all p of the chunk share
            log_sum = jnp.maximum(log_sum, jnp.log(eps) - gaussian.height + gaussian.depth / variance)
        return jnp.exp(exponent - log_sum)


def _along_axis(x: jax.Array, counted: jax.Array, gaussian: Gaussian, axis: int, eps: float) -> jax.Array:
    x, counted = jnp.moveaxis(x, axis, -1), jnp.moveaxis(counted, axis, -1)
    heads, n = len(gaussian.slope), x.shape[-1]
    # Chunks of one size are computed together: all heads, or all but the last one.
    alike = heads if n % heads == 0 else heads - 1
    cut, parts = alike * (n // heads), []
    for values, first, last in ((slice(0, cut), 0, alike), (slice(cut, n), alike, heads)):
        if values.start == values.stop:
            continue
        shape = (*x.shape[:-1], last - first, -1)
        chunks = _Chunks(
            lambda a: a.sum(-1, keepdims=True),
            lambda a: a.max(-1, keepdims=True),
            (values.stop - values.start) // (last - first),
        )
        terms = Gaussian(*(term[first:last, None] for term in gaussian))
        weights = chunks.weights(x[..., values].reshape(shape), counted[..., values].reshape(shape), terms, eps)
        parts.append(weights.reshape(*x.shape[:-1], -1))
    return jnp.moveaxis(jnp.concatenate(parts, -1), -1, axis)


def _along_tokens(
    x: jax.Array,
    counted: jax.Array,
    gaussian: Gaussian,
    mask: ArrayLike | None,
    segment_ids: SegmentIds | None,
    eps: float,
) -> jax.Array:
    batch, n, _ = x.shape
    exists = jnp.ones((batch, n), bool) if mask is None else jnp.asarray(mask)
    ids = jnp.zeros((batch, n), jnp.int32) if segment_ids is None else segment_pair(segment_ids)[0]
    for name, array in (("mask", exists), ("segment_ids", ids)):
        if array.shape != (batch, n):
            raise ValueError(f"{name} must be {(batch, n)}, got {array.shape}")
    head, chunk = _chunks_among(exists, ids, len(gaussian.slope))
    # Tokens that do not exist are a chunk of their own, of zeros.
    x, counted = (jnp.where(exists[..., None], a, 0) for a in (x, counted))

    def spread(reduce: Callable[..., jax.Array]) -> Reduce:
        def over_chunks(a: jax.Array) -> jax.Array:
            reduced = jax.vmap(lambda a, chunk: reduce(a, chunk, n + 1))(a, chunk)
            return jnp.take_along_axis(reduced, chunk[..., None], axis=1)

        return over_chunks

    total, largest = spread(jax.ops.segment_sum), spread(jax.ops.segment_max)
    chunks = _Chunks(total, largest, total(jnp.ones((batch, n, 1), x.dtype)))
    terms = Gaussian(*(term[head][..., None] for term in gaussian))
    return jnp.where(exists[..., None], chunks.weights(x, counted, terms, eps), 0)


def _chunks_among(exists: jax.Array, ids: jax.Array, heads: int) -> tuple[jax.Array, jax.Array]:
    """The head of each token and the number of its chunk, both (B, N); chunks count from 0, N is for no token.

    A chunk has the number of a place in its segment that no other chunk has, so that N numbers are enough.
    """
    n = exists.shape[1]
    start = jnp.arange(n) - segment_positions(ids)
    before = jnp.cumsum(exists, 1) - exists
    rank = before - jnp.take_along_axis(before, start, 1)
    counts = jax.vmap(lambda e, s: jax.ops.segment_sum(e, s, n))(exists.astype(jnp.int32), start)
    size = jnp.take_along_axis(counts, start, 1) // heads
    head = jnp.where(size > 0, jnp.minimum(rank // jnp.maximum(size, 1), heads - 1), heads - 1)
    return head, jnp.where(exists, start + head * size, n)


@register(
    "gaam",
    paper=PAPER,
    source=Source.AUTHORS_CODE,
    repository=REPOSITORY,
    cost=Cost(time="O(N·C)", memory="O(N·C)"),
    summary="values weighted by a product of learned Gaussians around their own mean; no queries, keys or projections",
)
class GaussianAttention(TokenMixer):
    """Tokens of any layout to the same shape. See the module docstring for the equations.

    Args:
      features: channels C; None for any number.
      num_heads: chunks H of the axis, each with Gaussians of its own.
      num_gaussians: G.
      axis: `"tokens"`: each channel over all tokens, those of images and videos in row-major order; `"channels"`: each
        token over its channels; or a number: one axis of x, as in the authors' code. At 0, the batch's, examples depend
        on each other.
      padding_value: elements of this value are zero in mean and variance, and pass unchanged.
      eps: added to the variance, and the least that weights are divided by.
      layout: of the tokens.
      dtype: of the result; that of the tokens when None.
      param_dtype: of the parameters.
      rngs: stream `params`.

    Raises:
      ValueError: for an axis of another name, a head or a Gaussian too few, or a negative eps.
    """

    patterns = frozenset({Pattern.SELF})
    layouts = frozenset(Layout)

    def __init__(
        self,
        features: int | None,
        *,
        num_heads: int = 1,
        num_gaussians: int = 5,
        axis: str | int = "tokens",
        padding_value: float | None = None,
        eps: float = 1e-8,
        layout: Layout = Layout.SEQUENCE,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if isinstance(axis, str) and axis not in ("tokens", "channels"):
            raise ValueError(f"axis must be 'tokens', 'channels' or a number, got {axis!r}")
        if num_heads < 1:
            raise ValueError(f"num_heads must be at least 1, got {num_heads}")
        if eps < 0:
            raise ValueError(f"eps must be at least 0, got {eps}")
        self.features, self.axis, self.padding_value, self.eps = features, axis, padding_value, eps
        self.layout, self.dtype = layout, dtype
        self.accepts = frozenset({"key_mask", "segment_ids"} if axis == "tokens" else ())
        # Chunks of tokens are cut by their order.
        self.permutation_equivariant = axis == "channels" or num_heads == 1
        self.heads = nnx.List(
            [GaussianHead(num_gaussians, param_dtype=param_dtype, rngs=rngs) for _ in range(num_heads)]
        )

    def mix(self, x: jax.Array, given: Given) -> jax.Array:
        return self.weigh(x, given.mask, given.segment_ids)[0]

    def weigh(
        self, x: ArrayLike, mask: ArrayLike | None = None, segment_ids: SegmentIds | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """The result and the weights, of the shape of `x`, which may have any rank from 2; arguments as the call."""
        x = jnp.asarray(x, self.dtype)
        axis = self.axis if isinstance(self.axis, int) else {"tokens": 1, "channels": -1}[self.axis]
        shape = x.shape
        y, weights = gaussian_attention(
            x.reshape(shape[0], -1, shape[-1]) if self.axis == "tokens" else x,
            *head_arrays(self.heads),
            axis=axis,
            mask=mask,
            segment_ids=segment_ids,
            padding_value=self.padding_value,
            eps=self.eps,
        )
        y, weights = y.reshape(shape), weights.reshape(shape)
        record(self, "gate", lambda: weights)
        return y, weights


@register(
    "gaam.stack",
    paper=PAPER,
    source=Source.AUTHORS_CODE,
    repository=REPOSITORY,
    cost=Cost(time="O(L·N·C)", memory="O(L·N·C)"),
    summary="several layers of Gaussian attention, each added to its input",
)
class GaussianStack(TokenMixer):
    """Layers x ← GaussianAttention(x) + x, tokens of any layout to the same shape.

    With a key mask, tokens that do not exist give zeros.

    Args:
      features: channels C; None for any number.
      depth: L, number of layers.
      num_heads: H of all layers, or of each; so are the next four, which are those of `GaussianAttention`.
      num_gaussians: G.
      axis: `"tokens"`, `"channels"` or a number.
      padding_value: elements of this value are zero in mean and variance; they pass a layer doubled.
      eps: added to the variance, and the least that weights are divided by.
      layout: of the tokens.
      dtype: of the result; that of the tokens when None.
      param_dtype: of the parameters.
      rngs: stream `params`.

    Raises:
      ValueError: as `GaussianAttention`, and for no layers or a sequence of another length.
    """

    patterns = frozenset({Pattern.SELF})
    layouts = frozenset(Layout)

    def __init__(
        self,
        features: int | None,
        *,
        depth: int = 2,
        num_heads: int | Sequence[int] = 1,
        num_gaussians: int | Sequence[int] = 5,
        axis: str | int | Sequence[str | int] = "tokens",
        padding_value: float | Sequence[float | None] | None = None,
        eps: float | Sequence[float] = 1e-8,
        layout: Layout = Layout.SEQUENCE,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if depth < 1:
            raise ValueError(f"depth must be at least 1, got {depth}")
        given = {
            "num_heads": num_heads,
            "num_gaussians": num_gaussians,
            "axis": axis,
            "padding_value": padding_value,
            "eps": eps,
        }
        options = {name: _for_each(name, value, depth) for name, value in given.items()}
        common: Any = {"layout": layout, "dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.layers = nnx.List(
            [GaussianAttention(features, **{n: v[i] for n, v in options.items()}, **common) for i in range(depth)]
        )
        self.features, self.layout, self.dtype = features, layout, dtype
        self.accepts = frozenset.intersection(*(layer.accepts for layer in self.layers))
        self.permutation_equivariant = all(layer.permutation_equivariant for layer in self.layers)

    def mix(self, x: jax.Array, given: Given) -> jax.Array:
        return self.weigh(x, given.mask, given.segment_ids)[0]

    def weigh(
        self, x: ArrayLike, mask: ArrayLike | None = None, segment_ids: SegmentIds | None = None
    ) -> tuple[jax.Array, list[jax.Array]]:
        """The result, and the weights of each layer, as `GaussianAttention.weigh`."""
        x, weights = jnp.asarray(x, self.dtype), []
        if mask is not None:
            x = jnp.where(jnp.asarray(mask).reshape(*x.shape[:-1], 1), x, 0)
        for layer in self.layers:
            y, w = layer.weigh(x, mask, segment_ids)
            x = x + y
            weights.append(w)
        return x, weights


def _for_each(name: str, value: Any, depth: int) -> Sequence[Any]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        return [value] * depth
    if len(value) != depth:
        raise ValueError(f"{name} must be one value, or one for each of {depth} layers, got {value!r}")
    return value
