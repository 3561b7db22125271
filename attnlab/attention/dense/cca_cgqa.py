"""Compressed convolutional attention, CCA and CCGQA (Zyphra, 2025, arXiv:2510.04476).

All of attention runs in a latent space: H query and G key heads of size D with H·D and G·D below C, r = H / G.

    q° = x W_q, k° = x W_k                                    (B, N, H, D), (B, N, G, D)
    m_h = (q°_h + k°_g) / 2 for g = h // r,   m_g = mean of m_h over the heads of the group
    q = conv₂(conv₁(q°)) + m_h,   k = conv₂(conv₁(k°)) + m_g  causal; conv₁ depthwise, conv₂ dense in each head
    v_t = [(x_t W_v)_{c < G·D/2} | (x_{t-1} W_v)_{c ≥ G·D/2}]     halves of the channels of all heads
    q ← √D q / |q|,   k ← τ_g √D k / |k|                      then rotary positions on some of the channels
    y = concat_h(softmax(q_h k_gᵀ / √D) v_g) W_o

conv₂ sees what conv₁ makes of the zeros before a sequence, its bias; x before the first token is zero. CCA is G = H.
Cost O(N·M·H·D) in the latent width; a cache of latent keys and values, the convolutions' last inputs and one half of a
value. `clamp_temperature` learns ln τ, kept in [1e-7, 2], as the authors' inference code has it.

Follows the port by the authors' company in transformers. There padding stays in front of the convolutions as zeros;
here a token that no query may see is left out, and each packed segment is a sequence of its own.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from attnlab.contract import Given, Layout, Pattern
from attnlab.nn.causal_conv import CausalConv, causal_conv
from attnlab.nn.dense_mixer import DenseMixer, Heads, HeadSizes
from attnlab.nn.heads import FromHeads, ToHeads
from attnlab.nn.masking import existing_keys
from attnlab.nn.rotary import Rotary
from attnlab.nn.softmax_core import SoftmaxCore
from attnlab.registry import Cost, Paper, Source, register
from pallas_kernels.dtypes import at_least_float32
from pallas_kernels.masks import Mask


class ConvolvedLatents(NamedTuple):
    """What is carried from run to run, float32: the last tokens' projections before the convolutions.

    Attributes:
      q: `(B, K₁ + K₂ - 2, H, D)`.
      k: `(B, K₁ + K₂ - 2, G, D)`.
      v: `(B, 1, G, D)`, the last value before a half of it is delayed.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array


