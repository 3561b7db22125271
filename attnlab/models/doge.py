"""Doge (Shi et al., 2025, arXiv:2508.02124; as in transformers): a language model with dynamic mask attention.

    x = a ∘ x + attention(rms_norm(x));   x = b ∘ x + (silu(rms_norm(x) W_1) · rms_norm(x) W_3) W_2
    logits = rms_norm(x) W

a and b are vectors of a layer, 1 before training. Linear maps and tokens are drawn from a normal distribution of
standard deviation 0.02. The authors' mixture of experts in place of the feed-forward (`is_moe`) is not part of this.
"""

from typing import Any

import jax.numpy as jnp
from flax import nnx

from attnlab.attention.sparse.dynamic_mask_attention import DynamicMaskAttention, MaskType, Variant
from attnlab.models.block import Block
from attnlab.models.language_model import LanguageModel
from attnlab.nn.heads import redraw_kernels
from attnlab.nn.mlp import GatedMLP, LayerScale
from attnlab.nn.norms import RMSNorm
from attnlab.registry import Cost, Kind, Paper, Source, register


class DogeLayer(Block):
    """One layer: tokens `(B, N, C)` to the same shape; see `Block` for calling and decoding.

    Args:
      features: channels C.
      num_heads: query heads H.
      mlp_features: hidden channels of the feed-forward.
      mlp_bias: whether the feed-forward has biases.
      norm_eps: of all norms.
      dtype: of the computation; that of the tokens when None.
      param_dtype: of the parameters.
      rngs: streams `params`, and `dropout` if there is any.
      **attention: further options of `DynamicMaskAttention`.
    """

    hands_options_on = True

    def __init__(
        self,
        features: int,
        *,
        num_heads: int,
        mlp_features: int,
        mlp_bias: bool = False,
        norm_eps: float = 1e-6,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
        **attention: Any,
    ):
        stored: dict[str, Any] = {"param_dtype": param_dtype, "rngs": rngs}
        common: dict[str, Any] = {"dtype": dtype, **stored}
        super().__init__(
            DynamicMaskAttention(features, num_heads=num_heads, norm_eps=norm_eps, **attention, **common),
            GatedMLP(features, mlp_features, use_bias=mlp_bias, **common),
            RMSNorm(features, eps=norm_eps, **stored),
            RMSNorm(features, eps=norm_eps, **stored),
            scale1=LayerScale(features, init=1.0, **stored),
            scale2=LayerScale(features, init=1.0, **stored),
            scaled="skip",
        )


@register(
    "dynamic_mask_attention.doge",
    kind=Kind.BACKBONE,
    paper=Paper("Trainable Dynamic Mask Sparse Attention", "Shi et al.", 2025, arxiv="2508.02124", number=50),
    source=Source.AUTHORS_CODE,
    repository="huggingface/transformers",
    cost=Cost(time="O(N·(w + C)·C)", memory="O(N·C)", state="2·L·N·G·D"),
    kernel="block_sparse_attention",
    summary="decoder language model with dynamic mask attention, and a learned vector on each skip connection",
    small={
        "vocab_size": 11,
        "features": 16,
        "depth": 1,
        "num_heads": 2,
        "num_kv_heads": 1,
        "mlp_features": 24,
        "window": 3,
    },
)
class Doge(LanguageModel):
    """Token ids `(B, N)` to logits `(B, N, vocab_size)`; see `LanguageModel` for calling, decoding and points.

    Args:
      vocab_size: number of token ids.
      features: channels C.
      depth: number of layers.
      num_heads: heads H.
      num_kv_heads: key and value heads G, a divisor of H; H when None.
      head_dim: D; C / H when None.
      mlp_features: hidden channels of the feed-forward.
      window: keys that a query keeps.
      variant: how important keys are, "exp" or "linear".
      mask_type: "topk" or "relu".
      norm_eps: of all norms.
      rotary_base: base of the rotary frequencies.
      attention_bias: whether the maps of attention have biases.
      mlp_bias: whether the feed-forward has biases.
      tie_embeddings: whether logits use the embedding's weights.
      remat: recompute layers in the backward pass.
      dtype: of the computation, float32 when None.
      param_dtype: of the parameters.
      rngs: streams `params` and `dropout`.

    Raises:
      ValueError: for options out of range, or sizes that do not fit.
    """

    def __init__(
        self,
        vocab_size: int = 32768,
        *,
        features: int = 1024,
        depth: int = 32,
        num_heads: int = 8,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        mlp_features: int = 2048,
        window: int = 2048,
        variant: Variant = "exp",
        mask_type: MaskType = "topk",
        norm_eps: float = 1e-6,
        rotary_base: float = 10000.0,
        attention_bias: bool = False,
        mlp_bias: bool = False,
        tie_embeddings: bool = False,
        remat: bool = False,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        mixer: dict[str, Any] = {"num_kv_heads": num_kv_heads, "head_dim": head_dim, "use_bias": attention_bias}
        mixer |= {"window": window, "variant": variant, "mask_type": mask_type, "norm_eps": norm_eps}
        super().__init__(
            vocab_size,
            features=features,
            depth=depth,
            num_heads=num_heads,
            mixer="dynamic_mask_attention",
            mixer_options={"dynamic_mask_attention": mixer},
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
        for block in self.blocks.blocks:
            block.scaled = "skip"
            block.scale1, block.scale2 = (
                LayerScale(features, init=1.0, param_dtype=param_dtype, rngs=rngs) for _ in range(2)
            )
        normal = nnx.initializers.normal(0.02)
        redraw_kernels(self, normal, rngs=rngs)
        self.embedding[...] = normal(rngs.params(), self.embedding.shape, param_dtype)
