"""Attention overridden at the last position (Merullo et al., ICLR 2024, arXiv:2310.08744).

Heads that should keep an answer from being copied do so once they attend to what must not be copied. In chosen heads,
the last token's attention is put on given tokens, in equal shares:

    A'_N,k = (1 - share) A_N,k + share · [k ∈ T] / |T|

In the paper T are the wrong options of a question, and the heads some in the middle of GPT-2 medium that inhibit. The
share, and that it is spread evenly, are our reading.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from attnlab.points import At, Intervention, Setting
from attnlab.registry import Cost, Example, Kind, Paper, Source, register


def _example() -> Example:
    from attnlab.interventions.examples import small_language_model
    from attnlab.points import attach

    tokens, model = small_language_model()
    edit = AttentionOverride(jnp.asarray([[False, True, False, True]]), share=0.8)
    return Example(attach(model, edit, heads=jnp.asarray([True, False])), (tokens,), differentiable=())


@register(
    "circuit_reuse.override",
    kind=Kind.INTERVENTION,
    paper=Paper(
        "Circuit Component Reuse Across Tasks in Transformer Language Models",
        "Merullo et al.",
        2024,
        "2310.08744",
        number=86,
    ),
    source=Source.PAPER_TEXT,
    cost=Cost("O(M)", "O(M)"),
    summary="puts the last token's attention on given tokens, in chosen heads",
    small=_example,
)
class AttentionOverride(Intervention):
    """The override, for the layers and heads where it is attached.

    Args:
      tokens: `(B|1, L)` boolean, T; where there is none, attention stays as it is.
      share: of the attention that goes to them.

    Raises:
      ValueError: for tokens of another rank or dtype.
    """

    last_row = True

    def __init__(self, tokens: ArrayLike, *, share: ArrayLike = 1.0):
        tokens = jnp.asarray(tokens)
        if tokens.ndim != 2 or tokens.dtype != jnp.bool_:
            raise ValueError(f"tokens must be boolean (B, L), got {tokens.dtype}{list(tokens.shape)}")
        self.tokens, self.share = Setting(tokens), Setting(jnp.asarray(share, jnp.float32))

    def attention(self, weights: jax.Array, at: At, memory: Any) -> tuple[jax.Array, Any]:
        chosen = at.keys(self.tokens[...])[:, None, None]
        count = chosen.sum(-1, keepdims=True)
        there = chosen / jnp.maximum(count, 1)
        moved = (1 - self.share[...]) * weights + self.share[...] * there
        return jnp.where(count > 0, moved, weights), memory
