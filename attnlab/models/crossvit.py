"""CrossViT (Chen et al., 2021, arXiv:2103.14899): two streams of patches of two sizes, joined by their class tokens.

In each multi-scale block every branch b of width D_b has blocks of its own; then its class token visits the patches of
the next branch and comes back in the place of the old one, which is not added (reference: timm's port of IBM/CrossViT):

    o_b = blocks_b(x_b);    c_b = W GELU(LN(o_b[cls]))                                 D_b to D_{b+1}
    z = [c_b; patches of o_{b+1}];    z = z_0 + CrossAttention(LN(z))                  the class token alone asks
    x_b = [W' GELU(LN(z)); patches of o_b]                                             D_{b+1} to D_b

All branches read the same o. Logits are the mean of those of all branches. A branch has the image at a scale of its
own, resized by bicubic interpolation. Behind the first, further fusions have nothing but the class token to attend to,
as in the authors' code.

With it a dual-stream model trained on turned and perturbed images predicts responses of the visual area V4 (Berrios and
Deza, 2022): `attnlab.objectives.fast_adversarial` is that recipe, and
`experiments/shapes_adversarial.py` a small run of it.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from attnlab.attention.cross.class_fusion import ClassFusion, NormedMap
from attnlab.attention.dense.softmax_attention import SoftmaxAttention
from attnlab.contract import Layout, Site
from attnlab.models.blocks import Blocks
from attnlab.models.inputs import Images
from attnlab.models.staged import (
    Builder,
    Choice,
    Models,
    Place,
    Prefix,
    classifier,
    dropout_or_none,
    pair,
    per_stage,
    transformer_block,
)
from attnlab.nn.activations import relu
from attnlab.nn.chain import Chain, call
from attnlab.nn.conv import ConvNorm, PatchEmbed
from attnlab.nn.heads import redraw_kernels
from attnlab.nn.linear import trunc_normal
from attnlab.nn.norms import LayerNorm
from attnlab.nn.positions import PositionTable
from attnlab.nn.resampling import resize_bicubic
from attnlab.points import Editable, Edits, visit
from attnlab.registry import Cost, Example, Kind, Paper, Source, register

PAPER = Paper(
    "Joint rotational invariance and adversarial training of a dual-stream Transformer yields state of the art "
    "Brain-Score for Area V4",
    "Berrios & Deza",
    2022,
    arxiv="2203.06649",
    number=98,
)
_SOURCE = {"paper": PAPER, "source": Source.THIRD_PARTY, "repository": "huggingface/pytorch-image-models"}
_COST = Cost(time="O(Σ_b N_b²·D_b), the fusion O(N_b·D_b)", memory="O(Σ_b N_b²·H)")


def _example() -> Example:
    block = MultiScaleBlock((8, 8), num_heads=(2, 2), depths=(1, 0), mlp_ratios=(1.0, 1.0), rngs=nnx.Rngs(0))
    branches = [jax.random.normal(key, (2, 5, 8)) for key in jax.random.split(jax.random.key(0), 2)]
    return Example(block, (branches,))


@register(
    "crossvit_dual_stream",
    kind=Kind.MODULE,
    cost=_COST,
    summary="branches of a width each, whose class tokens read the patches of the next branch and return",
    small=_example,
    **_SOURCE,
)
class MultiScaleBlock(nnx.Module):
    """A list of branches' tokens `(B, 1 + N_b, D_b)`, class tokens in front, to the same; see the module docstring.

    Args:
      features: channels D_b of each branch.
      num_heads: of each branch.
      depths: own blocks of each branch.
      fusion_depth: fusions one after another; one where it is 0, too.
      mlp_ratios: hidden channels of the feed-forwards of each branch over D_b, rounded down.
      mixers: builds the mixer of each branch's blocks, `staged.Choice`, or a registered name; softmax attention when
        None.
      grids: rows and columns of each branch's patches, for mixers that need them.
      qkv_bias: whether queries, keys and values have a bias.
      norm_eps: of all norms.
      attention_dropout: rate on attention weights.
      dropout: rate inside the feed-forwards and on what mixers return.
      drop_path: stochastic depth rate of the blocks at each depth and, last, of the fusions; one number for all.
      layer: number of the first block, for mixers that depend on it.
      num_layers: of the model.
      dtype: of the computation; that of the tokens when None.
      param_dtype: of the parameters.
      rngs: streams `params`, and `dropout` if there is any.

    Raises:
      ValueError: for lists that have not one entry for each branch.
    """

    def __init__(
        self,
        features: Sequence[int],
        *,
        num_heads: Sequence[int],
        depths: Sequence[int],
        fusion_depth: int = 0,
        mlp_ratios: Sequence[float] = (4.0, 4.0),
        mixers: str | Builder | None = None,
        grids: Sequence[tuple[int, int]] | None = None,
        qkv_bias: bool = True,
        norm_eps: float = 1e-6,
        attention_dropout: float = 0.0,
        dropout: float = 0.0,
        drop_path: float | Sequence[float] = 0.0,
        layer: int = 0,
        num_layers: int | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        count = len(features)
        grids = [None] * count if grids is None else grids
        per_stage(count, num_heads=num_heads, depths=depths, mlp_ratios=mlp_ratios, grids=grids)
        stored = {"param_dtype": param_dtype, "rngs": rngs}
        common, norm = {"dtype": dtype, **stored}, {"norm_eps": norm_eps}
        rates = [drop_path] * (max(depths) + 1) if isinstance(drop_path, int | float) else list(drop_path)
        own = Choice(SoftmaxAttention) if mixers is None else Choice(mixers) if isinstance(mixers, str) else mixers
        shared = {"qkv_bias": qkv_bias, "attention_dropout": attention_dropout, "projection_dropout": dropout}
        layers = sum(depths) if num_layers is None else num_layers
        self.branches = nnx.List()
        for width, heads, depth, ratio, grid in zip(features, num_heads, depths, mlp_ratios, grids, strict=True):
            blocks = []
            for index in range(depth):
                layout = Layout.SEQUENCE if grid is None else Layout.IMAGE
                prefix = 0 if grid is None else 1
                site = Site(width, heads, layout, grid=grid, prefix=prefix, layer=layer, num_layers=layers)
                place = Place(site, index, own, rates[index])
                given = {"mlp_ratio": ratio, "dropout": dropout, "shared": shared, **norm}
                blocks.append(transformer_block(place, **given, **common))
                layer += 1
            self.branches.append(Blocks(blocks))
        self.go, self.fusions, self.back = nnx.List(), nnx.List(), nnx.List()
        for branch, width in enumerate(features):
            other, heads = features[(branch + 1) % count], num_heads[(branch + 1) % count]
            drops = {"attention_dropout": attention_dropout, "drop_path": rates[-1]}
            fusion = {"num_heads": heads, "qkv_bias": qkv_bias, **drops, **norm, **common}
            self.go.append(NormedMap(width, other, **norm, **common))
            self.fusions.append(nnx.List([ClassFusion(other, **fusion) for _ in range(max(fusion_depth, 1))]))
            self.back.append(NormedMap(other, width, **norm, **common))
        self.fusion_depth = fusion_depth

    def __call__(
        self,
        branches: Sequence[ArrayLike],
        *,
        edits: Sequence[Edits | None] | None = None,
        deterministic: bool = True,
    ) -> list[jax.Array]:
        """Mixes.

        Args:
          branches: tokens of each.
          edits: interventions on all blocks, branch by branch.
          deterministic: False in training.

        Raises:
          ValueError: for another number of branches.
        """
        if len(branches) != len(self.branches):
            raise ValueError(f"branches must be {len(self.branches)}, got {len(branches)}")
        if len({jnp.shape(x)[0] for x in branches}) > 1:
            raise ValueError(f"branches must have one batch, got {[jnp.shape(x) for x in branches]}")
        first, outs = 0, []
        for run, x in zip(self.branches, branches, strict=True):
            last = first + len(run.blocks)
            some = None if edits is None else edits[first:last]
            outs.append(run(jnp.asarray(x), edits=some, deterministic=deterministic))
            first = last
        result = []
        for branch, (go, fusions, back) in enumerate(zip(self.go, self.fusions, self.back, strict=True)):
            other = outs[(branch + 1) % len(outs)]
            token = jnp.concatenate([go(outs[branch][:, :1]), other[:, 1:]], 1)
            for fusion in fusions:
                token = fusion(token, deterministic=deterministic)
            result.append(jnp.concatenate([back(token), outs[branch][:, 1:]], 1))
        return result


def _conv_stem(channels: int, features: int, patch: int, **common: Any) -> Chain:
    """Three convolutions in the place of patches of 12 or 16 pixels, as the models of a dagger have them."""
    if patch not in (12, 16):
        raise ValueError(f"multi_conv is for patches of 12 or 16 pixels, got {patch}")
    between = {"norm": None, "activation": relu, **common}
    second = {"stride": 3, "padding": "VALID"} if patch == 12 else {"stride": 2}
    return Chain(
        ConvNorm(channels, features // 4, 7, stride=4, **between),
        ConvNorm(features // 4, features // 2, 3, **second, **between),
        ConvNorm(features // 2, features, 3, stride=1 if patch == 12 else 2, norm=None, **common),
    )


@register(
    "crossvit_dual_stream.backbone",
    kind=Kind.BACKBONE,
    cost=_COST,
    summary="a vision transformer of two streams, of small and of large patches, joined by their class tokens",
    small={"features": (8, 8), "num_heads": (2, 2), "depths": ((1, 0, 0),), "mlp_ratios": (1.0, 1.0)}
    | {"image_size": 32, "image_scales": (1.0, 0.75), "patch_sizes": (8, 6), "num_classes": 5},
    **_SOURCE,
)
class CrossViT(Editable):
    """Images `(B, H, W, channels)` of any size to logits `(B, num_classes)` in float32; the defaults are CrossViT-18.

    Args:
      features: channels D_b of each branch.
      num_heads: of each branch.
      depths: for each multi-scale block the own blocks of each branch, and last the fusions.
      mlp_ratios: hidden channels of the feed-forwards of each branch over D_b.
      image_size: pixels on a side, or (rows, columns): of the images at scale 1.
      image_scales: of each branch's image; one of another size is resized.
      crop: whether an image that is too large is cut to its centre instead.
      patch_sizes: pixels on a side of each branch's patches.
      multi_conv: whether three convolutions stand in the place of patches, of 12 or 16 pixels.
      mixers: builds the mixers of the branches' blocks, `staged.Choice`, or a registered name; softmax attention when
        None.
      qkv_bias: whether queries, keys and values have a bias.
      channels: of the images.
      num_classes: classes; without any the class tokens, side by side, are the result.
      norm_eps: of all norms.
      attention_dropout: rate on attention weights.
      dropout: rate after the positions, inside feed-forwards and on what mixers return.
      drop_path: stochastic depth rate at the last depth; it rises linearly from 0.
      dtype: of the computation; that of the images when None.
      param_dtype: of the parameters.
      rngs: streams `params`, and `dropout` if there is any.

    Raises:
      ValueError: for lists that have not one entry for each branch, or patches that do not tile a branch's image.
    """

    inputs: ClassVar[Images] = Images()
    model_points = frozenset({"logits"})

    def __init__(
        self,
        features: Sequence[int] = (224, 448),
        *,
        num_heads: Sequence[int] = (7, 7),
        depths: Sequence[Sequence[int]] = ((1, 6, 0),) * 3,
        mlp_ratios: Sequence[float] = (3.0, 3.0),
        image_size: int | Sequence[int] = 240,
        image_scales: Sequence[float] = (1.0, 224 / 240),
        crop: bool = False,
        patch_sizes: Sequence[int] = (12, 16),
        multi_conv: bool = False,
        mixers: str | Builder | None = None,
        qkv_bias: bool = True,
        channels: int = 3,
        num_classes: int | None = 1000,
        norm_eps: float = 1e-6,
        attention_dropout: float = 0.0,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        count, size = len(features), pair(image_size)
        per_stage(count, num_heads=num_heads, image_scales=image_scales, patch_sizes=patch_sizes)
        for entry in depths:
            per_stage(count + 1, depths=entry)
        self.sizes = tuple((int(size[0] * scale), int(size[1] * scale)) for scale in image_scales)
        for sides, patch in zip(self.sizes, patch_sizes, strict=True):
            if any(side % patch for side in sides):
                raise ValueError(f"patch_sizes must tile their images, got {patch} for one of {sides}")
        grids = [(s[0] // p, s[1] // p) for s, p in zip(self.sizes, patch_sizes, strict=True)]
        stored = {"param_dtype": param_dtype, "rngs": rngs}
        common = {"dtype": dtype, **stored}
        self.image_shape, self.image_size = (None, None, channels), size
        self.dtype, self.crop = dtype, crop
        embed = _conv_stem if multi_conv else PatchEmbed
        self.stem = nnx.List(
            [embed(channels, width, patch, **common) for width, patch in zip(features, patch_sizes, strict=True)]
        )
        self.prefix = nnx.List([Prefix(1, width, **stored) for width in features])
        self.position = nnx.List(
            [PositionTable((1 + g[0] * g[1],), width, **stored) for g, width in zip(grids, features, strict=True)]
        )
        self.dropout = nnx.data(dropout_or_none(dropout, rngs))
        reach = [max(entry[:-1]) + entry[-1] for entry in depths]
        rates = [drop_path * i / max(sum(reach) - 1, 1) for i in range(sum(reach))]
        layers, layer, step = sum(sum(entry[:-1]) for entry in depths), 0, 0
        self.scale = nnx.List()
        for entry, far in zip(depths, reach, strict=True):
            self.scale.append(
                MultiScaleBlock(
                    features,
                    num_heads=num_heads,
                    depths=entry[:-1],
                    fusion_depth=entry[-1],
                    mlp_ratios=mlp_ratios,
                    mixers=mixers,
                    grids=grids,
                    qkv_bias=qkv_bias,
                    norm_eps=norm_eps,
                    attention_dropout=attention_dropout,
                    dropout=dropout,
                    drop_path=rates[step : step + far],
                    layer=layer,
                    num_layers=layers,
                    **common,
                )
            )
            layer, step = layer + sum(entry[:-1]), step + far
        self.norm = nnx.List([LayerNorm(width, eps=norm_eps, **stored) for width in features])
        heads = [classifier(width, num_classes, **common) for width in features]
        self.head = nnx.List(heads) if num_classes else nnx.data(None)
        redraw_kernels(self, trunc_normal, rngs=rngs)

    def stages(self, images: ArrayLike, *, deterministic: bool = True) -> tuple[jax.Array, ...]:
        """The map `(B, Hh, Ww, D_b)` of each branch's patches behind the last block, for dense prediction.

        Raises:
          ValueError: for images of another shape, or under an intervention that leaves tokens out.
        """
        maps, _ = self._through(images, deterministic, self.edits().blocks)
        if any(x.ndim != 4 for x in maps):
            raise ValueError("an intervention leaves tokens out: there is no map of what is left")
        return maps

    def tokens(self, images: ArrayLike, *, deterministic: bool = True) -> tuple[jax.Array, ...]:
        """Each branch's tokens `(B, 1 + N_b, D_b)`, normed, the class token in front."""
        return self._through(images, deterministic, self.edits().blocks)[1]

    def pooled(self, images: ArrayLike, *, deterministic: bool = True) -> jax.Array:
        """The class tokens of all branches, side by side: `(B, Σ_b D_b)`."""
        return jnp.concatenate([x[:, 0] for x in self.tokens(images, deterministic=deterministic)], 1)

    def __call__(self, images: ArrayLike, *, deterministic: bool = True) -> jax.Array:
        """Logits, or without heads what `pooled` gives."""
        edits = self.edits()
        tokens = [x[:, 0] for x in self._through(images, deterministic, edits.blocks)[1]]
        if self.head is None:
            return jnp.concatenate(tokens, 1)
        logits = [head(x).astype(jnp.float32) for head, x in zip(self.head, tokens, strict=True)]
        return visit(self, edits.model, "logits", jnp.stack(logits).mean(0))

    def _through(
        self, images: ArrayLike, deterministic: bool, edits: Sequence[Edits | None] | None
    ) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
        images = jnp.asarray(images, self.dtype)
        if images.ndim != 4 or images.shape[-1] != self.image_shape[-1]:
            raise ValueError(f"images must be (B, H, W, {self.image_shape[-1]}), got {images.shape}")
        branches, grids = [], []
        for size, stem, prefix, position in zip(self.sizes, self.stem, self.prefix, self.position, strict=True):
            x = call(stem, self._scaled(images, size), deterministic)
            grids.append(x.shape[:-1])
            x = prefix(x)
            x = x + position(x)
            branches.append(x if self.dropout is None else self.dropout(x, deterministic=deterministic))
        first = 0
        for block in self.scale:
            last = first + sum(len(run.blocks) for run in block.branches)
            some = None if edits is None else edits[first:last]
            branches, first = block(branches, edits=some, deterministic=deterministic), last
        maps = []
        for x, grid in zip(branches, grids, strict=True):
            whole = x.shape[1] == 1 + grid[1] * grid[2]
            maps.append(x[:, 1:].reshape(*grid, -1) if whole else x)
        return tuple(maps), tuple(norm(x) for norm, x in zip(self.norm, branches, strict=True))

    def _scaled(self, images: jax.Array, size: tuple[int, int]) -> jax.Array:
        sides = images.shape[1:3]
        if sides == size:
            return images
        if self.crop and all(have >= want for have, want in zip(sides, size, strict=True)):
            top, left = (round((have - want) / 2) for have, want in zip(sides, size, strict=True))
            return images[:, top : top + size[0], left : left + size[1]]
        return resize_bicubic(images, size)


