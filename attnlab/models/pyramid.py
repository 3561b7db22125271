"""A pyramid of stages, each of half the resolution of the one before: what most families of backbones have in common.

A family names its own options, and hands over the builders of its mixers and the options of its convolutions.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx

from attnlab.contract import Site
from attnlab.models import staged
from attnlab.models.staged import Builder, Mixers, Place, Stage, StagedBackbone
from attnlab.nn.conv import ConvNorm
from attnlab.nn.heads import redraw_kernels
from attnlab.nn.linear import trunc_normal
from attnlab.nn.norms import LayerNorm


class Pyramid(StagedBackbone):
    """Images `(B, H, W, channels)` to logits `(B, num_classes)` in float32.

    Args:
      features: channels C of each stage.
      own: builds the family's mixers; several in turn, through the blocks of a stage. Or such a list for each stage.
      stem: what makes the first stage's tokens, of stride 4; or options of a `ConvNorm`, which rounds sides up.
      down: options of those that lead from stage to stage, of stride 2.
      position: module whose result is added to the tokens of the first stage.
      num_heads: heads of each stage.
      depths: blocks of each stage.
      mixers: what takes the place of the family's mixers, in all stages or in each.
      replaced: in how many of the first blocks of each stage; in all where it is None.
      qkv_bias: whether queries, keys and values have a bias, in mixers that have the option.
      block: further options of `transformer_block`: for all blocks, for those of each stage, or what makes them of a
        block's `Place`.
      mlp_ratio: hidden channels of feed-forwards over channels, in all stages or in each; 0 for none.
      last: what takes the place of the norm of the last stage's tokens.
      last_features: channels that it makes; those of the last stage when None.
      image_size: pixels on a side, or (rows, columns); None for any, with mixers that need no grid.
      channels: of the images.
      num_classes: classes; without any the pooled features are the result.
      norm_eps: of all norms.
      norm_first: whether the last norm stands in front of the mean over tokens.
      drop_path: stochastic depth rate of the last block; it rises linearly from 0.
      redraw_convolutions: whether convolutions start as linear maps do: normal of deviation 0.02, biases zero.
      dtype: of the computation; that of the images when None.
      param_dtype: of the parameters.
      rngs: streams `params`, and `dropout` if there is any.

    Raises:
      ValueError: if the lists have different lengths.
    """

    def __init__(
        self,
        features: Sequence[int],
        *,
        own: Sequence[Builder] | Sequence[Sequence[Builder]],
        stem: Mapping[str, Any] | nnx.Module,
        down: Mapping[str, Any],
        position: nnx.Module | None = None,
        num_heads: Sequence[int],
        depths: Sequence[int],
        mixers: Mixers = None,
        replaced: Sequence[int | None] | None = None,
        qkv_bias: bool = True,
        block: Mapping[str, Any] | Sequence[Mapping[str, Any]] | Callable[[Place], Mapping[str, Any]] | None = None,
        mlp_ratio: float | Sequence[float] = 4.0,
        last: nnx.Module | None = None,
        last_features: int | None = None,
        image_size: int | Sequence[int] | None = 224,
        channels: int = 3,
        num_classes: int | None = 1000,
        norm_eps: float = 1e-6,
        norm_first: bool = True,
        drop_path: float = 0.0,
        redraw_convolutions: bool = False,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        stored = {"param_dtype": param_dtype, "rngs": rngs}
        common = {"dtype": dtype, **stored}
        size, count = None if image_size is None else staged.pair(image_size), len(depths)
        ratios = mlp_ratio if isinstance(mlp_ratio, Sequence) else [mlp_ratio] * count
        options = list(block) if isinstance(block, Sequence) else [block or {}] * count
        turns = list(own) if isinstance(own[0], Sequence) else [own] * count
        staged.per_stage(count, own=turns, mlp_ratio=ratios, block=options)
        strides = [4 << stage for stage in range(count)]
        places = staged.places(
            features,
            [None if size is None else (-(-size[0] // stride), -(-size[1] // stride)) for stride in strides],
            num_heads=num_heads,
            depths=depths,
            own=[_in_turn(builders) for builders in turns],
            mixers=mixers,
            replaced=replaced,
            drop_path=drop_path,
        )
        norm = functools.partial(LayerNorm, eps=norm_eps)
        conv = functools.partial(ConvNorm, **{"norm": norm, "filled": True, **common})
        first = stem if isinstance(stem, nnx.Module) else conv(channels, features[0], stride=4, **stem)
        stages = []
        for stage, here in enumerate(places):
            entry = conv(features[stage - 1], features[stage], stride=2, **down) if stage else None
            given = {"mlp_ratio": ratios[stage], "norm_eps": norm_eps, "shared": {"qkv_bias": qkv_bias}}
            more = options[stage]
            blocks = [
                staged.transformer_block(place, **(given | dict(more(place) if callable(more) else more)), **common)
                for place in here
            ]
            stages.append(Stage(blocks, down=entry, position=None if stage else position))
        width = features[-1] if last_features is None else last_features
        super().__init__(
            first,
            stages,
            norm=norm(features[-1], **stored) if last is None else last,
            norm_first=norm_first,
            head=staged.classifier(width, num_classes, **common),
            image_size=size,
            channels=channels,
            dtype=dtype,
        )
        redraw_kernels(self, trunc_normal, convolutions=redraw_convolutions, rngs=rngs)


def _in_turn(builders: Sequence[Builder]) -> Builder:
    def build(site: Site, index: int = 0, *, rngs: nnx.Rngs, **shared: Any) -> nnx.Module:
        return builders[index % len(builders)](site, index, rngs=rngs, **shared)

    return build
