"""InLine: injective linear attention (Han et al., NeurIPS 2024, arXiv:2412.06590).

Linear attention whose scores are normalised by subtraction instead of division. With c = D^-1/2 and k̄, v̄ the means of
keys and values over the N tokens, the score of query i on key j and the result are

    s_ij = (c/N) φ(q_i)·φ(k_j) - (c/N) φ(q_i)·k̄ + 1/N          (Σ_j s_ij = 1, a score may be negative)
    y_i  = Σ_j s_ij v_j = v̄ + (c/N) φ(q_i) Σ_j (φ(k_j) - k̄) v_jᵀ

so a query reads the mean value and the covariance of keys and values. Division would give q and a·q (a > 0) the same
result; subtraction does not: the map from queries to score vectors is injective where the centred keys span. Then a
depthwise 3x3 convolution of the values is added whose kernel depends on the image:

    W = Linear_h(GELU(Linear_h(mean_N x)))    9 taps per channel, weights block-diagonal over the heads
    y = y + W ∗ v                             zero padding

Cost O(N·C·D) time, O(C·D) memory besides the tokens. φ is the identity, or ReLU, leaky ReLU (slope 0.01) or
exp(0.2 x); the last grows without bound, because nothing divides it out again.

The paper's equation 5 leaves out c/N (it can be absorbed in φ(Q)); the authors' code has it, and so has this. Windows
may be shifted, but as in that code nothing masks what the shift wraps around. Its PVT form is only usable without
spatial reduction, its CSwin form only with one stripe that covers the map, so neither option exists here. A causal
form is not defined: k̄, v̄ and N are global.

Reference for names and defaults: LeapLabTHU/InLine.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab.contract import View, record
from attnlab.nn.activations import gelu
from attnlab.nn.dense_mixer import Core, Heads
from attnlab.nn.depthwise import depthwise_conv, on_tokens
from attnlab.nn.grid_mixer import GridMixer
from attnlab.nn.heads import WithinHeads, split_heads
from attnlab.points import Edits
from attnlab.registry import Cost, Paper, Source, register
from pallas_kernels.dtypes import at_least_float32

PAPER = Paper(
    "Bridging the Divide: Reconsidering Softmax and Linear Attention",
    "Han et al.",
    2024,
    arxiv="2412.06590",
    number=1,
)
FEATURE_MAPS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "identity": lambda x: x,
    "relu": jax.nn.relu,
    "leaky_relu": jax.nn.leaky_relu,
    "exp": lambda x: jnp.exp(0.2 * x),
}


def inline_scores(q: jax.Array, k: jax.Array, *, scale: float | None = None) -> jax.Array:
    """The scores s_ij `(B, H, N, N)` of `inline_attention`, in float32; they sum to 1 and may be negative."""
    centred = _centred(k)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = jnp.einsum("bnhd,bmhd->bhnm", q.astype(centred.dtype), centred)
    return (scale * scores + 1) / k.shape[1]


def inline_attention(q: jax.Array, k: jax.Array, v: jax.Array, *, scale: float | None = None) -> jax.Array:
    """Linear attention normalised by subtraction, without the local term.

    Args:
      q: mapped queries φ(q), `(B, N, H, D)`.
      k: mapped keys φ(k), `(B, N, H, D)`.
      v: values, `(B, N, H, E)`.
      scale: c, D^-1/2 when None.

    Returns:
      `(B, N, H, E)` in the dtype of `v`; sums over tokens are float32.

    Raises:
      ValueError: if there are not as many keys as queries; the mechanism is self-attention.
    """
    if q.shape[1] != k.shape[1]:
        raise ValueError(f"inline_attention takes as many keys as queries, got q {q.shape} and k {k.shape}")
    centred = _centred(k)
    wide = centred.dtype
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    covariance = jnp.einsum("bnhd,bnhe->bhde", centred.astype(v.dtype), v, preferred_element_type=wide)
    # The covariance stays wide: XLA on the CPU has no such product of bfloat16 operands with a float32 result.
    y = jnp.einsum("bnhd,bhde->bnhe", q.astype(wide), covariance * (scale / k.shape[1]))
    return (y + v.mean(1, keepdims=True, dtype=wide)).astype(v.dtype)


def _centred(k: jax.Array) -> jax.Array:
    k = k.astype(at_least_float32(k.dtype))
    return k - k.mean(1, keepdims=True)


class InlineCore(Core):
    """InLine attention between projections: the scores and the convolution whose kernel depends on the image.

    The heads' `extra` holds what the kernels are computed from: the mean of the tokens, split into heads, `(B, H, D)`.

    Args:
      features: channels C of the tokens.
      num_heads: H.
      grid: rows and columns of the tokens; the convolution leaves out those in front of them.
      feature_map: φ, one of `FEATURE_MAPS`.
      param_dtype: of the parameters.
      rngs: stream `params`.

    Raises:
      ValueError: for an unknown feature map, or if the heads do not divide the channels.
    """

    permutation_equivariant = False

    def __init__(
        self,
        features: int,
        *,
        num_heads: int,
        grid: tuple[int, int],
        feature_map: str = "identity",
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if feature_map not in FEATURE_MAPS:
            raise ValueError(f"feature_map must be one of {', '.join(FEATURE_MAPS)}, got {feature_map!r}")
        if features % num_heads:
            raise ValueError(f"num_heads must divide the {features} channels, got {num_heads}")
        self.grid, self.feature_map = tuple(grid), feature_map
        size, common = features // num_heads, {"param_dtype": param_dtype, "rngs": rngs}
        self.describe = WithinHeads(num_heads, size, size, **common)
        self.kernels = WithinHeads(num_heads, size, 9 * size, **common)

    def attention(self, heads: Heads, view: View) -> jax.Array:
        self.refuse_masks(view)
        phi = FEATURE_MAPS[self.feature_map]
        return inline_scores(phi(heads.q), phi(heads.k))

    def __call__(
        self,
        heads: Heads,
        view: View,
        cache: Any = None,
        *,
        edits: Edits | None = None,
        deterministic: bool = True,
        owner: nnx.Module | None = None,
    ) -> tuple[jax.Array, Any]:
        self.refuse_masks(view)
        phi, (q, k, v, extra) = FEATURE_MAPS[self.feature_map], heads
        if [mean.shape[0] for mean in extra] != [v.shape[0]]:
            raise ValueError(
                f"InlineCore needs the mean of the tokens of each image: a window that covers the image {self.grid}; "
                f"got {len(extra)} means, of {[mean.shape[0] for mean in extra]} images, for {v.shape[0]} windows"
            )
        if owner is not None:
            record(owner, "attention", lambda: self.attention(heads, view))
        y = inline_attention(phi(q), phi(k), v)
        taps = self.kernels(gelu(self.describe(extra[0])))
        taps = jnp.moveaxis(taps.reshape(*v.shape[:1], *v.shape[2:], 3, 3), (3, 4), (1, 2))
        return y + on_tokens(lambda image: depthwise_conv(image, taps, channel_axes=2), v, self.grid), None


@register(
    "inline_attention",
    paper=PAPER,
    source=Source.AUTHORS_CODE,
    repository="LeapLabTHU/InLine",
    cost=Cost(time="O(N·C·D)", memory="O(C·D)"),
    summary="linear attention normalised by subtraction, hence injective, plus a 3x3 convolution with dynamic kernel",
)
class InlineAttention(GridMixer):
    """InLine attention with its projections, on images or in windows of them.

    Args:
      features: channels C.
      num_heads: H.
      feature_map: φ of queries and keys: `identity`, `relu`, `leaky_relu` or `exp`.
      param_dtype: of the parameters.
      rngs: streams `params`, and `dropout` if there is any.
      **options: those of `GridMixer`: grid, windows, prefix, biases, dropout, dtype.

    Raises:
      ValueError: for an unknown feature map, or neither grid nor window.
      UnsupportedArgument: for windows with a prefix.
    """

    # Kernels come from the mean of the tokens, whose channels are shared out among the heads: its gradient is gathered.
    collectives = frozenset({"all-gather"})

    def __init__(
        self,
        features: int,
        *,
        num_heads: int,
        feature_map: str = "identity",
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        common = {"num_heads": num_heads, "param_dtype": param_dtype, "rngs": rngs}
        super().__init__(features, **common, **options)
        self.core = InlineCore(features, grid=self.windows.size, feature_map=feature_map, **common)

    def project(self, x: jax.Array, grid: tuple[int, int]) -> Heads:
        mean = self.windows.partition(x, grid).mean(1, dtype=at_least_float32(x.dtype))
        mean = split_heads(mean.astype(x.dtype), self.num_heads)
        return Heads(self.query(x), self.key(x), self.value(x), (mean,))
