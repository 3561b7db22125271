"""Hedgehog (Zhang et al., 2024, arXiv:2402.04347): linear attention whose feature map learns to imitate softmax.

A learned linear map per head, then a positive activation φ of u and -u:

    u = x W_h (+ b) (+ x);   φ(x) = act([u, -u]);   y_i = Σ_j φ(q_i)·φ(k_j) v_j / (Σ_j φ(q_i)·φ(k_j) + 1e-12)

Activations circulate under one name; all are here, by name:

    softmax_dim   [softmax(u), softmax(-u)], each half sums to 1; that of the authors' later code (the default)
    exp_dim       [exp(u - max u), exp(min u - u)], each half rescaled to a largest feature of 1
    exp           [exp(u), exp(-u)], the paper's listing; it overflows for large u
    softmax_joint softmax over both halves of [2u, -2u], that of fla-org/flash-linear-attention
    pos_elu, relu 1 + elu(u) and relu(u), of u alone: the baselines of the paper

The first two and the last are clamped at 1e-12 from below. Code: HazyResearch/lolcats, `src/model/feature_map.py`. Cost
O(N·F·E) per head. For training by distillation see `attnlab.objectives.attention_distillation`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from attnlab.contract import Pattern
from attnlab.nn.feature_maps import elu1, relu
from attnlab.nn.heads import FromHeads, ToHeads
from attnlab.nn.linear_mixer import LinearMixer, Places, Recurrence
from attnlab.nn.norms import rms_norm
from attnlab.nn.rotary import Rotary
from attnlab.registry import Cost, Paper, Source, register
from attnlab.suggest import suggestion
from pallas_kernels.dtypes import at_least_float32

HALVES = {
    "softmax_dim": lambda u: jax.nn.softmax(u, axis=-1),
    "exp_dim": lambda u: jnp.exp(u - u.max(-1, keepdims=True)),
    "exp": jnp.exp,
}
WHOLES = {
    "pos_elu": elu1,
    "relu": relu,
    "softmax_joint": lambda u: jax.nn.softmax(jnp.concatenate([2 * u, -2 * u], axis=-1), axis=-1),
}
UNCLAMPED = ("exp", "softmax_joint")


def hedgehog_features(
    x: ArrayLike,
    kernel: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    activation: str = "softmax_dim",
    full_space: bool = True,
    skip_connection: bool = False,
    eps: float = 1e-12,
) -> jax.Array:
    """Features φ(x) of queries or keys.

    Args:
      x: (B, N, H, D).
      kernel: (H, D, F) one per head, or (D, F) for all heads.
      bias: added to u, broadcastable to (H, F): (H, 1) per head, (F,) per feature; or None.
      activation: a name of the module docstring.
      full_space: whether -u has features too; for the activations on halves.
      skip_connection: adds x to u, which needs F = D.
      eps: least feature.

    Returns:
      (B, N, H, F), or (B, N, H, 2F) with both halves, in the dtype of `x`; computed in float32.

    Raises:
      ValueError: for an unknown activation, or one that has no half space.
    """
    if activation not in HALVES | WHOLES:
        raise ValueError(f"no feature map is called {activation!r}: {suggestion(activation, HALVES | WHOLES)}")
    if activation == "softmax_joint" and not full_space:
        raise ValueError("softmax_joint is one softmax over both halves: full_space must be True")
    x = jnp.asarray(x)
    wide = at_least_float32(x.dtype)
    per_head = "hdf" if jnp.ndim(kernel) == 3 else "df"
    u = jnp.einsum(f"bnhd,{per_head}->bnhf", x.astype(wide), jnp.asarray(kernel, wide))
    u = u if bias is None else u + jnp.asarray(bias, wide)
    u = u + x if skip_connection else u
    if activation in WHOLES:
        features = WHOLES[activation](u)
    else:
        half = HALVES[activation]
        features = jnp.concatenate([half(u), half(-u)], axis=-1) if full_space else half(u)
    return (features if activation in UNCLAMPED else jnp.maximum(features, eps)).astype(x.dtype)


class HedgehogFeatureMap(nnx.Module):
    """`hedgehog_features` with its learned map: (B, N, H, D) to (B, N, H, `out_features`).

    Args:
      num_heads: heads H.
      head_dim: D.
      feature_dim: F; D when None.
      activation: a name of the module docstring.
      full_space: whether -u has features too.
      skip_connection: adds x to u; needs F = D.
      use_bias: a learned bias: one number per head, or F of a shared map.
      shared: one map (D, F) for all heads, initially the identity, as in the paper's listing.
      zero_init: start from u = x: the identity, or zeros with a skip connection.
      eps: least feature.
      param_dtype: of the parameters.
      rngs: stream `params`.
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        *,
        feature_dim: int | None = None,
        activation: str = "softmax_dim",
        full_space: bool = True,
        skip_connection: bool = False,
        use_bias: bool = False,
        shared: bool = False,
        zero_init: bool = False,
        eps: float = 1e-12,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        size = head_dim if feature_dim is None else feature_dim
        if skip_connection and size != head_dim:
            raise ValueError(f"skip_connection needs feature_dim = head_dim, got {size} and {head_dim}")
        self.activation, self.full_space, self.skip_connection, self.eps = activation, full_space, skip_connection, eps
        both = activation == "softmax_joint" or (full_space and activation in HALVES)
        self.out_features = 2 * size if both else size
        shape = (head_dim, size) if shared else (num_heads, head_dim, size)
        if zero_init or shared:
            start = jnp.zeros((head_dim, size)) if skip_connection else jnp.eye(head_dim, size)
            kernel = jnp.broadcast_to(start, shape).astype(param_dtype)
        else:
            uniform = nnx.initializers.variance_scaling(2.0, "fan_in", "uniform", in_axis=-2, batch_axis=(0,))
            kernel = uniform(rngs.params(), shape, param_dtype)
        axes = (None, None) if shared else ("heads", None, None)
        self.kernel = nnx.Param(kernel, logical_axes=axes)
        self.bias = nnx.data(None)
        if use_bias:
            self.bias = nnx.Param(jnp.zeros((size,) if shared else (num_heads, 1), param_dtype))

    def __call__(self, x: ArrayLike) -> jax.Array:
        return hedgehog_features(
            x,
            self.kernel[...],
            None if self.bias is None else self.bias[...],
            activation=self.activation,
            full_space=self.full_space,
            skip_connection=self.skip_connection,
            eps=self.eps,
        )


