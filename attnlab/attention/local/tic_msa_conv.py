"""MSA-Conv, the convolution with self-attention in it of TiC (2023, arXiv:2310.04134; code: zs670980918/MSA-Conv).

Every token attends to the window of K = Πk taps centred on it, d tokens apart, and a convolution follows:

    q, k, v = x W + b;   s_i[t] = q_i · k_{i + d (t - (k - 1)/2)}
    y_i     = Σ_t softmax_t(s_i / √D)[t] v_{i + d (t - (k - 1)/2)}
    out     = relu(conv(y + x))

A window is cut by nothing: beyond the map stand keys and values that are zero, and these are not masked. Their scores
are 0, and a token at the border gives them weight. Dilation acts on the windows alone, stride and padding on the
convolution alone. Kernels are odd. The released module has one head in spite of the paper's title; here there may be
more. Cost O(N·K·C) time, O(N·(K·H + C)) memory.

The paper's network is not published. Of its cyclic shift only the abstract is known: `directional_shift` is our reading
of it, groups of channels rolled by some tokens in each direction, and an option of the module, off by default.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from attnlab.contract import Given, Layout, TokenMixer, record
from attnlab.nn.activations import relu
from attnlab.nn.dense_mixer import Heads
from attnlab.nn.grids import Lengths, lengths, to_tokens, unfold_index
from attnlab.nn.heads import ToHeads, merge_heads
from attnlab.nn.linear import Conv, uniform_init
from attnlab.points import visit
from attnlab.registry import Cost, Example, Kind, Paper, Source, register
from pallas_kernels.dtypes import at_least_float32

_PAPER = Paper("TiC: Exploring Vision Transformer in Convolution", "Zhang et al.", 2023, arxiv="2310.04134", number=43)
_ENTRY: dict[str, Any] = {
    "paper": _PAPER,
    "source": Source.AUTHORS_CODE,
    "repository": "zs670980918/MSA-Conv",
    "cost": Cost(time="O(N·K·C)", memory="O(N·(K·H+C))"),
}


class WindowSums(NamedTuple):
    """What the windows give.

    Attributes:
      scores: `(B, *S, H, K)` in float32 (or wider), scaled, taps in row-major order; 0 for taps beyond the map.
      y: `(B, *S, H, E)` in the dtype of the values.
    """

    scores: jax.Array
    y: jax.Array


def _operator_example() -> Example:
    q, k, v = np.random.default_rng(0).standard_normal((3, 2, 4, 5, 2, 4)).astype(np.float32)
    return Example(msa_conv, (q, k, v), {"kernel_size": 3, "dilation": 2}, batched=(0, 1, 2), differentiable=(0, 1, 2))


@register(
    "tic_msa_conv.operator",
    kind=Kind.FUNCTION,
    summary="softmax over a centred window whose taps beyond the map are zeros, not masked",
    small=_operator_example,
    **_ENTRY,
)
def msa_conv(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    kernel_size: Lengths,
    dilation: Lengths = 1,
    scale: float = 1.0,
    dropout: float = 0.0,
    key: jax.Array | None = None,
) -> WindowSums:
    """Attention of each token to the window around it; see the module docstring for the equations.

    Args:
      q: queries `(B, *S, H, D)` on a grid of any number of axes.
      k: keys, the same.
      v: values `(B, *S, H, E)`.
      kernel_size: taps of the window along each axis, odd.
      dilation: tokens between taps.
      scale: of the products.
      dropout: rate on the weights.
      key: random key, needed for dropout.

    Raises:
      ValueError: for an even kernel, shapes that do not fit, or dropout without a key.
    """
    q, k, v = jnp.asarray(q), jnp.asarray(k), jnp.asarray(v)
    if q.shape != k.shape or k.shape[:-1] != v.shape[:-1] or q.ndim < 4:
        raise ValueError(f"q, k, v must be (B, *S, H, D), alike but for D of v, got {q.shape}, {k.shape}, {v.shape}")
    size, steps = _window(q.ndim - 3, kernel_size, dilation)
    wide = at_least_float32(q.dtype)
    q, wide_v = q.astype(wide) * scale, v.astype(at_least_float32(v.dtype))
    scores = jnp.stack([(q * tap).sum(-1) for tap in _taps(k.astype(wide), size, steps)], -1)
    weights = jax.nn.softmax(scores)
    if dropout:
        if key is None:
            raise ValueError(f"key is missing: dropout {dropout} draws")
        kept = jax.random.bernoulli(key, 1 - dropout, weights.shape)
        weights = jnp.where(kept, weights / (1 - dropout), 0)
    weights, y = weights.astype(wide_v.dtype), jnp.zeros(v.shape, wide_v.dtype)
    for index, tap in enumerate(_taps(wide_v, size, steps)):
        y = y + weights[..., index, None] * tap
    return WindowSums(scores, y.astype(v.dtype))


def _window(axes: int, kernel_size: Lengths, dilation: Lengths) -> tuple[tuple[int, ...], tuple[int, ...]]:
    size, steps = lengths(kernel_size, axes, "kernel_size"), lengths(dilation, axes, "dilation")
    if any(side % 2 == 0 for side in size):
        raise ValueError(f"kernel_size must be odd, so that windows have a centre, got {size}")
    return size, steps


def _taps(x: jax.Array, size: Sequence[int], dilation: Sequence[int]) -> Iterator[jax.Array]:
    """`(B, *S, H, D)` as each tap of the windows sees it, zeros beyond the map. One at a time: no copies are kept."""
    reach = [step * (side // 2) for side, step in zip(size, dilation, strict=True)]
    grid = x.shape[1 : 1 + len(size)]
    padded = jnp.pad(x, [(0, 0), *((r, r) for r in reach), (0, 0), (0, 0)])
    for place in np.ndindex(*size):
        starts = [p * step for p, step in zip(place, dilation, strict=True)]
        yield padded[(slice(None), *(slice(s, s + n) for s, n in zip(starts, grid, strict=True)))]


def directional_shift(x: ArrayLike, shift: int) -> jax.Array:
    """Rolls groups of channels of `(B, *S, C)` by `shift` tokens, one group each way along each axis, one not at all.

    Our reading of the abstract's multi-directional cyclic shift.
    """
    x = jnp.asarray(x)
    axes = x.ndim - 2
    ways = [(0, 1), *((sign * shift, axis) for axis in range(1, 1 + axes) for sign in (1, -1))]
    groups = jnp.array_split(x, len(ways), axis=-1)
    return jnp.concatenate([jnp.roll(g, *way) for g, way in zip(groups, ways, strict=True)], -1)


def _conv_example() -> Example:
    module = MSAConv(8, 6, 3, stride=2, dilation=2, rngs=nnx.Rngs(0))
    return Example(module, (np.random.default_rng(0).standard_normal((2, 5, 6, 8)).astype(np.float32),))


@register(
    "tic_msa_conv.conv",
    kind=Kind.MODULE,
    summary="MSA-Conv as a layer: other channels, stride and padding as a convolution has them",
    small=_conv_example,
    **_ENTRY,
)
class MSAConv(nnx.Module):
    """Tokens `(B, *S, C)` to `(B, *S', C')`, as a convolution with attention in it; see the module docstring.

    Args:
      in_features: channels C.
      out_features: channels C'.
      kernel_size: taps of the window and of the convolution along each axis, odd; one number for two equal axes.
      num_heads: heads H.
      stride: of the convolution.
      padding: of the convolution, one number or one per axis; half the kernel when None, which keeps the size.
      dilation: of the window.
      shift: by how many tokens groups of channels are rolled first, see `directional_shift`; 0 as the authors' code.
      dropout: rate on the weights.
      use_bias: whether the convolution has a bias; the projections always have.
      dtype: of the computation and the result; that of the tokens when None.
      param_dtype: of the parameters.
      rngs: streams `params`, and `dropout` if there is any.

    Raises:
      ValueError: if heads do not divide the channels, or for an even kernel.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int] = 3,
        *,
        num_heads: int = 1,
        stride: Lengths = 1,
        padding: Lengths | None = None,
        dilation: Lengths = 1,
        shift: int = 0,
        dropout: float = 0.0,
        use_bias: bool = False,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if in_features % num_heads:
            raise ValueError(f"num_heads must divide the {in_features} channels, got {num_heads}")
        axes = 2 if isinstance(kernel_size, int | np.integer) else len(kernel_size)
        self.kernel_size, self.dilation = _window(axes, kernel_size, dilation)
        self.num_heads, self.shift, self.dtype = num_heads, shift, dtype
        self.dropout = dropout
        self.rngs = rngs["dropout"].fork() if dropout > 0 else nnx.data(None)
        stored = {"param_dtype": param_dtype, "rngs": rngs}
        common, init = {"dtype": dtype, **stored}, uniform_init(in_features)
        head = in_features // num_heads
        self.query, self.key, self.value = (
            ToHeads(in_features, num_heads, head, kernel_init=init, bias_init=init, **common) for _ in range(3)
        )
        around = [k // 2 for k in self.kernel_size] if padding is None else lengths(padding, axes, "padding", least=0)
        # Its input channels are cut with the heads: devices have their own, and sum what they make of them.
        self.out = Conv(
            in_features,
            out_features,
            self.kernel_size,
            strides=lengths(stride, axes, "stride"),
            padding=[(p, p) for p in around],
            use_bias=use_bias,
            axes=("heads", "embed"),
            **common,
        )

    def project(self, x: jax.Array) -> Heads:
        """Queries, keys and values `(B, N, H, D)`."""
        tokens = to_tokens(x if self.shift == 0 else directional_shift(x, self.shift))
        return Heads(self.query(tokens), self.key(tokens), self.value(tokens))

    def attend(self, heads: Heads, grid: Sequence[int], deterministic: bool = True) -> WindowSums:
        """The windows' sums of heads `(B, N, H, D)` on a grid."""
        q, k, v = (part.reshape(part.shape[0], *grid, *part.shape[2:]) for part in heads[:3])
        dropped = {} if deterministic or self.rngs is None else {"dropout": self.dropout, "key": self.rngs()}
        scale = q.shape[-1] ** -0.5
        return msa_conv(q, k, v, kernel_size=self.kernel_size, dilation=self.dilation, scale=scale, **dropped)

    def combine(self, x: jax.Array, y: jax.Array) -> jax.Array:
        """The convolution of the tokens and what was read, heads `(B, N, H, D)`."""
        return relu(self.out(x + merge_heads(y).reshape(x.shape)))

    def __call__(self, x: ArrayLike, *, deterministic: bool = True) -> jax.Array:
        x = jnp.asarray(x, self.dtype)
        y = self.attend(self.project(x), x.shape[1:-1], deterministic).y
        return self.combine(x, y)


@register(
    "tic_msa_conv",
    summary="attention in a centred window padded with zeros that count, and a convolution behind it",
    small={"kernel_size": 3},
    **_ENTRY,
)
class MSAConvMixer(TokenMixer):
    """MSA-Conv that keeps channels and grid, as a mixer. Its result is at least 0: a residual belongs around it.

    Args:
      features: channels C.
      num_heads: heads H; the authors' code has one.
      kernel_size: taps of window and convolution along each axis, odd.
      dilation: of the window.
      shift: by how many tokens groups of channels are rolled first, see `directional_shift`; 0 as the authors' code.
      attention_dropout: rate on the weights; the authors' code has 0.1.
      use_bias: whether the convolution has a bias.
      layout: of the tokens.
      dtype: of the computation and the result; that of the tokens when None.
      param_dtype: of the parameters.
      rngs: streams `params`, and `dropout` if there is any.

    Raises:
      ValueError: as `MSAConv`.
    """

    layouts = frozenset({Layout.IMAGE, Layout.SEQUENCE})
    points = frozenset({"qkv", "heads"})

    def __init__(
        self,
        features: int,
        *,
        num_heads: int = 1,
        kernel_size: int | Sequence[int] = 3,
        dilation: int | Sequence[int] = 1,
        shift: int = 0,
        attention_dropout: float = 0.0,
        use_bias: bool = False,
        layout: Layout = Layout.IMAGE,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.features, self.num_heads, self.layout, self.dtype = features, num_heads, Layout(layout), dtype
        self.conv = MSAConv(
            features,
            features,
            lengths(kernel_size, self.layout.axes, "kernel_size"),
            num_heads=num_heads,
            dilation=dilation,
            shift=shift,
            dropout=attention_dropout,
            use_bias=use_bias,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )

    def mix(self, x: jax.Array, given: Given) -> jax.Array:
        grid = x.shape[1:-1]
        heads = visit(self, given.edits, "qkv", self.conv.project(x))
        sums = self.conv.attend(heads, grid, given.deterministic)
        record(self, "attention", lambda: self._map(sums.scores, grid))
        return self.conv.combine(x, visit(self, given.edits, "heads", sums.y.reshape(heads.v.shape)))

    def _map(self, scores: jax.Array, grid: Sequence[int]) -> jax.Array:
        """`(B, H, N, N)`; a row at the border sums to less than 1, since taps beyond the map have weight too."""
        size, steps = self.conv.kernel_size, self.conv.dilation
        around = [step * (side // 2) for side, step in zip(size, steps, strict=True)]
        index = unfold_index(grid, size, dilation=steps, padding=around).reshape(-1, int(np.prod(size)))
        tokens = len(index)
        weights = jax.nn.softmax(scores).reshape(scores.shape[0], tokens, *scores.shape[-2:]).swapaxes(1, 2)
        whole = jnp.zeros((*weights.shape[:3], tokens), weights.dtype)
        place = np.where(index < 0, tokens, index)  # beyond the end: left out
        return whole.at[:, :, np.arange(tokens)[:, None], place].set(weights, mode="drop")
