"""The small transformer of Guo et al. (2024, arXiv:2410.13835), in which attention sinks arise on bigram-backcopy.

    x = E[t] + P[n];   logits = layer_norm(x) W
    in each block    x = x + attention(layer_norm(x));   x = x + relu(layer_norm(x) W_1) W_2

`LanguageModel` without biases but for the norms', with an untied map to logits, attention by softmax or by ReLU, and
single pieces left out in chosen layers. Tokens and positions are drawn from a normal distribution of deviation 1.

Reference: GuoTianYu2000/Active-Dormant-Attention, `Transformer`.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx

from attnlab.attention.dense.relu_attention import PAPER
from attnlab.models.language_model import LanguageModel
from attnlab.registry import Cost, Kind, Source, register


@register(
    "active_dormant.transformer",
    kind=Kind.BACKBONE,
    paper=PAPER,
    source=Source.AUTHORS_CODE,
    repository="GuoTianYu2000/Active-Dormant-Attention",
    cost=Cost(time="O(N²·C)", memory="O(N²·H)", state="2·L·N·C"),
    summary="language model of one to three layers with softmax or ReLU attention, and pieces left out",
    small={"vocab_size": 11, "features": 12, "depth": 2, "num_heads": 2, "max_length": 16, "relu": True},
)
class BackcopyTransformer(LanguageModel):
    """Token ids `(B, N)` to logits `(B, N, vocab_size)`; see `LanguageModel` for calling, decoding and points.

    Args:
      vocab_size: number of token ids.
      features: channels C.
      depth: number of blocks.
      num_heads: heads of each mixer.
      max_length: longest sequence, rows of the position table.
      relu: whether attention is by ReLU over the number of keys in place of softmax.
      no_attention: layers without attention.
      no_mlp: layers without feed-forward.
      no_attention_norm: layers without the norm in front of attention.
      no_mlp_norm: layers without the norm in front of the feed-forward.
      linear_mlp: layers whose feed-forward has no activation.
      dtype: of the computation, float32 when None.
      param_dtype: of the parameters.
      rngs: stream `params`.

    Raises:
      ValueError: for layers that do not exist.
    """

    def __init__(
        self,
        vocab_size: int = 67,
        *,
        features: int = 256,
        depth: int = 1,
        num_heads: int = 1,
        max_length: int = 256,
        relu: bool = False,
        no_attention: Sequence[int] = (),
        no_mlp: Sequence[int] = (),
        no_attention_norm: Sequence[int] = (),
        no_mlp_norm: Sequence[int] = (),
        linear_mlp: Sequence[int] = (),
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if unknown := [layer for layer in linear_mlp if not 0 <= layer < depth]:
            raise ValueError(f"linear_mlp must give layers below {depth}, got {unknown}")
        mixer = "active_dormant" if relu else "softmax_attention"
        super().__init__(
            vocab_size,
            features=features,
            depth=depth,
            num_heads=num_heads,
            mixer=mixer,
            mixer_options={mixer: {"qkv_bias": False, "out_bias": False}},
            mlp=tuple("linear" if layer in linear_mlp else "relu" for layer in range(depth)),
            mlp_ratio=4.0,
            mlp_bias=False,
            norm="layer",
            norm_eps=1e-5,
            without={"mixer": no_attention, "mlp": no_mlp, "norm1": no_attention_norm, "norm2": no_mlp_norm},
            position="learned",
            max_length=max_length,
            embed_scale=1.0,
            tie_embeddings=False,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        normal = nnx.initializers.normal(1.0)
        for table in (self.embedding, self.position):
            table[...] = normal(rngs.params(), table.shape, param_dtype)
