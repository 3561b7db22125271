"""TransNormerLLM (Qin et al., 2024, arXiv:2405.17381): a language model of lightning attention throughout.

    x = x + NormLinearAttention(srms_norm(x));   x = x + (srms_norm(x) W_1 · srms_norm(x) W_2) W_3

Embeddings are tied to the logits and every norm is free of parameters. The first author's minimal port
(Doraemonzzz/nanoTransNormer) has LRPE-d in every layer but the first, and no scale of the embedding; the paper and the
published weights have it in the first alone, and scale the embedding by √C. Embeddings and linear maps are drawn from a
normal distribution of standard deviation 0.02.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx

from attnlab.attention.linear.tnl import COST, PAPER
from attnlab.models.language_model import LanguageModel
from attnlab.nn.heads import redraw_kernels
from attnlab.registry import Kind, Source, register


@register(
    "tnl.transnormer",
    kind=Kind.BACKBONE,
    paper=PAPER,
    source=Source.AUTHORS_CODE,
    repository="Doraemonzzz/nanoTransNormer",
    cost=COST,
    kernel="linear_attention",
    summary="decoder language model of TNL attention and SGLU feed-forwards, decoding in constant memory",
    small={"vocab_size": 11, "features": 16, "depth": 2, "num_heads": 2},
)
class TransNormerLLM(LanguageModel):
    """Token ids (B, N) to logits (B, N, vocab_size); see `LanguageModel` for calling, decoding and generation.

    Args:
      vocab_size: number of token ids.
      features: channels C.
      depth: number of blocks.
      num_heads: heads of each mixer.
      hidden: width of the mixers' queries, keys, values and gates; C when None.
      mlp_ratio: hidden channels of the feed-forward over C.
      use_bias: whether the linear maps of the blocks have biases.
      lrpe_layers: layers whose mixer has LRPE-d.
      embed_scale: factor of the embedding; √C when None, as in the published weights.
      dtype: of the computation, float32 when None.
      param_dtype: of the parameters.
      rngs: stream `params`.
    """

    def __init__(
        self,
        vocab_size: int,
        *,
        features: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        hidden: int | None = None,
        mlp_ratio: float = 2.0,
        use_bias: bool = False,
        lrpe_layers: Sequence[int] = (0,),
        embed_scale: float | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        super().__init__(
            vocab_size,
            features=features,
            depth=depth,
            num_heads=num_heads,
            mixer="tnl",
            mixer_options={"tnl": {"hidden": hidden, "use_bias": use_bias, "lrpe_layers": tuple(lrpe_layers)}},
            mlp="sglu",
            mlp_ratio=mlp_ratio,
            mlp_bias=use_bias,
            norm="srms",
            position="none",
            embed_scale=embed_scale,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        normal = nnx.initializers.normal(0.02)
        redraw_kernels(self, normal, rngs=rngs)
        self.embedding[...] = normal(rngs.params(), self.embedding.shape, param_dtype)
