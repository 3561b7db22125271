"""One block of DINOv2 (Oquab et al., 2023, arXiv:2304.07193) over the tokens, then their mean.

The heaviest of the probes: it mixes all tokens before it averages them, O(N²·C + N·C²) and 12·C² weights.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab.contract import Pooling, record
from attnlab.pooling.block import SelfAttentionBlock
from attnlab.pooling.parts import token_mean
from attnlab.registry import Cost, Paper, Source, register


@register(
    "efficient_probing.dinovit",
    paper=Paper(
        "DINOv2: Learning Robust Visual Features without Supervision", "Oquab et al.", 2023, arxiv="2304.07193"
    ),
    source=Source.AUTHORS_CODE,
    repository="billpsomas/efficient-probing",
    cost=Cost(time="O(N²·C + N·C²)", memory="O(N²·H)"),
    summary="a transformer block over the tokens, then their mean",
)
class DinoViTPooling(Pooling):
    """Tokens (B, N, C) to one vector (B, C). See the module docstring.

    Args:
      features: channels C of the tokens.
      num_heads: heads H.
      dtype: of the computation and the result; that of the tokens when None.
      param_dtype: of the parameters.
      rngs: stream `params`.

    Raises:
      ValueError: if the heads do not divide the channels.
    """

    def __init__(
        self,
        features: int,
        *,
        num_heads: int = 8,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.features = self.out_features = features
        self.dtype = dtype
        self.block = SelfAttentionBlock(
            features, num_heads=num_heads, use_bias=False, param_dtype=param_dtype, rngs=rngs
        )

    def pool(self, x: jax.Array, queries: jax.Array | None, mask: jax.Array | None, deterministic: bool) -> jax.Array:
        """Pools. Recorded are the weights of the block, (B, H, N, N)."""
        y, weights = self.block(x, mask=mask)
        record(self, "attention", lambda: weights)
        return token_mean(y, mask)
