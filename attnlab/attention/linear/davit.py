"""Channel group attention of DaViT (Ding et al., ECCV 2022, arXiv:2204.03645; code: dingmyu/davit, and timm's).

In each of H groups of D channels, channels attend to channels; tokens are what is summed over, so time is linear in N:

    version 1    A = softmax_b(D^-1/2 Σ_n K[n, a] V[n, b])     (D, D)      y[n, a] = Σ_b A[a, b] Q[n, b]
    version 2    A = softmax_b(N^-1/2 Σ_n Q[n, a] K[n, b])                 y[n, a] = Σ_b A[a, b] V[n, b]

Version 1 is DaViT's: the query takes the place of the value (as in the code; the paper names projections otherwise).
Version 2 is Florence-2's. Masks, and cross-attention in version 1, to the matrix of a context, are our extension.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from attnlab.contract import Pattern, UnsupportedArgument, View
from attnlab.nn.cache import ContextCache
from attnlab.nn.dense_mixer import Core, Heads
from attnlab.nn.projected_mixer import ProjectedMixer
from attnlab.registry import Cost, Paper, Source, register
from pallas_kernels.dtypes import at_least_float32

PAPER = Paper("DaViT: Dual Attention Vision Transformers", "Ding et al.", 2022, arxiv="2204.03645", number=20)


def channel_attention(
    left: ArrayLike, right: ArrayLike, value: ArrayLike, *, scale: ArrayLike, mask: ArrayLike | None = None
) -> jax.Array:
    """A = softmax_b(scale · Σ_m left[m, a] right[m, b]), y[n, a] = Σ_b A[a, b] value[n, b].

    Args:
      left: (B, M, H, D), whose channels attend.
      right: (B, M, H, D), whose channels are attended to.
      value: (B, N, H, D).
      scale: of the scores, broadcastable to (B, H, D, D).
      mask: (B, M) boolean, which tokens of `left` and `right` exist; without any the result is zero.

    Returns:
      (B, N, H, D) in the dtype of `value`; scores and softmax are float32 (or wider).
    """
    left, right, value = jnp.asarray(left), jnp.asarray(right), jnp.asarray(value)
    wide = at_least_float32(left.dtype)
    if mask is not None:
        left = jnp.where(mask[:, :, None, None], left, 0)
    scores = jnp.einsum("bmhc,bmhd->bhcd", left, right, preferred_element_type=wide)
    weights = jax.nn.softmax(scores * scale, axis=-1)
    if mask is not None:
        weights = jnp.where(mask.any(1)[:, None, None, None], weights, 0)
    return jnp.einsum("bhcd,bnhd->bnhc", weights, value, preferred_element_type=wide).astype(value.dtype)


class ChannelCore(Core):
    """Attention of channels between the projections; arguments as `ChannelGroupAttention`."""

    def __init__(self, version: int = 1, dynamic_scale: bool = True):
        if version not in (1, 2):
            raise ValueError(f"version must be 1 or 2, got {version}")
        self.version, self.dynamic_scale = version, dynamic_scale

    def init_cache(self, *sizes: Any, context: Heads | None = None, context_mask: Any = None) -> ContextCache:
        if context is None or self.version == 2:
            raise UnsupportedArgument("channel group attention decodes attention to a context, in version 1")
        return ContextCache.create(context.k, context.v, context_mask, dtype=sizes[-1])

    def __call__(self, heads: Heads, view: View, cache: Any = None, **points: Any) -> tuple[jax.Array, Any]:
        q, k, v, mask = *heads[:3], view.mask
        if cache is not None:
            k, v, mask = cache.keys, cache.values, cache.mask
        scale = q.shape[-1] ** -0.5
        if self.version == 1:
            return channel_attention(k, v, q, scale=scale, mask=mask), cache
        if q.shape[1] != k.shape[1]:
            raise UnsupportedArgument("version 2 of channel group attention does not take context")
        if self.dynamic_scale:
            count = jnp.full(1, q.shape[1]) if mask is None else jnp.maximum(mask.sum(1), 1)
            scale = count[:, None, None, None].astype(jnp.float32) ** -0.5
        return channel_attention(q, k, v, scale=scale, mask=mask), None


@register(
    "davit",
    paper=PAPER,
    source=Source.THIRD_PARTY,
    repository="huggingface/pytorch-image-models",
    cost=Cost(time="O(N·C·D)", memory="O(C·D)"),
    summary="channels attend to channels inside groups, over all tokens: linear in their number",
)
class ChannelGroupAttention(ProjectedMixer):
    """Tokens of any layout to the same shape. See the module docstring for the equations.

    Args:
      features: channels C.
      version: 1 as DaViT has it, 2 as Florence-2 does.
      dynamic_scale: whether version 2 scales by N^-1/2, not D^-1/2.
      **projections: groups `num_heads` and biases of the projections, layout: see `ProjectedMixer`.

    Raises:
      ValueError: for another version, groups that do not divide the channels, causality, or heads of several sizes.
    """

    patterns = frozenset({Pattern.SELF, Pattern.CROSS})

    def __init__(
        self, features: int, *, version: int = 1, dynamic_scale: bool = True, rngs: nnx.Rngs, **projections: Any
    ):
        super().__init__(features, **projections, rngs=rngs)
        if self.causal or self.sizes != (self.num_heads, self.sizes.key_size, self.sizes.key_size):
            raise UnsupportedArgument(f"channels attend to channels of one size, not causally, got {projections}")
        self.set_core(ChannelCore(version, dynamic_scale))
        self.accepts = frozenset({"key_mask"})
