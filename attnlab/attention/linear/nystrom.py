"""Nyströmformer (Xiong et al., AAAI 2021, arXiv:2102.03902), as the benchmark CAB (Zhang et al., ICML 2023,
arXiv:2210.07661) has it.

The map of softmax attention by its columns and rows at m landmarks, means q̄, k̄ of segments of the sequence. Per head,
with q and k both divided by √D, so that scores are products over D:

    A = softmax(q k̄ᵀ),  P = softmax(q̄ k̄ᵀ),  B = softmax(q̄ kᵀ)
    Y = A Z (B V) + conv(V),    Z ≈ P^-1 by six iterations of the third order

The convolution along the sequence, with one kernel for each head, is optional. A sequence of at most m tokens has exact
softmax attention. CAB's code starts Z from the largest column sum of the whole batch, which makes examples depend on
each other; here each matrix has its own unless `shared_start`. It zeroes padding and counts it in segments; here
segments hold real tokens alone. Cost O(N·m·D) per head.

Code: Shark-NLP/CAB, after mlpen/Nystromformer.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from attnlab.contract import Given, record
from attnlab.nn.dense_mixer import Heads
from attnlab.nn.head_conv import HeadConv
from attnlab.nn.key_masked_mixer import KeyMaskedMixer
from attnlab.nn.linear import uniform_init
from attnlab.nn.masking import masked_softmax
from attnlab.nn.newton_inverse import cubic_newton_inverse
from attnlab.nn.segment_means import segment_means
from attnlab.registry import Cost, Paper, Source, register
from pallas_kernels.dtypes import at_least_float32
from pallas_kernels.linear_attention import linear_attention


def nystrom_features(
    q: ArrayLike,
    k: ArrayLike,
    *,
    num_landmarks: int = 16,
    iterations: int = 6,
    shared_start: bool = False,
    real: ArrayLike | None = None,
    padding_counts: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Queries and keys whose linear attention, without a denominator, is that of the approximate map.

    Args:
      q: `(B, N, H, D)`.
      k: `(B, N, H, D)`.
      num_landmarks: m.
      iterations: of the inverse.
      shared_start: see `cubic_newton_inverse`.
      real: boolean, tokens that exist: `(B, N)`, or with `padding_counts` `(B, N, H)` too.
      padding_counts: whether tokens that do not exist count in segments, their keys as zeros, as in CAB's code.

    Returns:
      A Z and Bᵀ, both `(B, N, H, m)`, in the dtype of `q`; m is N for shorter sequences.
    """
    q, k = jnp.asarray(q), jnp.asarray(k)
    dtype, wide = q.dtype, at_least_float32(q.dtype)
    q, k = (x.astype(wide) * x.shape[-1] ** -0.5 for x in (q, k))
    read = None
    if real is not None:
        read = jnp.asarray(real)
        read = read if read.ndim == 3 else read[..., None]
        k = jnp.where(read[..., None], k, 0) if padding_counts else k
    segments = segment_means(q.shape[1], num_landmarks, None if padding_counts else real)
    weights = jnp.broadcast_to(segments.weights, (q.shape[0], *segments.weights.shape[1:])).astype(wide)
    q_means, k_means = (jnp.einsum("bmn,bnhd->bmhd", weights, x) for x in (q, k))
    exist = segments.exist[:, None, None]  # (B|1, 1, 1, m)
    if padding_counts and read is not None and q.shape[1] <= num_landmarks:
        exist = read.swapaxes(1, 2)[:, :, None]  # every token is its own landmark
    rows = masked_softmax(jnp.einsum("bnhd,bmhd->bhnm", q, k_means), exist)
    keys = masked_softmax(jnp.einsum("bmhd,bnhd->bnhm", q_means, k), None if read is None else read[..., None], axis=1)
    # A few tokens are their own landmarks: the map is exact without its inner inverse.
    few = segments.few[:, None, None, None]
    inner = masked_softmax(jnp.einsum("bmhd,blhd->bhml", q_means, k_means), exist)
    eye = jnp.eye(inner.shape[-1], dtype=wide)
    inverse = cubic_newton_inverse(jnp.where(few, eye, inner), iterations=iterations, shared_start=shared_start)
    rows = jnp.where(few, rows, jnp.matmul(rows, inverse, precision="highest"))
    own = weights.swapaxes(1, 2)[:, :, None]
    own = own if read is None else jnp.where(read[..., None], own, 0)
    keys = jnp.where(few, own, keys)
    return rows.swapaxes(1, 2).astype(dtype), keys.astype(dtype)


