"""GPT-2 (Radford et al., 2019): `LanguageModel` as OpenAI published it.

    x = E[t] + P[n];   logits = layer_norm(x) Eᵀ
    in each block    x = x + attention(layer_norm(x));   x = x + gelu(layer_norm(x) W_1) W_2

with learned positions, biases in all maps, the tanh form of GELU, and logits tied to the embedding. Weights in the
layout of the `transformers` library load by `attnlab.interop.load(model, "model.safetensors")`. Linear maps and tokens
are drawn from a normal distribution of standard deviation 0.02, positions of 0.01, biases are 0, and the last map of
each branch is drawn smaller by √(2 L), as the report says.
"""

from collections.abc import Mapping
from typing import Any, Literal

import jax.numpy as jnp
from flax import nnx

from attnlab.models.block import MixerNames, MixerOptions
from attnlab.models.language_model import LanguageModel
from attnlab.nn.heads import redraw_kernels
from attnlab.registry import Cost, Kind, Paper, Source, register

SIZES: Mapping[str, Mapping[str, int]] = {
    "gpt2": {"features": 768, "depth": 12, "num_heads": 12},
    "gpt2-medium": {"features": 1024, "depth": 24, "num_heads": 16},
    "gpt2-large": {"features": 1280, "depth": 36, "num_heads": 20},
    "gpt2-xl": {"features": 1600, "depth": 48, "num_heads": 25},
}
"""Sizes of the published models: `GPT2(**SIZES["gpt2-medium"], rngs=rngs)`."""


@register(
    "gpt2",
    kind=Kind.BACKBONE,
    paper=Paper("Language Models are Unsupervised Multitask Learners", "Radford et al.", 2019),
    source=Source.PAPER_TEXT,
    cost=Cost(time="O(N²·C)", memory="O(N²·H)", state="2·L·N·C"),
    summary="decoder language model with learned positions, LayerNorm and GELU; takes published weights",
    small={"vocab_size": 11, "features": 16, "depth": 2, "num_heads": 2, "max_length": 16},
)
class GPT2(LanguageModel):
    """Token ids `(B, N)` to logits `(B, N, vocab_size)`; see `LanguageModel` for calling, decoding and points.

    Args:
      vocab_size: number of token ids.
      features: channels C.
      depth: number of blocks.
      num_heads: heads of each mixer.
      max_length: longest sequence, rows of the position table.
      mlp_features: hidden channels of the feed-forward; 4 C when None.
      activation: `"gelu_tanh"`, or `"gelu"` or `"relu"`.
      norm_eps: of all norms.
      mixer: name of a registered causal mixer, or a pattern of names.
      mixer_options: constructor options by mixer name.
      dropout: rate after the embedding and inside the feed-forward.
      remat: recompute blocks in the backward pass.
      dtype: of the computation, float32 when None.
      param_dtype: of the parameters.
      rngs: streams `params` and `dropout`.

    Raises:
      ValueError: for another activation.
    """

    def __init__(
        self,
        vocab_size: int = 50257,
        *,
        features: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        max_length: int = 1024,
        mlp_features: int | None = None,
        activation: Literal["gelu_tanh", "gelu", "relu"] = "gelu_tanh",
        norm_eps: float = 1e-5,
        mixer: MixerNames = "softmax_attention",
        mixer_options: MixerOptions | None = None,
        dropout: float = 0.0,
        remat: bool = False,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if activation not in ("gelu_tanh", "gelu", "relu"):
            raise ValueError(f"activation must be gelu_tanh, gelu or relu, got {activation!r}")
        super().__init__(
            vocab_size,
            features=features,
            depth=depth,
            num_heads=num_heads,
            mixer=mixer,
            mixer_options=mixer_options,
            mlp=activation,
            mlp_features=4 * features if mlp_features is None else mlp_features,
            norm="layer",
            norm_eps=norm_eps,
            position="learned",
            max_length=max_length,
            embed_scale=1.0,
            dropout=dropout,
            remat=remat,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        normal = nnx.initializers.normal(0.02)
        redraw_kernels(self, normal, rngs=rngs)
        for block in self.blocks.blocks:
            for last in (getattr(block.mixer, "out", None), block.mlp.fc2):
                if last is not None:
                    last.kernel[...] = last.kernel[...] / (2 * depth) ** 0.5
        self.embedding[...] = normal(rngs.params(), self.embedding.shape, param_dtype)
        self.position[...] = nnx.initializers.normal(0.01)(rngs.params(), self.position.shape, param_dtype)
