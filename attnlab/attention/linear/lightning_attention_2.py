"""Lightning Attention-2 (Qin et al., 2024, arXiv:2401.04658; code: OpenNLPLab/lightning-attention).

Causal linear attention with a constant exponential decay per head: no softmax, no normaliser, no scale.

    S_i = exp(-s_h) S_{i-1} + k_iᵀ v_i,   y_i = q_i S_i            S (D, E) per head, in float32

The op runs in chunks of tokens (`pallas_kernels.linear_attention`): inside a chunk as masked attention, between chunks
through S. The slopes s_h are those of ALiBi; in layer l of L they are scaled by 1 - l / (L - 1) + 1e-5, so that the
last layer hardly forgets. The module is the attention of MiniMax-01 (MiniMax, 2025, arXiv:2501.08313) as published in
transformers (`MiniMaxLightningAttention`):

    [q|k|v] = silu(x W_qkv), split inside each head;   y = rms_norm(op(q, k, v)) · sigmoid(x W_g) W_o

whose slopes are 2^(-8 (h+1) / H) for any H, scaled by 1 - l / (L - 1 + 1e-5) + 1e-5. Cost O(N·D·E) per head.
Non-causal, which the paper does not treat, it is the plain sum over all tokens, without decay.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from attnlab.contract import Constant, Pattern
from attnlab.nn.heads import FromHeads, ToHeads
from attnlab.nn.linear_mixer import LinearMixer, Places, Recurrence
from attnlab.nn.norms import RMSNorm
from attnlab.nn.position_bias import alibi_slopes
from attnlab.registry import Cost, Paper, Source, register
from pallas_kernels.linear_attention import linear_attention


def lightning_attention(
    q: ArrayLike, k: ArrayLike, v: ArrayLike, slopes: ArrayLike | None = None, **options: Any
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Causal linear attention with decay exp(-slope) per token.

    Args:
      q: queries, (B, N, H, D).
      k: keys, (B, N, G, D), G a divisor of H.
      v: values, (B, N, G, E).
      slopes: (H,), at least 0; no decay when None.
      **options: further arguments of `pallas_kernels.linear_attention`, such as `segment_ids` and `initial_state`.

    Returns:
      (B, N, H, E) in the dtype of `q`; with `return_state=True`, also the state (B, H, D, E) in float32.
    """
    decay = None if slopes is None else -jnp.asarray(slopes)
    return linear_attention(q, k, v, log_decay=decay, **options)


def layer_slopes(num_heads: int, layer: int, num_layers: int) -> jax.Array:
    """ALiBi slopes (H,) scaled for layer `layer` of `num_layers`, as TransNormerLLM has them; float32."""
    return alibi_slopes(num_heads) * (1 - layer / max(num_layers - 1, 1) + 1e-5)


@register(
    "lightning_attention_2",
    paper=Paper(
        "Lightning Attention-2: A Free Lunch for Handling Unlimited Sequence Lengths in Large Language Models",
        "Qin et al.",
        2024,
        arxiv="2401.04658",
        number=37,
    ),
    source=Source.AUTHORS_CODE,
    repository="OpenNLPLab/lightning-attention",
    cost=Cost(time="O(N·H·D·E)", memory="O(N·H·(D+E))", state="H·D·E"),
    kernel="linear_attention",
    summary="causal linear attention with a constant decay per head, tiled; gated, normed output",
)
class LightningAttention(LinearMixer):
    """Tokens (B, N, C) to (B, N, C). See the module docstring for the equations.

    Args:
      features: channels C.
      num_heads: heads H.
      head_dim: D, which is also E; C // H when None.
      causal: False sums over all tokens, without decay.
      layer: index of the layer, from which the decay follows.
      num_layers: layers of the model.
      eps: of the norm.
      dtype: of the computation; that of the tokens when None.
      param_dtype: of the parameters.
      rngs: stream `params`.
    """

    patterns = frozenset({Pattern.CAUSAL_SELF, Pattern.SELF})
    permutation_equivariant = True

    def __init__(
        self,
        features: int,
        *,
        num_heads: int,
        head_dim: int | None = None,
        causal: bool = True,
        layer: int = 0,
        num_layers: int = 1,
        eps: float = 1e-6,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if head_dim is None and features % num_heads:
            raise ValueError(f"features {features} is not a multiple of num_heads {num_heads}; give head_dim")
        head_dim = features // num_heads if head_dim is None else head_dim
        self.features, self.num_heads, self.causal, self.dtype = features, num_heads, causal, dtype
        self.key_size = self.value_size = head_dim
        factor = 1 - layer / (num_layers - 1 + 1e-5) + 1e-5
        self.slopes = Constant(2.0 ** (-8 * jnp.arange(1.0, num_heads + 1) / num_heads) * factor)
        common = {"use_bias": False, "dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.query, self.key, self.value, self.gate = (
            ToHeads(features, num_heads, head_dim, **common) for _ in range(4)
        )
        self.norm = RMSNorm((num_heads, head_dim), eps=eps, param_dtype=param_dtype, rngs=rngs)
        self.out = FromHeads(num_heads, head_dim, features, **common)

    def project(self, x: jax.Array, source: jax.Array, at: Places, carry: Any) -> tuple[Recurrence, Any]:
        q, k, v = (jax.nn.silu(part(x)) for part in (self.query, self.key, self.value))
        return Recurrence(q, k, v, log_decay=-self.slopes[...]), carry

    def merge(self, y: jax.Array, x: jax.Array) -> jax.Array:
        return self.out(self.norm(y) * jax.nn.sigmoid(self.gate(x)))
