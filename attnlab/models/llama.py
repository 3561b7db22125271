"""LLaMA (Touvron et al., 2023, arXiv:2302.13971; Llama 2, arXiv:2307.09288; Llama 3, arXiv:2407.21783).

    x = x + attention(rms_norm(x));   x = x + (silu(rms_norm(x) W_1) · rms_norm(x) W_3) W_2;   logits = rms_norm(x) W

`LanguageModel` with rotary positions, no biases, an untied map to logits, and from Llama 2 70B on fewer key heads than
heads. Mistral 7B and Qwen2 have the same layout (Qwen2 with `qkv_bias=True`). Weights in the layout of the
`transformers` library, where pairs of rotary channels are (i, i + D/2), load by `attnlab.interop.load`; so do those in
Meta's own, where they are (2i, 2i + 1): build the model with `interleaved=True` for these. Linear maps and tokens are
drawn from a normal distribution of standard deviation 0.02.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx

from attnlab.models.block import MixerOptions
from attnlab.models.language_model import LanguageModel
from attnlab.nn.heads import redraw_kernels
from attnlab.nn.rotary import Rotary
from attnlab.registry import Cost, Kind, Paper, Source, register

SIZES: Mapping[str, Mapping[str, Any]] = {
    "llama-7b": {"features": 4096, "depth": 32, "num_heads": 32, "mlp_features": 11008},
    "llama-13b": {"features": 5120, "depth": 40, "num_heads": 40, "mlp_features": 13824},
    "llama-30b": {"features": 6656, "depth": 60, "num_heads": 52, "mlp_features": 17920},
    "llama-65b": {"features": 8192, "depth": 80, "num_heads": 64, "mlp_features": 22016},
    "llama-2-7b": {"features": 4096, "depth": 32, "num_heads": 32, "mlp_features": 11008, "norm_eps": 1e-5},
    "llama-2-13b": {"features": 5120, "depth": 40, "num_heads": 40, "mlp_features": 13824, "norm_eps": 1e-5},
    "llama-2-70b": {
        "features": 8192,
        "depth": 80,
        "num_heads": 64,
        "num_kv_heads": 8,
        "mlp_features": 28672,
        "norm_eps": 1e-5,
    },
    "llama-3-8b": {
        "vocab_size": 128256,
        "features": 4096,
        "depth": 32,
        "num_heads": 32,
        "num_kv_heads": 8,
        "mlp_features": 14336,
        "norm_eps": 1e-5,
        "rotary_base": 500000.0,
    },
}
"""Sizes of published models: `Llama(**SIZES["llama-2-7b"], rngs=rngs)`."""


@register(
    "llama",
    kind=Kind.BACKBONE,
    paper=Paper("LLaMA: Open and Efficient Foundation Language Models", "Touvron et al.", 2023, arxiv="2302.13971"),
    source=Source.PAPER_TEXT,
    cost=Cost(time="O(N²·C)", memory="O(N²·H)", state="2·L·N·G·D"),
    summary="decoder language model with rotary positions, RMSNorm and SwiGLU; takes published weights",
    small={"vocab_size": 11, "features": 16, "depth": 2, "num_heads": 2, "num_kv_heads": 1, "mlp_features": 24},
)
class Llama(LanguageModel):
    """Token ids `(B, N)` to logits `(B, N, vocab_size)`; see `LanguageModel` for calling, decoding and points.

    Args:
      vocab_size: number of token ids.
      features: channels C.
      depth: number of blocks.
      num_heads: heads H.
      num_kv_heads: key and value heads G, a divisor of H; H when None.
      head_dim: D; C / H when None.
      mlp_features: hidden channels of the feed-forward.
      norm_eps: of all norms.
      rotary_base: base of the rotary frequencies.
      interleaved: whether pairs of rotary channels are (2i, 2i + 1), not (i, i + D/2).
      qkv_bias: whether the maps to queries, keys and values have biases.
      out_bias: whether the map out of the heads has a bias.
      mlp_bias: whether the feed-forward has biases.
      tie_embeddings: whether logits use the embedding's weights.
      mixer: `"softmax_attention"`, or another registered mixer with its options: sizes of heads, rotary positions and
        biases are handed to it.
      mixer_options: further constructor options of the mixer, by its name.
      remat: recompute blocks in the backward pass.
      dtype: of the computation, float32 when None.
      param_dtype: of the parameters.
      rngs: streams `params` and `dropout`.
    """

    def __init__(
        self,
        vocab_size: int = 32000,
        *,
        features: int = 4096,
        depth: int = 32,
        num_heads: int = 32,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        mlp_features: int = 11008,
        norm_eps: float = 1e-6,
        rotary_base: float = 10000.0,
        interleaved: bool = False,
        qkv_bias: bool = False,
        out_bias: bool = False,
        mlp_bias: bool = False,
        tie_embeddings: bool = False,
        mixer: str = "softmax_attention",
        mixer_options: MixerOptions | None = None,
        remat: bool = False,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        own: dict[str, Any] = {"qkv_bias": qkv_bias, "out_bias": out_bias}
        own |= {"num_kv_heads": num_kv_heads, "head_dim": head_dim}
        own |= {"rotary": Rotary(rotary_base, interleaved=interleaved)}
        given = dict(mixer_options or {})
        super().__init__(
            vocab_size,
            features=features,
            depth=depth,
            num_heads=num_heads,
            mixer=mixer,
            mixer_options=given | {mixer: own | dict(given.get(mixer, {}))},
            mlp="swiglu",
            mlp_features=mlp_features,
            mlp_bias=mlp_bias,
            norm="rms",
            norm_eps=norm_eps,
            rotary_base=rotary_base,
            embed_scale=1.0,
            tie_embeddings=tie_embeddings,
            remat=remat,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        normal = nnx.initializers.normal(0.02)
        redraw_kernels(self, normal, rngs=rngs)
        self.embedding[...] = normal(rngs.params(), self.embedding.shape, param_dtype)