def group_means(q: ArrayLike, k: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """m_h `(B, N, H, D)` and m_g `(B, N, G, D)` of latent queries `(B, N, H, D)` and keys `(B, N, G, D)`."""
    q, k = jnp.asarray(q), jnp.asarray(k)
    *front, heads, size = q.shape
    groups = k.shape[-2]
    mean = (q.reshape(*front, groups, heads // groups, size) + k[..., None, :]) / 2
    return mean.reshape(q.shape), mean.mean(-2)


def twice_convolved(
    x: jax.Array, first: CausalConv, second: CausalConv, carried: jax.Array | None, tokens: dict[str, Any]
) -> tuple[jax.Array, jax.Array]:
    """conv₂(conv₁(x)) of heads `(B, N, H, D)`, and the last K₁ + K₂ - 2 of them, float32.

    Args:
      x: heads before the convolutions.
      first, second: the convolutions, with biases.
      carried: heads before these, as returned by the run before; zeros when None.
      tokens: `real` and `segment_ids` of `causal_conv`.
    """
    reach, further = first.kernel_size[0] - 1, second.kernel_size[0] - 1
    if carried is None:
        carried = jnp.zeros((x.shape[0], reach + further, *x.shape[2:]), jnp.float32)
    between = first(carried)[0][:, reach:]
    y, _ = first(x, carried[:, further:], **tokens)
    before = None if first.bias is None else first.bias[...]
    y, _ = second(y, between, before=before, **tokens)
    # A convolution of the same reach keeps the tokens that the next run needs.
    _, carried = causal_conv(x, jnp.zeros((reach + further + 1, 1)), state=carried, real=tokens.get("real"))
    return y, carried


def normalized_heads(x: jax.Array, temperature: ArrayLike = 1.0) -> jax.Array:
    """τ √D x / |x| over the last axis, in float32 and back; |x| is at least the float32 epsilon."""
    wide = x.astype(at_least_float32(x.dtype))
    square = jnp.square(wide).sum(-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.maximum(square, jnp.finfo(jnp.float32).eps ** 2))
    return (wide * inverse * (x.shape[-1] ** 0.5 * jnp.asarray(temperature))).astype(x.dtype)


@register(
    "cca_cgqa",
    paper=Paper(
        "Compressed Convolutional Attention: Efficient Attention in a Compressed Latent Space",
        "Figliolia et al.",
        2025,
        arxiv="2510.04476",
        number=56,
    ),
    source=Source.AUTHORS_CODE,
    repository="huggingface/transformers",
    cost=Cost(time="O(N·M·H·D)", memory="O(N·M·H), with block_size O(N·H·D)", state="2·M·G·D + (K₁+K₂)·(H+G)·D"),
    summary="softmax attention of convolved, normed latents; half of each value comes from the token before",
)
class CompressedConvolutionalAttention(DenseMixer):
    """Sequences to the same shape, causally. See the module docstring for the equations.

    Args:
      features: channels C.
      num_heads: query heads H.
      num_kv_heads: key and value heads G, a divisor of H; H when None.
      head_dim: D; C / H when None. G·D must be even.
      causal: True; there is no other form.
      kernel_sizes: tokens that the two convolutions read, K₁ and K₂.
      clamp_temperature: whether the parameter of the keys' size is its logarithm, kept in [1e-7, 2].
      rotary: rotary positions, or theta for `Rotary(theta)` on half of the channels; none when None.
      structural_mask: a rule on indices, such as `pallas_kernels.masks.SlidingWindow(127, 0)`.
      attention_dropout: rate on the weights.
      block_size: keys per block, for memory linear in M; all at once when None.
      use_bias: whether the linear maps have a bias.
      dtype: of the computation and the result; that of the tokens when None.
      param_dtype: of the parameters.
      rngs: streams `params`, and `dropout` if there is any.

    Raises:
      ValueError: for sizes or options that do not fit.
    """

    patterns = frozenset({Pattern.CAUSAL_SELF})
    layouts = frozenset({Layout.SEQUENCE})

    def __init__(
        self,
        features: int,
        *,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        causal: bool = True,
        kernel_sizes: tuple[int, int] = (2, 2),
        clamp_temperature: bool = False,
        rotary: Rotary | float | None = None,
        structural_mask: Mask | None = None,
        attention_dropout: float = 0.0,
        block_size: int | None = None,
        use_bias: bool = False,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if not causal:
            raise ValueError("causal must be True: the convolutions and values look at the tokens before")
        self.sizes = groups, head_dim, _ = HeadSizes.of(features, num_heads, num_kv_heads, head_dim)
        if groups * head_dim % 2:
            raise ValueError(f"num_kv_heads · head_dim must be even, got {groups} · {head_dim}")
        self.features, self.num_heads, self.causal, self.dtype = features, num_heads, causal, dtype
        common: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.query = ToHeads(features, num_heads, head_dim, use_bias=use_bias, **common)
        self.key = ToHeads(features, groups, head_dim, use_bias=use_bias, **common)
        self.value = ToHeads(features, groups, head_dim, use_bias=use_bias, **common)
        first, second = kernel_sizes
        convs: dict[str, Any] = {"use_bias": True, **common}
        self.query_conv = CausalConv((num_heads, head_dim), first, **convs)
        self.key_conv = CausalConv((groups, head_dim), first, **convs)
        self.query_head_conv = CausalConv((num_heads, head_dim), second, form="dense", **convs)
        self.key_head_conv = CausalConv((groups, head_dim), second, form="dense", **convs)
        self.clamp_temperature = clamp_temperature
        start = jnp.full((groups,), 0 if clamp_temperature else 1, param_dtype)
        self.temperature = nnx.Param(start, logical_axes=("heads",))
        self.out = FromHeads(num_heads, head_dim, features, use_bias=use_bias, **common)
        rotary = Rotary.of(rotary, channels=head_dim // 4 * 2)
        core: dict[str, Any] = {"structural_mask": structural_mask, "dropout": attention_dropout, "rngs": rngs}
        self.set_core(SoftmaxCore(num_heads, rotary=rotary, block_size=block_size, **core))
        self.permutation_equivariant = False

    def init_carry(self, batch_size: int) -> ConvolvedLatents:
        reach = self.query_conv.kernel_size[0] + self.query_head_conv.kernel_size[0] - 2
        groups, size, _ = self.sizes
        q, k = (jnp.zeros((batch_size, reach, heads, size), jnp.float32) for heads in (self.num_heads, groups))
        return ConvolvedLatents(q, k, jnp.broadcast_to(self._no_value(), (batch_size, 1, groups, size)))

    def project(self, x: jax.Array, source: jax.Array, given: Given) -> Heads:
        return self.project_run(x, source, given, None)[0]

    def project_run(
        self, x: jax.Array, source: jax.Array, given: Given, carry: ConvolvedLatents | None
    ) -> tuple[Heads, ConvolvedLatents]:
        q, k, v, carry = self.latents(x, given, carry)
        temperature = self.temperature[...].astype(jnp.float32)
        if self.clamp_temperature:
            temperature = jnp.exp(jnp.clip(temperature, 1e-7, 2))
        return Heads(normalized_heads(q), normalized_heads(k, temperature[:, None]), v), carry

    def latents(
        self, x: jax.Array, given: Given, carry: ConvolvedLatents | None = None
    ) -> tuple[jax.Array, jax.Array, jax.Array, ConvolvedLatents]:
        """Queries, keys and values before norms and positions, and what the next run needs."""
        real = existing_keys(given.mask)
        real = None if real is None else jnp.broadcast_to(real, x.shape[:2])
        tokens: dict[str, Any] = {"real": real, "segment_ids": given.segment_ids}
        carried = (None, None, None) if carry is None else carry
        latent_q, latent_k = self.query(x), self.key(x)
        mean_q, mean_k = group_means(latent_q, latent_k)
        q, carried_q = twice_convolved(latent_q, self.query_conv, self.query_head_conv, carried[0], tokens)
        k, carried_k = twice_convolved(latent_k, self.key_conv, self.key_head_conv, carried[1], tokens)
        groups, size, _ = self.sizes
        delayed = (jnp.arange(groups * size) >= groups * size // 2).reshape(groups, size)
        late: dict[str, Any] = {"state": carried[2], "before": self._no_value()}
        v, carried_v = causal_conv(self.value(x), jnp.stack([delayed, ~delayed]), **late, **tokens)
        return q + mean_q, k + mean_k, v, ConvolvedLatents(carried_q, carried_k, carried_v)

    def merge(self, y: jax.Array, x: jax.Array, *, deterministic: bool = True) -> jax.Array:
        return self.out(y)

    def _no_value(self) -> jax.Array:
        """The value of the token before the first, float32."""
        bias = self.value.bias
        return jnp.zeros((), jnp.float32) if bias is None else bias[...].astype(jnp.float32)
