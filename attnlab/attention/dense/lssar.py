"""Softplus attention with re-weighting, LSSA and LSSAR (2025, arXiv:2501.13428).

For query i, which sees n_i keys (i in causal self-attention), with natural logarithms and unit vectors q̂ = q / |q|:

    z_ij = ln D · ln n_i · q̂_i·k̂_j                a_ij = softplus(z_ij) / (Σ_j softplus(z_ij) + ε)        LSSA
    b_ij = relu(n_i a_ij - o_i)^p                  w_ij = b_ij / (Σ_j b_ij + ε)                            LSSAR

Sums run over the visible keys. The mean of n_i a_ij over them is 1, so with o_i = 1 only keys above the average keep a
weight; o_i = 0 for queries that see at most three keys, the first three rows of a causal sequence. p = 15 is for
sequences longer than those in training, p = 3 for their own length. Rotary positions come before the normalisation.
Cost O(N·M·(D+E)) per head; a form without the N x M weights needs two passes over the keys, since the power follows the
complete sum.

The authors' repository (iminfine/freeatten) was not to be had: this follows published notes of the text and a
third-party implementation. That n_i counts visible keys, and with it masks, packed segments, cross-attention and the
non-causal form, is our extension.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from attnlab.contract import View
from attnlab.nn.masking import full_mask, masked_softmax, visible_count, visible_keys
from attnlab.nn.norms import unit_norm
from attnlab.nn.projected_mixer import ProjectedMixer
from attnlab.nn.rotary import Rotary
from attnlab.nn.softmax import attention_scores, weighted_values
from attnlab.nn.softmax_core import ProductCore
from attnlab.points import Edits
from attnlab.registry import Cost, Paper, Source, register
from pallas_kernels.dtypes import at_least_float32

POSITIVE = {"softplus": jax.nn.softplus, "sigmoid": jax.nn.sigmoid, "relu": jax.nn.relu, "exp": None}


def softplus_attention(
    q: ArrayLike, k: ArrayLike, v: ArrayLike, *, mask: ArrayLike | None = None, causal: bool = True, **options: Any
) -> tuple[jax.Array, jax.Array]:
    """Attention by LSSA or LSSAR weights.

    Args:
      q: queries, (B, N, H, D).
      k: keys, (B, M, G, D), G a divisor of H.
      v: values, (B, M, G, E).
      mask: boolean, True where attention is allowed: (B, M), or broadcastable to (B, H, N, M).
      causal: query i sees keys j ≤ i, both counted from the start.
      **options: those of `softplus_weights`.

    Returns:
      (B, N, H, E) in the dtype of `v`, and the weights (B, H, N, M) in float32.
    """
    q, k, v = jnp.asarray(q), jnp.asarray(k), jnp.asarray(v)
    visible = None if mask is None else full_mask(mask)
    if causal:
        order = jnp.tri(q.shape[1], k.shape[1], dtype=bool)
        visible = order if visible is None else order & visible
    weights = softplus_weights(softplus_scores(q, k, visible), visible, **options)
    return weighted_values(weights, v), weights


def softplus_scores(q: jax.Array, k: jax.Array, visible: jax.Array | None) -> jax.Array:
    """z (B, H, N, M) in float32; arguments as the functions beside it."""
    q, k = (unit_norm(part.astype(at_least_float32(part.dtype))) for part in (q, k))
    count = visible_count(visible, k.shape[1])
    return attention_scores(q, k, scale=1.0) * (jnp.log(q.shape[-1]) * jnp.log(jnp.maximum(count, 1)))


def softplus_weights(
    scores: jax.Array,
    visible: jax.Array | None = None,
    *,
    power: float = 15,
    reweight: bool = True,
    positive: str = "softplus",
    free_keys: int = 3,
    eps: float = 1e-8,
) -> jax.Array:
    """Weights of scores z; a row that sees nothing, or where no key is above the average, gives zeros.

    Args:
      scores: (B, H, N, M), float32.
      visible: boolean, broadcastable to the scores; None if all is seen.
      power: p, at least 1.
      reweight: False for LSSA, without the second stage.
      positive: in place of softplus also "exp", "sigmoid" or "relu".
      free_keys: rows that see at most so many keys have o = 0.
      eps: of both sums.
    """
    count = visible_count(visible, scores.shape[-1])
    if positive == "exp":
        weights = masked_softmax(scores, visible)
    else:
        weights = POSITIVE[positive](scores)
        weights = weights if visible is None else jnp.where(visible, weights, 0)
        weights = weights / (weights.sum(-1, keepdims=True) + eps)
    if not reweight:
        return weights
    above = jax.nn.relu(weights * count - (count > free_keys).astype(weights.dtype))
    # Up to count^p without this, which float32 does not hold; a scale below 1 would do the same to eps.
    scale = jax.lax.stop_gradient(jnp.maximum(above.max(-1, keepdims=True), 1))
    kept = above > 0
    sharp = jnp.where(kept, jnp.where(kept, above / scale, 1) ** power, 0)
    return sharp / (sharp.sum(-1, keepdims=True) + eps * scale**-power)


class SoftplusCore(ProductCore):
    """LSSA or LSSAR weights.

    Args:
      rotary, rotate_keys, dropout, rngs: as in `ProductCore`.
      **options: those of `softplus_weights`.

    Raises:
      ValueError: for an unknown `positive`, a power below 1, or a negative `free_keys`.
    """

    def __init__(
        self,
        *,
        rotary: Rotary | float | None = None,
        rotate_keys: bool = True,
        dropout: float = 0.0,
        rngs: nnx.Rngs | None = None,
        **options: Any,
    ):
        super().__init__(rotary=rotary, rotate_keys=rotate_keys, dropout=dropout, rngs=rngs)
        if (positive := options.get("positive", "softplus")) not in POSITIVE:
            raise ValueError(f"positive must be one of {', '.join(POSITIVE)}, got {positive!r}")
        if (power := options.get("power", 15)) < 1 or options.get("free_keys", 3) < 0:
            raise ValueError(f"power must be at least 1 and free_keys 0, got {power} and {options.get('free_keys')}")
        self.options = tuple(options.items())

    def weights(
        self, q: jax.Array, k: jax.Array, view: View, *, edits: Edits | None = None, owner: nnx.Module | None = None
    ) -> jax.Array:
        visible = visible_keys(view)
        scores = self.edited(edits, owner, "scores", softplus_scores(q, k, visible), view=view, q=q, k=k)
        return softplus_weights(scores, visible, **dict(self.options))


@register(
    "lssar",
    paper=Paper(
        "Softplus Attention with Re-weighting Boosts Length Extrapolation in Large Language Models",
        "Gao and Spratling",
        2025,
        arxiv="2501.13428",
        number=30,
    ),
    source=Source.THIRD_PARTY,
    cost=Cost(time="O(N·M·H·(D+E))", memory="O(N·M·H)", state="M·G·(D+E)"),
    summary="softplus in place of exp, scaled by the number of keys; a power sharpens what is above the average",
)
class SoftplusAttention(ProjectedMixer):
    """Tokens of any layout to the same shape. See the module docstring for the equations.

    Args:
      features: channels C.
      causal: whether query i sees keys j ≤ i only.
      power: p of the second stage, at least 1.
      reweight: False for LSSA, without the second stage.
      positive: `"softplus"`, or the paper's ablations `"exp"`, `"sigmoid"`, `"relu"`.
      free_keys: queries that see at most so many keys weigh all of them, o = 0.
      eps: of both sums.
      rotary: rotary positions along the axes of the layout, or theta for `Rotary(theta)`.
      rotate_keys: whether `rotary` turns keys too, not queries alone.
      attention_dropout: rate on the final weights.
      rngs: streams `params`, and `dropout` if there is any.
      **projections: sizes and biases of the projections, pattern and layout: see `ProjectedMixer`.

    Raises:
      ValueError: for sizes or options that do not fit.
    """

    def __init__(
        self,
        features: int,
        *,
        causal: bool = True,
        power: float = 15,
        reweight: bool = True,
        positive: str = "softplus",
        free_keys: int = 3,
        eps: float = 1e-8,
        rotary: Rotary | float | None = None,
        rotate_keys: bool = True,
        attention_dropout: float = 0.0,
        rngs: nnx.Rngs,
        **projections: Any,
    ):
        super().__init__(features, causal=causal, **projections, rngs=rngs)
        weights = {"power": power, "reweight": reweight, "positive": positive, "free_keys": free_keys, "eps": eps}
        core = {"rotary": rotary, "rotate_keys": rotate_keys, "dropout": attention_dropout}
        self.set_core(SoftplusCore(**core, **weights, rngs=rngs))
