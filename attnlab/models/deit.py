"""DeiT (Touvron et al., ICML 2021, arXiv:2012.12877): a plain vision transformer with a class token.

Patches of 16x16 pixels, a class token in front, a learned position table over all of them, pre-norm blocks of softmax
attention where no other mixer is chosen, a norm; the class token is classified. Distillation tokens are not part of it.

With registers (Darcet et al., 2024, arXiv:2309.16588), layer scale, or the mean of the patches in place of the class
token, it is what timm calls a vision transformer: its weights, DeiT III's and DINOv2's load into the sizes below.
"""

from collections.abc import Sequence
from typing import Any, Literal

import jax.numpy as jnp
from flax import nnx

from attnlab.attention.dense.softmax_attention import SoftmaxAttention
from attnlab.models import staged
from attnlab.models.staged import BehindPrefix, Choice, Mixers, Models, Prefix, Stage, StagedBackbone
from attnlab.nn.conv import PatchEmbed
from attnlab.nn.heads import redraw_kernels
from attnlab.nn.linear import trunc_normal
from attnlab.nn.norms import LayerNorm
from attnlab.nn.positions import PositionTable
from attnlab.registry import Cost, Kind, Paper, Source, register


@register(
    "deit",
    kind=Kind.BACKBONE,
    paper=Paper(
        "Training data-efficient image transformers & distillation through attention",
        "Touvron et al.",
        2021,
        arxiv="2012.12877",
    ),
    source=Source.THIRD_PARTY,
    repository="huggingface/pytorch-image-models",
    cost=Cost(time="O(N²·C)", memory="O(N²·H)"),
    summary="a plain vision transformer: class token, registers or the mean of the patches; takes timm's weights",
    small={"features": 8, "num_heads": 2, "depth": 1, "registers": 2, "mlp_ratio": 1.0, "image_size": 32}
    | {"patch_size": 8, "layer_scale": 1.0, "num_classes": 5},
)
class DeiT(StagedBackbone):
    """Images `(B, H, W, channels)` to logits `(B, num_classes)` in float32; the defaults are DeiT-Ti.

    Args:
      features: channels C.
      num_heads: heads.
      depth: blocks.
      mixers: what takes the place of softmax attention.
      replaced: in how many of the first blocks; in all when None.
      qkv_bias: whether queries, keys and values have a bias.
      mlp_ratio: hidden channels over channels.
      image_size: pixels on a side, or (rows, columns).
      patch_size: pixels on a side of a patch.
      channels: of the images.
      num_classes: classes; without any the class token is the result.
      norm_eps: of all norms.
      class_token: whether a class token stands in front of the patches.
      registers: further learned tokens in front of the patches, which nothing reads.
      placed: whether the class token has a row in the table of positions.
      layer_scale: factors of the channels of both branches at the start; None for no factors.
      pooling: what is classified: `"cls"`, the class token, or `"mean"`, the mean of the patches, normed behind it.
      attention_dropout: rate on attention weights, in mixers that have them.
      dropout: rate after the positions, inside feed-forwards and on what mixers return.
      drop_path: stochastic depth rate of the last block; it rises linearly from 0.
      dtype: of the computation; that of the images when None.
      param_dtype: of the parameters.
      rngs: streams `params`, and `dropout` if there is any.

    Raises:
      ValueError: if the patches do not tile the image, for another pooling, or to pool a class token that is not there.
      UnsupportedArgument: for a mixer that takes neither sequences nor images behind a class token.
    """

    def __init__(
        self,
        features: int = 192,
        *,
        num_heads: int = 3,
        depth: int = 12,
        mixers: Mixers = None,
        replaced: int | None = None,
        qkv_bias: bool = True,
        mlp_ratio: float = 4.0,
        image_size: int | Sequence[int] = 224,
        patch_size: int | Sequence[int] = 16,
        channels: int = 3,
        num_classes: int | None = 1000,
        norm_eps: float = 1e-6,
        class_token: bool = True,
        registers: int = 0,
        placed: bool = True,
        layer_scale: float | None = None,
        pooling: Literal["cls", "mean"] = "cls",
        attention_dropout: float = 0.0,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if pooling not in ("cls", "mean") or (pooling == "cls" and not class_token):
            raise ValueError(f"pooling must be 'mean', or with a class token 'cls', got {pooling!r}")
        if registers < 0:
            raise ValueError(f"registers must be at least 0, got {registers}")
        common = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        front, rows = class_token + registers, int(class_token and placed)
        shared = {"qkv_bias": qkv_bias, "attention_dropout": attention_dropout, "projection_dropout": dropout}
        block = {"mlp_ratio": mlp_ratio, "norm_eps": norm_eps, "dropout": dropout, "shared": shared}
        block |= {"layer_scale": layer_scale, **common}
        (grid,) = staged.halved_grids(image_size, patch_size, 1)
        (places,) = staged.places(
            [features],
            [grid],
            num_heads=[num_heads],
            depths=[depth],
            own=[Choice(SoftmaxAttention)],
            mixers=mixers,
            replaced=[replaced],
            drop_path=drop_path,
            prefix=front,
        )
        table = {"param_dtype": param_dtype, "rngs": rngs}
        stage = Stage(
            [staged.transformer_block(place, **block) for place in places],
            prefix=Prefix(int(class_token), features, registers=registers, **table) if front else None,
            position=PositionTable(grid, features, prefix=rows, unplaced=front - rows, **table),
            dropout=staged.dropout_or_none(dropout, rngs),
        )
        super().__init__(
            PatchEmbed(channels, features, staged.pair(patch_size), **common),
            [stage],
            norm=LayerNorm(features, eps=norm_eps, **table),
            norm_first=pooling == "cls",
            pool=BehindPrefix(front) if pooling == "mean" and front else None,
            head=staged.classifier(features, num_classes, **common),
            image_size=staged.pair(image_size),
            channels=channels,
            dtype=dtype,
        )
        redraw_kernels(self, trunc_normal, rngs=rngs)


_SMALL = {"features": 384, "num_heads": 6}
_BASE = {"features": 768, "num_heads": 12}
_LARGE = {"features": 1024, "num_heads": 16, "depth": 24}
_DEIT3: dict[str, Any] = {"placed": False, "layer_scale": 1e-6}
_GAP: dict[str, Any] = {"class_token": False, "registers": 4, "pooling": "mean", "image_size": 256}
_DINO: dict[str, Any] = {"placed": False, "registers": 4, "layer_scale": 1e-5, "patch_size": 14, "image_size": 518}
DEITS: Models = {
    "deit_tiny": (DeiT, {}),
    "deit_small": (DeiT, _SMALL),
    "deit_base": (DeiT, _BASE),
    "deit3_small": (DeiT, _SMALL | _DEIT3),
    "deit3_base": (DeiT, _BASE | _DEIT3),
    "deit3_large": (DeiT, _LARGE | _DEIT3),
    "vit_tiny_patch16_224": (DeiT, {}),
    "vit_small_patch16_224": (DeiT, _SMALL),
    "vit_base_patch16_224": (DeiT, _BASE),
    "vit_large_patch16_224": (DeiT, _LARGE),
    "vit_medium_patch16_reg4_gap_256": (DeiT, {"features": 512, "num_heads": 8, "layer_scale": 1e-5} | _GAP),
    "vit_base_patch16_reg4_gap_256": (DeiT, _BASE | _GAP),
    "vit_small_patch14_reg4_dinov2": (DeiT, _SMALL | _DINO),
    "vit_base_patch14_reg4_dinov2": (DeiT, _BASE | _DINO),
    "vit_large_patch14_reg4_dinov2": (DeiT, _LARGE | _DINO),
}
"""For `staged.build_named`: tiny, small, base have 5.7, 22.1, 86.6 M parameters (DeiT: 72.2, 79.9, 81.8 %)."""
