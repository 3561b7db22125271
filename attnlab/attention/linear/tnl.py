"""TransNormerLLM's attention (Qin et al., 2024, arXiv:2405.17381; code: OpenNLPLab/TransnormerLLM).

Lightning attention behind projections with SiLU, a norm in place of a denominator, and a gate:

    [q|k|v|u] = x W_qkvu;   o = op(lrpe(silu(q)), lrpe(silu(k)), v);   y = (u · srms_norm(o)) W_o

`op` is causal linear attention with the layer's slopes (`lightning_attention_2`), srms_norm is RMSNorm without weights
over all H·D channels. LRPE-d turns queries and keys by learned angles and doubles their size, so that q·k depends on
cos(θ (i - j)); the paper has it in the first layer alone:

    lrpe(x)_i = [x_i cos(θ i), x_i sin(θ i)],   θ (H, D), initially 10000^(-2m / (H·D)), m counting through all heads

`TnlAttention` is the other module that the authors print (OpenNLPLab/lightning-attention, `tnl_attn.py`): SiLU on v
too, LayerNorm over the channels, and a low-rank gate sigmoid(x W_1 W_2). Cost O(N·D²) per head; decoding carries
(H, D, D).
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab.attention.linear.lightning_attention_2 import layer_slopes
from attnlab.contract import Constant, Pattern
from attnlab.nn.heads import FromHeads, ToHeads
from attnlab.nn.linear import Linear
from attnlab.nn.linear_mixer import LinearMixer, Places, Recurrence
from attnlab.nn.norms import LayerNorm, rms_norm
from attnlab.nn.rotary import initial_theta, lrpe
from attnlab.registry import Cost, Paper, Source, register

PAPER = Paper(
    "Various Lengths, Constant Speed: Efficient Language Modeling with Lightning Attention",
    "Qin et al.",
    2024,
    arxiv="2405.17381",
    number=13,
)
COST = Cost(time="O(N·H·D²)", memory="O(N·H·D)", state="H·D²")


class _TnlMixer(LinearMixer):
    """What both modules share: sizes, slopes, patterns."""

    patterns = frozenset({Pattern.CAUSAL_SELF, Pattern.SELF})
    permutation_equivariant = True

    def _set_sizes(
        self, features: int, num_heads: int, width: int, causal: bool, layer: int, num_layers: int, dtype: Any
    ) -> int:
        if width % num_heads:
            raise ValueError(f"width {width} is not a multiple of num_heads {num_heads}")
        self.features, self.num_heads, self.causal, self.dtype = features, num_heads, causal, dtype
        self.key_size = self.value_size = width // num_heads
        self.slopes = Constant(layer_slopes(num_heads, layer, num_layers))
        return self.value_size


@register(
    "tnl",
    paper=PAPER,
    source=Source.AUTHORS_CODE,
    repository="OpenNLPLab/TransnormerLLM",
    cost=COST,
    kernel="linear_attention",
    summary="lightning attention with SiLU, a norm for a denominator, and a gate; LRPE-d in the first layer",
)
class NormLinearAttention(_TnlMixer):
    """Tokens (B, N, C) to (B, N, C). See the module docstring for the equations.

    Args:
      features: channels C.
      num_heads: heads H.
      hidden: width H·D of queries, keys, values and gate; C when None.
      use_bias: whether the projections have biases.
      lrpe_layers: layers whose queries and keys are turned by LRPE-d.
      causal: False sums over all tokens, without decay.
      layer: index of the layer, from which slopes and LRPE-d follow.
      num_layers: layers of the model.
      dtype: of the computation; that of the tokens when None.
      param_dtype: of the parameters.
      rngs: stream `params`.
    """

    def __init__(
        self,
        features: int,
        *,
        num_heads: int,
        hidden: int | None = None,
        use_bias: bool = False,
        lrpe_layers: Sequence[int] = (0,),
        causal: bool = True,
        layer: int = 0,
        num_layers: int = 1,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        width = features if hidden is None else hidden
        head_dim = self._set_sizes(features, num_heads, width, causal, layer, num_layers, dtype)
        common = {"use_bias": use_bias, "dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.query, self.key, self.value, self.gate = (
            ToHeads(features, num_heads, head_dim, **common) for _ in range(4)
        )
        self.out = FromHeads(num_heads, head_dim, features, **common)
        self.theta = nnx.data(None)
        if layer in lrpe_layers:
            self.key_size = 2 * head_dim
            theta = initial_theta(num_heads, head_dim).astype(param_dtype)
            self.theta = nnx.Param(theta, logical_axes=("heads", None), weight_decay=False)
            self.accepts = self.accepts | {"positions"}
            self.permutation_equivariant = False

    def project(self, x: jax.Array, source: jax.Array, at: Places, carry: Any) -> tuple[Recurrence, Any]:
        q, k, v = jax.nn.silu(self.query(x)), jax.nn.silu(self.key(x)), self.value(x)
        if self.theta is not None:
            q, k = (lrpe(part, self.theta[...], at.queries) for part in (q, k))
        return Recurrence(q, k, v, log_decay=-self.slopes[...]), carry

    def merge(self, y: jax.Array, x: jax.Array) -> jax.Array:
        return self.out(self.gate(x) * rms_norm(y, axes=2))


@register(
    "tnl.attention",
    paper=PAPER,
    source=Source.AUTHORS_CODE,
    repository="OpenNLPLab/lightning-attention",
    cost=COST,
    kernel="linear_attention",
    summary="lightning attention with SiLU on q, k and v, LayerNorm and a low-rank sigmoid gate",
)
class TnlAttention(_TnlMixer):
    """Tokens (B, N, C) to (B, N, C). See the module docstring for the equations.

    Args:
      features: channels C.
      num_heads: heads H.
      use_bias: whether the projections have biases.
      causal: False sums over all tokens, without decay.
      layer: index of the layer, from which the slopes follow.
      num_layers: layers of the model.
      eps: of the norm.
      dtype: of the computation; that of the tokens when None.
      param_dtype: of the parameters.
      rngs: stream `params`.
    """

    def __init__(
        self,
        features: int,
        *,
        num_heads: int,
        use_bias: bool = False,
        causal: bool = True,
        layer: int = 0,
        num_layers: int = 1,
        eps: float = 1e-5,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        head_dim = self._set_sizes(features, num_heads, features, causal, layer, num_layers, dtype)
        common = {"use_bias": use_bias, "dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.query, self.key, self.value = (ToHeads(features, num_heads, head_dim, **common) for _ in range(3))
        self.norm = LayerNorm((num_heads, head_dim), eps=eps, param_dtype=param_dtype, rngs=rngs)
        self.gate_down = Linear(features, head_dim, axes=("embed", None), **common)
        self.gate_up = ToHeads(head_dim, num_heads, head_dim, **common)
        self.out = FromHeads(num_heads, head_dim, features, **common)

    def project(self, x: jax.Array, source: jax.Array, at: Places, carry: Any) -> tuple[Recurrence, Any]:
        q, k, v = (jax.nn.silu(part(x)) for part in (self.query, self.key, self.value))
        return Recurrence(q, k, v, log_decay=-self.slopes[...]), carry

    def merge(self, y: jax.Array, x: jax.Array) -> jax.Array:
        return self.out(self.norm(y) * jax.nn.sigmoid(self.gate_up(self.gate_down(x))))