@register(
    "hedgehog",
    paper=Paper(
        "The Hedgehog & the Porcupine: Expressive Linear Attentions with Softmax Mimicry",
        "Zhang et al.",
        2024,
        arxiv="2402.04347",
        number=134,
    ),
    source=Source.AUTHORS_CODE,
    repository="HazyResearch/lolcats",
    cost=Cost(time="O(N·H·F·E)", memory="O(N·H·(F+E))", state="H·F·(E+1)"),
    kernel="linear_attention",
    summary="linear attention with a learned feature map that imitates softmax",
)
class HedgehogAttention(LinearMixer):
    """Tokens (B, N, C) to (B, N, C). See the module docstring for the equations.

    Args:
      features: channels C.
      num_heads: heads H.
      num_kv_heads: key and value heads G, a divisor of H; H when None.
      head_dim: D; C // H when None.
      causal: whether token i sees tokens up to i only.
      context_features: channels of the context for cross-attention; C when None.
      feature_dim: F; D when None.
      activation: a name of the module docstring.
      full_space: whether -u has features too.
      skip_connection: adds q or k to u.
      feature_bias: whether u has a bias.
      shared_map: one map for all heads.
      zero_init: start from u = x.
      tie_qk_kernels: one feature map for queries and keys; needs G = H unless the map is shared.
      normalize: divide by the sum of weights; if False, RMSNorm over each head's result instead, as fla's layer has it.
      scale: of the products; matters only without normalisation. 1 when None.
      rotary: rotary positions of queries and keys before the map, as options or as their base alone; None for none.
      qkv_bias: whether the maps to queries, keys and values have biases.
      out_bias: whether the map out of the heads has a bias.
      eps: least feature.
      dtype: of the computation; that of the tokens when None.
      param_dtype: of the parameters.
      rngs: stream `params`.
    """

    patterns = frozenset(Pattern)

    def __init__(
        self,
        features: int,
        *,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        causal: bool = True,
        context_features: int | None = None,
        feature_dim: int | None = None,
        activation: str = "softmax_dim",
        full_space: bool = True,
        skip_connection: bool = False,
        feature_bias: bool = False,
        shared_map: bool = False,
        zero_init: bool = False,
        tie_qk_kernels: bool = False,
        normalize: bool = True,
        scale: float | None = None,
        rotary: Rotary | float | None = None,
        qkv_bias: bool = False,
        out_bias: bool = False,
        eps: float = 1e-12,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if head_dim is None and features % num_heads:
            raise ValueError(f"features {features} is not a multiple of num_heads {num_heads}; give head_dim")
        head_dim = features // num_heads if head_dim is None else head_dim
        groups = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads % groups:
            raise ValueError(f"num_heads {num_heads} is not a multiple of num_kv_heads {groups}")
        if tie_qk_kernels and groups != num_heads and not shared_map:
            raise ValueError(f"tie_qk_kernels needs as many key heads as heads, got {groups} and {num_heads}")
        self.features, self.num_heads, self.causal, self.dtype = features, num_heads, causal, dtype
        self.normalize, self.scale = normalize, scale
        self.rotary = Rotary.of(rotary)
        self.value_size, self.context_features = head_dim, context_features
        self.permutation_equivariant = rotary is None
        if causal and context_features is not None:
            self.accepts = self.accepts - {"segment_ids"}  # the op takes one array of ids when causal
        if self.rotary is not None:
            self.rotary.check(head_dim, 1)
            self.accepts = self.accepts | {"positions"}
        source = features if context_features is None else context_features
        common = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.query = ToHeads(features, num_heads, head_dim, use_bias=qkv_bias, **common)
        self.key = ToHeads(source, groups, head_dim, use_bias=qkv_bias, **common)
        self.value = ToHeads(source, groups, head_dim, use_bias=qkv_bias, **common)
        self.out = FromHeads(num_heads, head_dim, features, use_bias=out_bias, **common)
        mapping = {
            "feature_dim": feature_dim,
            "activation": activation,
            "full_space": full_space,
            "skip_connection": skip_connection,
            "use_bias": feature_bias,
            "shared": shared_map,
            "zero_init": zero_init,
            "eps": eps,
            "param_dtype": param_dtype,
            "rngs": rngs,
        }
        self.query_map = HedgehogFeatureMap(num_heads, head_dim, **mapping)
        self.key_map = nnx.data(None) if tie_qk_kernels else HedgehogFeatureMap(groups, head_dim, **mapping)
        self.key_size = self.query_map.out_features

    def project(self, x: jax.Array, source: jax.Array, at: Places, carry: Any) -> tuple[Recurrence, Any]:
        q, k, v = self.query(x), self.key(source), self.value(source)
        if self.rotary is not None:
            q, k = self.rotary(q, at.queries), self.rotary(k, at.keys)
        return Recurrence(self.query_map(q), (self.query_map if self.key_map is None else self.key_map)(k), v), carry

    def merge(self, y: jax.Array, x: jax.Array) -> jax.Array:
        return self.out(y if self.normalize else rms_norm(y))