def _sizes(features: tuple[int, int], heads: int, depth: int, mlp_ratio: float, **more: Any) -> tuple[type, Any]:
    options = {"features": features, "num_heads": (heads, heads), "depths": ((1, depth, 0),) * 3}
    return CrossViT, options | {"mlp_ratios": (mlp_ratio, mlp_ratio)} | more


_LARGE = {"multi_conv": True, "image_size": 408, "image_scales": (1.0, 384 / 408)}
CROSSVITS: Models = {
    "crossvit_tiny": _sizes((96, 192), 3, 4, 4.0),
    "crossvit_small": _sizes((192, 384), 6, 4, 4.0),
    "crossvit_base": _sizes((384, 768), 12, 4, 4.0),
    "crossvit_9": _sizes((128, 256), 4, 3, 3.0),
    "crossvit_15": _sizes((192, 384), 6, 5, 3.0),
    "crossvit_18": _sizes((224, 448), 7, 6, 3.0),
    "crossvit_9_dagger": _sizes((128, 256), 4, 3, 3.0, multi_conv=True),
    "crossvit_15_dagger": _sizes((192, 384), 6, 5, 3.0, multi_conv=True),
    "crossvit_18_dagger": _sizes((224, 448), 7, 6, 3.0, multi_conv=True),
    "crossvit_15_dagger_408": _sizes((192, 384), 6, 5, 3.0, **_LARGE),
    "crossvit_18_dagger_408": _sizes((224, 448), 7, 6, 3.0, **_LARGE),
}
"""For `staged.build_named`. CrossViT-18† at 408 pixels is what the paper trains on; sizes are of images of 240 pixels,
patches of 12 and of 16 on 224 of them, unless the name says otherwise."""
