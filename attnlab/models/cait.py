"""CaiT (Touvron et al., ICCV 2021, arXiv:2103.17239): patches first among themselves, then a class token reads them.

    x = x + γ₁ attention(LN(x));   x = x + γ₂ MLP(LN(x))          a block, whose heads talk (`attnlab.nn.talking_heads`)
    c = c + γ₁ attention(LN(c); LN([c; x]));   c = c + γ₂ MLP(LN(c))           twice, behind all blocks
    logits = W LN(c)

No block of patches sees the class token. Reference for names and defaults: timm's port of facebookresearch/deit.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx

from attnlab.contract import Site
from attnlab.models import staged
from attnlab.models.staged import Mixers, Models, Stage, StagedBackbone
from attnlab.nn.conv import PatchEmbed
from attnlab.nn.positions import PositionTable
from attnlab.nn.projected_mixer import ProjectedMixer
from attnlab.nn.talking_heads import TalkingHeads
from attnlab.pooling.cait import CaiTPooling
from attnlab.registry import Cost, Kind, Paper, Source, register


def talking_heads(site: Site, index: int = 0, *, rngs: nnx.Rngs, **shared: Any) -> nnx.Module:
    """The mixer of a block."""
    rate, stored = shared.pop("attention_dropout", 0.0), shared.get("param_dtype", jnp.float32)
    mixer = ProjectedMixer(site.features, num_heads=site.num_heads, rngs=rngs, **shared)
    mixer.set_core(TalkingHeads(site.num_heads, dropout=rate, param_dtype=stored, rngs=rngs))
    return mixer


@register(
    "cait",
    kind=Kind.BACKBONE,
    paper=Paper("Going deeper with Image Transformers", "Touvron et al.", 2021, arxiv="2103.17239"),
    source=Source.THIRD_PARTY,
    repository="huggingface/pytorch-image-models",
    cost=Cost(time="O(N²·C)", memory="O(N²·H)"),
    summary="a vision transformer whose heads talk, and whose class token only reads the last layer's patches",
    small={"features": 8, "num_heads": 2, "depth": 1, "class_depth": 1, "mlp_ratio": 1.0, "image_size": 32}
    | {"patch_size": 8, "layer_scale": 1.0, "num_classes": 5},
)
class CaiT(StagedBackbone):
    """Images `(B, H, W, channels)` to logits `(B, num_classes)` in float32; the defaults are CaiT-XXS-24.

    Args:
      features: channels C.
      num_heads: heads.
      depth: blocks of patches.
      class_depth: blocks of the class token.
      mixers: what takes the place of attention among the patches.
      replaced: in how many of the first blocks; in all when None.
      qkv_bias: whether queries, keys and values have a bias.
      mlp_ratio: hidden channels over channels.
      layer_scale: γ at the start.
      norm_eps: of all norms.
      image_size: pixels on a side, or (rows, columns).
      patch_size: pixels on a side of a patch.
      channels: of the images.
      num_classes: classes; without any the class token is the result.
      attention_dropout: rate on attention weights.
      dropout: rate after the positions, inside feed-forwards and on what mixers return.
      drop_path: stochastic depth rate of all blocks, the same for each as the authors have it.
      dtype: of the computation; that of the images when None.
      param_dtype: of the parameters.
      rngs: streams `params`, and `dropout` if there is any.

    Raises:
      ValueError: if the patches do not tile the image.
    """

    def __init__(
        self,
        features: int = 192,
        *,
        num_heads: int = 4,
        depth: int = 24,
        class_depth: int = 2,
        mixers: Mixers = None,
        replaced: int | None = None,
        qkv_bias: bool = True,
        mlp_ratio: float = 4.0,
        layer_scale: float = 1e-5,
        norm_eps: float = 1e-6,
        image_size: int | Sequence[int] = 224,
        patch_size: int | Sequence[int] = 16,
        channels: int = 3,
        num_classes: int | None = 1000,
        attention_dropout: float = 0.0,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        stored = {"param_dtype": param_dtype, "rngs": rngs}
        common = {"dtype": dtype, **stored}
        (grid,) = staged.halved_grids(image_size, patch_size, 1)
        (places,) = staged.places(
            [features],
            [grid],
            num_heads=[num_heads],
            depths=[depth],
            own=[talking_heads],
            mixers=mixers,
            replaced=[replaced],
        )
        places = [dataclasses.replace(place, drop_path=drop_path) for place in places]
        shared = {"qkv_bias": qkv_bias, "attention_dropout": attention_dropout}
        block = {"mlp_ratio": mlp_ratio, "norm_eps": norm_eps, "dropout": dropout, "layer_scale": layer_scale}
        stage = Stage(
            [staged.transformer_block(place, shared=shared, **block, **common) for place in places],
            position=PositionTable(grid, features, **stored),
            dropout=staged.dropout_or_none(dropout, rngs),
        )
        super().__init__(
            PatchEmbed(channels, features, staged.pair(patch_size), **common),
            [stage],
            pool=CaiTPooling(
                features,
                num_heads=num_heads,
                iterations=class_depth,
                mlp_ratio=mlp_ratio,
                use_bias=qkv_bias,
                init_scale=layer_scale,
                norm_eps=norm_eps,
                **common,
            ),
            head=staged.classifier(features, num_classes, **common),
            image_size=staged.pair(image_size),
            channels=channels,
            dtype=dtype,
        )


_XXS, _XS = {}, {"features": 288, "num_heads": 6}
_S, _M = {"features": 384, "num_heads": 8}, {"features": 768, "num_heads": 16}
CAITS: Models = {
    "cait_xxs24_224": (CaiT, _XXS),
    "cait_xxs24_384": (CaiT, _XXS | {"image_size": 384}),
    "cait_xxs36_224": (CaiT, _XXS | {"depth": 36}),
    "cait_xxs36_384": (CaiT, _XXS | {"depth": 36, "image_size": 384}),
    "cait_xs24_384": (CaiT, _XS | {"image_size": 384}),
    "cait_s24_224": (CaiT, _S),
    "cait_s24_384": (CaiT, _S | {"image_size": 384}),
    "cait_s36_384": (CaiT, _S | {"depth": 36, "layer_scale": 1e-6, "image_size": 384}),
    "cait_m36_384": (CaiT, _M | {"depth": 36, "layer_scale": 1e-6, "image_size": 384}),
    "cait_m48_448": (CaiT, _M | {"depth": 48, "layer_scale": 1e-6, "image_size": 448}),
}
"""For `staged.build_named`: XXS, XS, S and M of 24 and 36 layers, 12.0 to 356 M parameters."""
