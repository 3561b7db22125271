"""Swin Transformer (Liu et al., ICCV 2021, arXiv:2103.14030).

Patches of 4x4 pixels, then stages of pre-norm blocks, of shifted window attention where no other mixer is chosen.
Between stages, 2x2 tokens are concatenated, normed and mapped from 4 C to 2 C channels. A norm, the mean over tokens
and a linear classifier end it.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx

from attnlab.attention.local.window_attention import WindowAttention
from attnlab.contract import Site
from attnlab.models import staged
from attnlab.models.staged import Choice, Mixers, Stage, StagedBackbone
from attnlab.nn.conv import PatchEmbed, PatchMerging
from attnlab.nn.heads import redraw_kernels
from attnlab.nn.linear import trunc_normal
from attnlab.nn.norms import LayerNorm
from attnlab.nn.positions import PositionTable


def swin_window(grid: tuple[int, int], window: int, block: int) -> tuple[int, int]:
    """Window and shift of a block, as the authors' code clips them.

    A window of at least the shorter side of the grid becomes that side and is not shifted; else the windows of odd
    blocks are shifted by half a window.
    """
    if min(grid) <= window:
        return min(grid), 0
    return window, window // 2 if block % 2 else 0


@dataclasses.dataclass(frozen=True)
class Windowed(Choice):
    """A mixer with the options `window` and `shift`, which follow from the grid and the block as in `swin_window`.

    Attributes:
      window: tokens on a side of a window, where the grid is not smaller.
    """

    window: int = 7

    def options_at(self, site: Site, index: int) -> Mapping[str, Any]:
        window, shift = swin_window(site.grid, self.window, index)
        return {**self.options, "window": window, "shift": shift}


class SwinTransformer(StagedBackbone):
    """Images `(B, H, W, channels)` to logits `(B, num_classes)` in float32; the defaults are Swin-T.

    Args:
      features: channels C of the first stage; each later stage has twice as many.
      num_heads: heads per stage.
      depths: blocks per stage.
      mixers: what takes the place of window attention, in all stages or in each.
      replaced: in how many of the first blocks of each stage; in all where it is None.
      window: tokens on a side of the windows of window attention.
      scale: of its scores, D^-1/2 when None.
      qkv_bias: whether queries, keys and values have a bias.
      mlp_ratio: hidden channels over channels.
      image_size: pixels on a side, or (rows, columns).
      patch_size: pixels on a side of a patch.
      channels: of the images.
      num_classes: classes; without any the pooled features are the result.
      position_table: whether a learned position table is added to the patches.
      patch_norm: whether patches are normed.
      norm_eps: of all norms.
      attention_dropout: rate on attention weights, in mixers that have them.
      dropout: rate after the patches, inside feed-forwards and on what mixers return.
      drop_path: stochastic depth rate of the last block; it rises linearly from 0.
      dtype: of the computation; that of the images when None.
      param_dtype: of the parameters.
      rngs: streams `params`, and `dropout` if there is any.

    Raises:
      ValueError: if the lists have different lengths, or images cannot be halved between stages.
    """

    def __init__(
        self,
        features: int = 96,
        *,
        num_heads: Sequence[int] = (3, 6, 12, 24),
        depths: Sequence[int] = (2, 2, 6, 2),
        mixers: Mixers = None,
        replaced: Sequence[int | None] | None = None,
        window: int = 7,
        scale: float | None = None,
        qkv_bias: bool = True,
        mlp_ratio: float = 4.0,
        image_size: int | Sequence[int] = 224,
        patch_size: int | Sequence[int] = 4,
        channels: int = 3,
        num_classes: int | None = 1000,
        position_table: bool = False,
        patch_norm: bool = True,
        norm_eps: float = 1e-5,
        attention_dropout: float = 0.0,
        dropout: float = 0.0,
        drop_path: float = 0.1,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        common = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        shared = {"qkv_bias": qkv_bias, "attention_dropout": attention_dropout, "projection_dropout": dropout}
        block = {"mlp_ratio": mlp_ratio, "norm_eps": norm_eps, "dropout": dropout, "shared": shared} | common
        grids = staged.halved_grids(image_size, patch_size, len(depths))
        widths = [features << stage for stage in range(len(depths))]
        places = staged.places(
            widths,
            grids,
            num_heads=num_heads,
            depths=depths,
            own=[Windowed(WindowAttention, {"scale": scale}, window)] * len(depths),
            mixers=mixers,
            replaced=replaced,
            drop_path=drop_path,
        )
        norm = functools.partial(LayerNorm, eps=norm_eps)
        stages = []
        for stage, here in enumerate(places):
            down = PatchMerging(widths[stage - 1], norm=norm, **common) if stage else None
            table = None
            if position_table and not stage:
                table = PositionTable(grids[0], features, param_dtype=param_dtype, rngs=rngs)
            dropped = None if stage else staged.dropout_or_none(dropout, rngs)
            blocks = [staged.transformer_block(place, **block) for place in here]
            stages.append(Stage(blocks, down=down, position=table, dropout=dropped))
        super().__init__(
            PatchEmbed(channels, features, staged.pair(patch_size), norm=norm if patch_norm else None, **common),
            stages,
            norm=norm(widths[-1], param_dtype=param_dtype, rngs=rngs),
            head=staged.classifier(widths[-1], num_classes, **common),
            image_size=staged.pair(image_size),
            channels=channels,
            dtype=dtype,
        )
        redraw_kernels(self, trunc_normal, rngs=rngs)
