"""LightNet's additive linear recurrence (Qin et al., 2024, arXiv:2405.21022).

Keys are normalised by a softmax over tokens, per head and key channel. With logits g, for token t:

    y_t = scale · q_t · Σ_{s ≤ t} softmax_{s ≤ t}(g)_s k_sᵀ v_s        q, k, g (N, D), v (N, E)

Non-causal, over all tokens, one pass suffices for any number of axes, and the order of tokens does not matter. Causal,
z_t = log Σ_{s ≤ t} exp(g_s) grows from token to token, which is linear attention with a decay per token and channel:

    S_t = exp(z_{t-1} - z_t) S_{t-1} + (exp(g_t - z_t) k_t)ᵀ v_t,   y_t = scale · q_t S_t

Every exponent is at most 0. Decoding carries S (H, D, E) and z (H, D). The mixer is fla's layer, where k_t = 1 in front
of logits g = x W_k, scale = D^-1/2, and heads are joined by a norm over all channels and a low-rank gate:

    y = (rms_norm(recurrence(silu(x W_q), x W_k, x W_v)) · silu(x W_1 W_2)) W_o

optionally with short causal convolutions behind W_q, W_k and W_v. Cost O(N·D·E) per head. The paper's positions are
`attnlab.nn.rotary.lrpe` (MD-LRPE) and `attnlab.nn.toeplitz` (MD-TPE).
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from attnlab.contract import Layout, Pattern
from attnlab.nn.causal_conv import CausalConv
from attnlab.nn.heads import ToHeads, merge_heads, split_heads
from attnlab.nn.linear import Linear
from attnlab.nn.linear_mixer import Places, Recurrence
from attnlab.nn.masking import segment_pair
from attnlab.nn.norms import RMSNorm
from attnlab.nn.prefix_scans import NOTHING, softmax_recurrence
from attnlab.nn.projected_mixer import ProjectedLinearMixer
from attnlab.registry import Cost, Paper, Source, register
from pallas_kernels.linear_attention import linear_attention


def additive_recurrence(
    q: ArrayLike, k: ArrayLike, v: ArrayLike, g: ArrayLike, *, causal: bool = True, scale: float | None = None
) -> jax.Array:
    """Linear attention with keys normalised by a softmax of logits over tokens.

    Args:
      q: queries, (B, N, H, D).
      k: keys, (B, M, H, D); M = N if causal.
      v: values, (B, M, H, E).
      g: logits, (B, M, H, D).
      causal: token t reads tokens s ≤ t.
      scale: of the result; 1 when None.

    Returns:
      (B, N, H, E) in the dtype of `q`.
    """
    weights, decay, _ = softmax_recurrence(g, causal=causal)
    k = (weights * k).astype(jnp.result_type(q))
    return linear_attention(q, k, v, log_decay=decay, causal=causal, scale=scale)


@register(
    "lightnet",
    paper=Paper(
        "You Only Scan Once: Efficient Multi-dimension Sequential Modeling with LightNet",
        "Qin et al.",
        2024,
        arxiv="2405.21022",
        number=158,
    ),
    source=Source.THIRD_PARTY,
    repository="fla-org/flash-linear-attention",
    cost=Cost(time="O(N·H·D·E)", memory="O(N·H·(D+E))", state="H·D·(E+1)"),
    kernel="linear_attention",
    summary="linear attention with keys softmaxed over tokens per channel; one scan for any number of axes",
    small={"head_dim": 6, "gate_rank": 4},
)
class LightNetAttention(ProjectedLinearMixer):
    """Tokens of any layout to the same shape. See the module docstring for the equations.

    Args:
      features: channels C.
      num_heads: heads H.
      head_dim: D of queries and keys; values have E = C / H.
      gate_rank: channels between the two maps of the gate.
      conv_size: tokens that short convolutions read; None for none.
      conv_bias: whether these have a bias.
      rngs: stream `params`.
      **projections: biases of the projections, pattern and layout: see `ProjectedLinearMixer`.

    Raises:
      ValueError: if the heads do not divide the channels.
    """

    patterns = frozenset(Pattern)
    layouts = frozenset(Layout)

    def __init__(
        self,
        features: int,
        *,
        num_heads: int,
        head_dim: int = 128,
        gate_rank: int = 128,
        conv_size: int | None = None,
        conv_bias: bool = False,
        rngs: nnx.Rngs,
        **projections: Any,
    ):
        if features % num_heads:
            raise ValueError(f"features {features} is not a multiple of num_heads {num_heads}")
        sizes = {"num_heads": num_heads, "num_kv_heads": num_heads, "head_dim": head_dim}
        super().__init__(features, **sizes, value_dim=features // num_heads, **projections, rngs=rngs)
        self.scale, self.permutation_equivariant = head_dim**-0.5, conv_size is None
        common = {"use_bias": False, "dtype": self.dtype, "param_dtype": self.param_dtype, "rngs": rngs}
        self.gate_down = Linear(features, gate_rank, axes=("embed", None), **common)
        self.gate_up = ToHeads(gate_rank, num_heads, self.value_size, **common)
        self.norm = RMSNorm(features, param_dtype=self.param_dtype, rngs=rngs)
        self.query_conv = self.key_conv = self.value_conv = nnx.data(None)
        if conv_size is not None:
            self.query_conv, self.key_conv, self.value_conv = (
                CausalConv((num_heads, size), conv_size, **(common | {"use_bias": conv_bias}))
                for size in (head_dim, head_dim, self.value_size)
            )

    def carry(self, batch_size: int) -> tuple[jax.Array, ...]:
        """z of no tokens, and the states of the convolutions."""
        convs = (self.query_conv, self.key_conv, self.value_conv)
        z = jnp.full((batch_size, self.num_heads, self.key_size), NOTHING, jnp.float32)
        return (z, *(conv.init_state(batch_size) for conv in convs if conv is not None))

    def project(self, x: jax.Array, source: jax.Array, at: Places, carry: Any) -> tuple[Recurrence, Any]:
        q, k, v = self.query(x), self.key(source), self.value(source)
        ids = (None, None) if at.segment_ids is None else segment_pair(at.segment_ids)
        z, *states = carry
        if states:
            queries = {"real": at.real_queries, "segment_ids": ids[0]}
            keys = {"real": at.real, "segment_ids": ids[1]}
            q, states[0] = self.query_conv(q, states[0], **queries)
            k, states[1] = self.key_conv(k, states[1], **keys)
            v, states[2] = self.value_conv(v, states[2], **keys)
        weights, decay, after = softmax_recurrence(
            k, causal=self.causal, real=at.real, segment_ids=ids[1], initial=z if self.causal else None
        )
        parts = Recurrence(jax.nn.silu(q), weights.astype(q.dtype), v, decay)
        return parts, (z if after is None else after, *states)

    def merge(self, y: jax.Array, x: jax.Array) -> jax.Array:
        y = split_heads(self.norm(merge_heads(y)), self.num_heads)
        return self.out(y * jax.nn.silu(self.gate_up(self.gate_down(x))))
