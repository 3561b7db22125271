"""Talking heads (Shazeer et al., 2020, arXiv:2003.02436): heads exchange their scores, and their weights.

    s'_g = Σ_h L_gh s_h + l_g,   p = softmax(s'),   p'_g = Σ_h W_gh p_h + w_g,   y_g = p'_g V_g

with scores s = D^-1/2 Q Kᵀ of H heads. A key that is hidden has no weight behind the second map either.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab.contract import View
from attnlab.nn.linear import Linear
from attnlab.nn.masking import masked_softmax, visible_keys
from attnlab.nn.softmax import attention_scores
from attnlab.nn.softmax_core import ProductCore
from attnlab.points import Edits


class TalkingHeads(ProductCore):
    """The core of attention whose heads talk.

    Args:
      num_heads: heads H.
      scale: of the scores; D^-1/2 when None.
      param_dtype: of both maps.
      rngs: stream `params`, and `dropout` if there is any.
      **options: those of `ProductCore`.
    """

    def __init__(
        self,
        num_heads: int,
        *,
        scale: float | None = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        super().__init__(**options, rngs=rngs)
        self.scale = scale
        maps = {"axes": (None, None), "param_dtype": param_dtype, "rngs": rngs}
        self.before, self.behind = Linear(num_heads, num_heads, **maps), Linear(num_heads, num_heads, **maps)

    def weights(
        self, q: jax.Array, k: jax.Array, view: View, *, edits: Edits | None = None, owner: nnx.Module | None = None
    ) -> jax.Array:
        scores = _among_heads(self.before, attention_scores(q, k, scale=self.scale))
        scores = self.edited(edits, owner, "scores", scores, view=view, q=q, k=k)
        seen = visible_keys(view)
        weights = _among_heads(self.behind, masked_softmax(scores, seen))
        return weights if seen is None else jnp.where(seen, weights, 0)


def _among_heads(linear: Linear, x: jax.Array) -> jax.Array:
    """A map of the heads of `(B, H, N, M)`."""
    return jnp.moveaxis(linear(jnp.moveaxis(x, 1, -1)), -1, 1)