@register(
    "cab.nystrom",
    paper=Paper(
        "Nyströmformer: A Nyström-Based Algorithm for Approximating Self-Attention",
        "Xiong et al.",
        2021,
        arxiv="2102.03902",
    ),
    source=Source.AUTHORS_CODE,
    repository="Shark-NLP/CAB",
    cost=Cost(time="O(N·H·m·D + H·m³)", memory="O(N·H·m)"),
    kernel="linear_attention",
    summary="softmax attention's map from its rows and columns at a few landmarks, by a Nyström approximation",
    small={"num_landmarks": 4, "conv_size": 3},
)
class NystromAttention(KeyMaskedMixer):
    """Tokens (B, N, C) to (B, N, C). See the module docstring for the equations.

    Args:
      features: channels C.
      num_heads: heads H.
      num_landmarks: m.
      conv_size: taps of the convolution of values, odd; none when None.
      iterations: of the inverse.
      shared_start: see `attnlab.nn.newton_inverse.cubic_newton_inverse`.
      qkv_bias: whether the maps to queries, keys and values have a bias; the last map has.
      head_dim: D; C / H when None.
      dtype: of the computation and the result; that of the tokens when None.
      param_dtype: of the parameters.
      rngs: stream `params`.

    Raises:
      ValueError: for sizes that do not fit.
    """

    def __init__(
        self,
        features: int,
        *,
        num_heads: int,
        num_landmarks: int = 16,
        conv_size: int | None = None,
        iterations: int = 6,
        shared_start: bool = False,
        qkv_bias: bool = True,
        head_dim: int | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        common = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        super().__init__(features, num_heads=num_heads, head_dim=head_dim, qkv_bias=qkv_bias, **common)
        if num_landmarks < 1 or iterations < 1:
            raise ValueError(f"num_landmarks and iterations must be at least 1, got {num_landmarks} and {iterations}")
        self.num_landmarks, self.iterations, self.shared_start = num_landmarks, iterations, shared_start
        self.conv = nnx.data(None)
        if conv_size is not None:
            init = uniform_init(conv_size)
            self.conv = HeadConv(num_heads, conv_size, kernel_init=init, param_dtype=param_dtype, rngs=rngs)

    def attend(self, heads: Heads, given: Given) -> jax.Array:
        return self.attend_to(heads, given.mask)

    def attend_to(self, heads: Heads, real: jax.Array | None, *, padding_counts: bool = False) -> jax.Array:
        """`(B, N, H, E)` of heads; `real` and `padding_counts` as in `nystrom_features`."""
        q, k = nystrom_features(
            heads.q,
            heads.k,
            num_landmarks=self.num_landmarks,
            iterations=self.iterations,
            shared_start=self.shared_start,
            real=real,
            padding_counts=padding_counts,
        )
        v = heads.v
        if real is not None:
            v = jnp.where(real.reshape(*real.shape, *(1,) * (4 - real.ndim)), v, 0)
        record(self, "attention", lambda: jnp.einsum("bnhr,bmhr->bhnm", *(x.astype(jnp.float32) for x in (q, k))))
        y = linear_attention(q, k, v, causal=False)
        return y if self.conv is None else y + self.conv(v)
