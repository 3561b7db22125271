"""Partial attention of PATNet (Huang et al., 2025, arXiv:2503.03148): some channels are convolved, the others attend.

    y = [conv3×3(x_1) | attention(x_2)]          x_1 the first C/n channels; of kinds "channel" and "self":

    channel    BN(x_2 ⊙ g),  g = hσ(BN(W [mean | deviation]))                      over the image, in each channel
    self       softmax(Q Kᵀ/√D + b[distance]) V W,  of LN(x_2)                     b by `nn.positions.euclidean_buckets`

and, behind a feed-forward, the spatial one, with the channels the other way round:

    y = [BN(x_1 ⊙ hσ(w · x_1)) | W BN(x_2)]                                        a gate of one number for each token

hσ(z) = clip(z + 3, 0, 6) / 6. The deviation divides by N - 1; of an image of one token, where the authors' code has no
number, it is 0. Code: haiduo/PartialNet, the authors' follow-up (arXiv:2502.01303), which has these modules.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from attnlab.contract import Given, Layout, Site, TokenMixer, record
from attnlab.nn.activations import hard_sigmoid
from attnlab.nn.dense_mixer import Heads
from attnlab.nn.grids import to_tokens
from attnlab.nn.heads import FromHeads, ToHeads
from attnlab.nn.linear import Conv, Linear, trunc_normal
from attnlab.nn.norms import BatchNorm, LayerNorm
from attnlab.nn.positions import euclidean_buckets
from attnlab.nn.softmax import attention_weights, softmax_attention
from attnlab.points import visit
from attnlab.registry import Cost, Example, Kind, Paper, Source, register
from pallas_kernels.dtypes import at_least_float32

PAPER = Paper("Partial Convolution Meets Visual Attention", "Huang et al.", 2025, arxiv="2503.03148", number=117)
REPOSITORY = "haiduo/PartialNet"
LINEAR = Cost(time="O(N·C²)", memory="O(N·C)")
SQUARE = Cost(time="O(N²·C)", memory="O(N²·H)")

register(
    "patnet.buckets",
    kind=Kind.FUNCTION,
    paper=PAPER,
    source=Source.AUTHORS_CODE,
    repository=REPOSITORY,
    cost=Cost(time="O(N²)", memory="O(N²)"),
    summary="buckets of the Euclidean distances between tokens of an image",
    small=lambda: Example(euclidean_buckets, ((3, 4), 2.0), batched=(), differentiable=()),
)(euclidean_buckets)


class _ImageMixer(TokenMixer):
    layouts = frozenset({Layout.IMAGE})
    layout = Layout.IMAGE


def _gate_example() -> Example:
    x = np.random.default_rng(0).standard_normal((2, 4, 5, 6)).astype(np.float32)
    return Example(GaussianChannelGate(6, rngs=nnx.Rngs(0)), (x,))


@register(
    "patnet.gate",
    kind=Kind.MODULE,
    paper=PAPER,
    source=Source.AUTHORS_CODE,
    repository=REPOSITORY,
    cost=Cost(time="O(N·C+C²)", memory="O(N·C)"),
    summary="channels gated by the means and deviations of all channels over the image",
    small=_gate_example,
)
class GaussianChannelGate(nnx.Module):
    """Images `(B, *S, C)` gated in each channel, to the same shape; see the module docstring.

    Args:
      features: channels C.
      dtype: of the result; that of the image when None.
      param_dtype: of the parameters.
      rngs: stream `params`.
    """

    def __init__(self, features: int, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.dtype = dtype
        stored = {"param_dtype": param_dtype, "rngs": rngs}
        self.mix = Linear(2 * features, features, use_bias=False, kernel_init=trunc_normal, **stored)
        self.norm = BatchNorm(features, **stored)

    def __call__(self, x: ArrayLike, *, deterministic: bool = True) -> jax.Array:
        x = jnp.asarray(x, self.dtype)
        gate = hard_sigmoid(self.norm(self.mix(_moments(x)), deterministic=deterministic))
        return x * gate.reshape(x.shape[0], *(1,) * (x.ndim - 2), -1).astype(x.dtype)


def _moments(x: jax.Array) -> jax.Array:
    """Mean and deviation of each channel over the image, `(B, 2 C)` in float32 (or wider)."""
    wide = to_tokens(x).astype(at_least_float32(x.dtype))
    mean = wide.mean(1)
    squares = jnp.square(wide - mean[:, None]).sum(1) / max(wide.shape[1] - 1, 1)
    # max inside the root: at zero the deviation itself has no gradient.
    deviation = jnp.where(squares > 0, jnp.sqrt(jnp.maximum(squares, 1e-24)), 0)
    return jnp.concatenate([mean, deviation], -1)


def _example(module: TokenMixer) -> Example:
    return Example(module, (np.random.default_rng(0).standard_normal((2, 3, 4, 8)).astype(np.float32),))


@register(
    "patnet.distance",
    kind=Kind.MODULE,
    paper=PAPER,
    source=Source.AUTHORS_CODE,
    repository=REPOSITORY,
    cost=SQUARE,
    summary="softmax attention of images with a learned bias for each bucket of distances",
    small=lambda: _example(DistanceBiasAttention(8, num_heads=2, ratio=2, rngs=nnx.Rngs(0))),
)
class DistanceBiasAttention(_ImageMixer):
    """Softmax attention among all tokens of an image, of any size, biased by their distance.

    Args:
      features: channels C.
      num_heads: heads H.
      ratio: α of the buckets.
      qkv_bias: whether queries, keys and values have a bias.
      scale: of the scores, D^-1/2 when None.
      attention_dropout: rate on the weights; the authors' code has 0.1.
      projection_dropout: rate on the result; likewise.
      dtype: of the computation and the result; that of the tokens when None.
      param_dtype: of the parameters.
      rngs: streams `params`, and `dropout` if there is any.

    Raises:
      ValueError: if heads do not divide the channels.
    """

    points = frozenset({"qkv", "heads"})

    def __init__(
        self,
        features: int,
        *,
        num_heads: int,
        ratio: float = 20.0,
        qkv_bias: bool = False,
        scale: float | None = None,
        attention_dropout: float = 0.0,
        projection_dropout: float = 0.0,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if features % num_heads:
            raise ValueError(f"num_heads must divide the {features} channels, got {num_heads}")
        self.features, self.num_heads, self.ratio, self.dtype = features, num_heads, ratio, dtype
        self.scale, self.attention_dropout = scale, attention_dropout
        common, head = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}, features // num_heads
        into: dict[str, Any] = {"use_bias": qkv_bias, "kernel_init": trunc_normal, **common}
        self.query, self.key, self.value = (ToHeads(features, num_heads, head, **into) for _ in range(3))
        self.out = FromHeads(num_heads, head, features, kernel_init=trunc_normal, **common)
        table = jnp.zeros((num_heads, 2 * int(2 * ratio) + 1), param_dtype)
        self.bias = nnx.Param(table, logical_axes=("heads", None), weight_decay=False)
        self.rngs = rngs["dropout"].fork() if attention_dropout > 0 else nnx.data(None)
        self.dropout = nnx.Dropout(projection_dropout, rngs=rngs) if projection_dropout > 0 else nnx.data(None)

    def mix(self, x: jax.Array, given: Given) -> jax.Array:
        tokens = to_tokens(x)
        heads = visit(self, given.edits, "qkv", Heads(self.query(tokens), self.key(tokens), self.value(tokens)))
        bias = self.bias[...].astype(at_least_float32(x.dtype))[:, euclidean_buckets(x.shape[1:3], self.ratio)][None]
        record(self, "attention", lambda: attention_weights(heads.q, heads.k, bias=bias, scale=self.scale))
        dropped: dict[str, Any] = {}
        if self.rngs is not None and not given.deterministic:
            dropped = {"dropout_rate": self.attention_dropout, "dropout_key": self.rngs()}
        y = softmax_attention(heads.q, heads.k, heads.v, bias=bias, scale=self.scale, **dropped)
        y = self.out(visit(self, given.edits, "heads", y)).reshape(x.shape)
        return y if self.dropout is None else self.dropout(y, deterministic=given.deterministic)


class PartialConv(_ImageMixer):
    """A convolution of the first channels beside `rest`, which subclasses say; here those stay as they are.

    Partial convolution alone is FasterNet's (Chen et al., CVPR 2023, arXiv:2303.03667).

    Args:
      features: channels C.
      divisor: n; C // n channels are convolved.
      dtype: of the computation and the result; that of the tokens when None.
      param_dtype: of the parameters.
      rngs: stream `params`.

    Raises:
      ValueError: if that leaves no channels on either side.
    """

    def __init__(
        self,
        features: int,
        *,
        divisor: int = 4,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.convolved = features // divisor if divisor > 0 else 0
        if not 0 < self.convolved < features:
            raise ValueError(f"divisor must leave some of {features} channels on either side, got {divisor}")
        self.features, self.dtype = features, dtype
        common: dict[str, Any] = {"use_bias": False, "kernel_init": trunc_normal, "dtype": dtype}
        self.conv = Conv(self.convolved, self.convolved, (3, 3), param_dtype=param_dtype, rngs=rngs, **common)

    def rest(self, x: jax.Array, given: Given) -> jax.Array:
        """What is made of the other channels, `(B, H, W, C - C // n)`."""
        return x

    def mix(self, x: jax.Array, given: Given) -> jax.Array:
        first, rest = x[..., : self.convolved], x[..., self.convolved :]
        return jnp.concatenate([self.conv(first), self.rest(rest, given)], -1)


@register(
    "patnet.channel",
    paper=PAPER,
    source=Source.AUTHORS_CODE,
    repository=REPOSITORY,
    cost=LINEAR,
    summary="a convolution of a quarter of the channels, the others gated by their means and deviations",
)
class PartialChannelAttention(PartialConv):
    """Partial attention of the kind "channel"; see the module docstring.

    Args:
      features: channels C.
      divisor: n; C // n channels are convolved.
      dtype: of the computation and the result; that of the tokens when None.
      param_dtype: of the parameters.
      rngs: stream `params`.

    Raises:
      ValueError: as `PartialConv`.
    """

    def __init__(
        self,
        features: int,
        *,
        divisor: int = 4,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        stored = {"param_dtype": param_dtype, "rngs": rngs}
        super().__init__(features, divisor=divisor, dtype=dtype, **stored)
        self.gate = GaussianChannelGate(features - self.convolved, dtype=dtype, **stored)
        self.norm = BatchNorm(features - self.convolved, **stored)

    def rest(self, x: jax.Array, given: Given) -> jax.Array:
        return self.norm(self.gate(x, deterministic=given.deterministic), deterministic=given.deterministic)


@register(
    "patnet",
    paper=PAPER,
    source=Source.AUTHORS_CODE,
    repository=REPOSITORY,
    cost=SQUARE,
    summary="a convolution of a quarter of the channels, the others attend with a bias of distance",
    small={"divisor": 4, "num_heads": 2},
)
class PartialSelfAttention(PartialConv):
    """Partial attention of the kind "self"; see the module docstring.

    Args:
      features: channels C.
      num_heads: heads H of the attention; they divide C - C // n.
      divisor: n; C // n channels are convolved.
      ratio: α of the buckets of distances.
      attention_dropout: rate on the weights; the authors' code has 0.1.
      projection_dropout: rate on what is attended; likewise.
      dtype: of the computation and the result; that of the tokens when None.
      param_dtype: of the parameters.
      rngs: streams `params`, and `dropout` if there is any.

    Raises:
      ValueError: as `PartialConv`, or if heads do not divide the other channels.
    """

    points = frozenset({"qkv", "heads"})

    def __init__(
        self,
        features: int,
        *,
        num_heads: int = 6,
        divisor: int = 4,
        ratio: float = 20.0,
        attention_dropout: float = 0.0,
        projection_dropout: float = 0.0,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        stored = {"param_dtype": param_dtype, "rngs": rngs}
        super().__init__(features, divisor=divisor, dtype=dtype, **stored)
        self.norm = LayerNorm(features - self.convolved, **stored)
        self.attend = DistanceBiasAttention(
            features - self.convolved,
            num_heads=num_heads,
            ratio=ratio,
            attention_dropout=attention_dropout,
            projection_dropout=projection_dropout,
            dtype=dtype,
            **stored,
        )

    @classmethod
    def site_defaults(cls, site: Site) -> dict[str, Any]:
        """As many heads as divide the channels that attend, up to the site's."""
        rest = site.features - site.features // 4
        return {"num_heads": next(h for h in range(site.num_heads, 0, -1) if rest % h == 0)}

    def rest(self, x: jax.Array, given: Given) -> jax.Array:
        return self.attend.mix(self.norm(x), given)


