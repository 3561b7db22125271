"""ReLU attention, divided by the number of visible keys (Guo et al., 2024, arXiv:2410.13835).

    A_ij = relu(q_i·k_j / √D) / n_i        n_i the number of keys that query i sees; i + 1 in causal self-attention
    y_i = Σ_j A_ij v_j

Rows do not sum to 1, so that a head with nothing to do need not attend to a sink: with it in place of softmax,
attention sinks and their drained values do not arise in small models. Cost O(N·M·(D+E)) per head.

Reference: GuoTianYu2000/Active-Dormant-Attention, `Attention`. That n_i counts visible keys, and with it masks, packed
segments, cross-attention and the non-causal form, is our extension of its i + 1.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from attnlab.contract import View
from attnlab.nn.masking import full_mask, visible_count, visible_keys
from attnlab.nn.projected_mixer import ProjectedMixer
from attnlab.nn.rotary import Rotary
from attnlab.nn.softmax import attention_scores, weighted_values
from attnlab.nn.softmax_core import ProductCore
from attnlab.points import Edits
from attnlab.registry import Cost, Paper, Source, register

PAPER = Paper(
    "Active-Dormant Attention Heads: Mechanistically Demystifying Extreme-Token Phenomena in LLMs",
    "Guo et al.",
    2024,
    "2410.13835",
    number=112,
)


def relu_weights(scores: jax.Array, visible: jax.Array | None = None) -> jax.Array:
    """Weights of scores `(B, H, N, M)`, float32; a row that sees nothing gives zeros.

    Args:
      scores: already scaled.
      visible: boolean, broadcastable to the scores; None if all is seen.
    """
    weights = jax.nn.relu(scores)
    weights = weights if visible is None else jnp.where(visible, weights, 0)
    return weights / jnp.maximum(visible_count(visible, scores.shape[-1]), 1)


def relu_attention(
    q: ArrayLike, k: ArrayLike, v: ArrayLike, *, mask: ArrayLike | None = None, causal: bool = True
) -> tuple[jax.Array, jax.Array]:
    """Attention by ReLU weights.

    Args:
      q: queries, (B, N, H, D).
      k: keys, (B, M, G, D), G a divisor of H.
      v: values, (B, M, G, E).
      mask: boolean, True where attention is allowed: (B, M), or broadcastable to (B, H, N, M).
      causal: query i sees keys j ≤ i, both counted from the start.

    Returns:
      (B, N, H, E) in the dtype of `v`, and the weights (B, H, N, M) in float32.
    """
    q, k, v = jnp.asarray(q), jnp.asarray(k), jnp.asarray(v)
    visible = None if mask is None else full_mask(mask)
    if causal:
        order = jnp.tri(q.shape[1], k.shape[1], dtype=bool)
        visible = order if visible is None else order & visible
    weights = relu_weights(attention_scores(q, k), visible)
    return weighted_values(weights, v), weights


class ReluCore(ProductCore):
    """ReLU weights; arguments as `ProductCore`."""

    def weights(
        self, q: jax.Array, k: jax.Array, view: View, *, edits: Edits | None = None, owner: nnx.Module | None = None
    ) -> jax.Array:
        scores = self.edited(edits, owner, "scores", attention_scores(q, k), view=view, q=q, k=k)
        return relu_weights(scores, visible_keys(view))


@register(
    "active_dormant",
    paper=PAPER,
    source=Source.AUTHORS_CODE,
    repository="GuoTianYu2000/Active-Dormant-Attention",
    cost=Cost(time="O(N·M·H·(D+E))", memory="O(N·M·H)", state="M·G·(D+E)"),
    summary="relu of scaled products over the number of visible keys: no sink is needed, rows do not sum to 1",
    # With two heads, a token at the start may have no positive score at all.
    small={"num_heads": 8, "head_dim": 4},
)
class ReluAttention(ProjectedMixer):
    """Tokens of any layout to the same shape. See the module docstring for the equations.

    Args:
      features: channels C.
      causal: whether query i sees keys j ≤ i only.
      rotary: rotary positions along the axes of the layout, or theta for `Rotary(theta)`.
      rotate_keys: whether `rotary` turns keys too, not queries alone.
      attention_dropout: rate on the weights.
      rngs: streams `params`, and `dropout` if there is any.
      **projections: sizes and biases of the projections, pattern and layout: see `ProjectedMixer`.

    Raises:
      ValueError: for sizes that do not fit.
    """

    def __init__(
        self,
        features: int,
        *,
        causal: bool = True,
        rotary: Rotary | float | None = None,
        rotate_keys: bool = True,
        attention_dropout: float = 0.0,
        rngs: nnx.Rngs,
        **projections: Any,
    ):
        super().__init__(features, causal=causal, **projections, rngs=rngs)
        self.set_core(ReluCore(rotary=rotary, rotate_keys=rotate_keys, dropout=attention_dropout, rngs=rngs))