@register(
    "patnet.spatial",
    kind=Kind.MODULE,
    paper=PAPER,
    source=Source.AUTHORS_CODE,
    repository=REPOSITORY,
    cost=LINEAR,
    summary="half of the channels gated by one number for each token, the others mapped",
    small=lambda: _example(PartialSpatialAttention(8, rngs=nnx.Rngs(0))),
)
class PartialSpatialAttention(_ImageMixer):
    """The spatial kind; see the module docstring.

    Args:
      features: channels C.
      partial: share of the channels, the last ones, that are mapped; what is left over by rounding is gated.
      dtype: of the computation and the result; that of the tokens when None.
      param_dtype: of the parameters.
      rngs: stream `params`.

    Raises:
      ValueError: if that leaves no channels on either side.
    """

    def __init__(
        self,
        features: int,
        *,
        partial: float = 0.5,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        mapped = int(partial * features)
        if not 0 < mapped < features:
            raise ValueError(f"partial must leave some of {features} channels on either side, got {partial}")
        self.features, self.gated, self.dtype = features, features - mapped, dtype
        stored = {"param_dtype": param_dtype, "rngs": rngs}
        common: dict[str, Any] = {"use_bias": False, "kernel_init": trunc_normal, "dtype": dtype, **stored}
        self.gate = Linear(self.gated, 1, axes=("embed", None), **common)
        self.map = Linear(mapped, mapped, **common)
        self.gated_norm, self.mapped_norm = BatchNorm(self.gated, **stored), BatchNorm(mapped, **stored)

    def mix(self, x: jax.Array, given: Given) -> jax.Array:
        told = {"deterministic": given.deterministic}
        first, rest = x[..., : self.gated], x[..., self.gated :]
        gate = hard_sigmoid(self.gate(first).astype(at_least_float32(x.dtype)))
        record(self, "gate", lambda: gate)
        first = self.gated_norm(first * gate.astype(x.dtype), **told)
        return jnp.concatenate([first, self.map(self.mapped_norm(rest, **told))], -1)
