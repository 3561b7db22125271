"""BiFormer in the layout of Swin-T (Zhu et al., 2023, arXiv:2303.08810): the model of the paper's ablations.

Swin-T with routed attention in place of windows: a stem of one convolution 4×4 with stride 4, blocks without the
convolution of positions, norms in front of the convolutions 2×2 between stages, and a feed-forward of 4 C channels.

    x = x + mixer(LN(x));   x = x + MLP(LN(x))

The authors have it twice, with `biformer_bra` and with their later `biformer_bra.nchw`, whose last stage enhances
values instead of the input. The code is at rayleizhu/BiFormer, models/biformer_stl.py and models/biformer_stl_nchw.py.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx

from attnlab.attention.sparse.biformer_bra import PAPER, RegionalRoutingAttention
from attnlab.contract import Layout, Site
from attnlab.models import staged
from attnlab.models.biformer import LocallyEnhancedAttention, biformer_block, stage_mixer
from attnlab.models.staged import Models, Stage, StagedBackbone
from attnlab.nn.conv import ConvNorm
from attnlab.nn.heads import redraw_kernels
from attnlab.nn.linear import trunc_normal
from attnlab.nn.norms import BatchNorm, LayerNorm
from attnlab.registry import Cost, Kind, Source, register

NORMS = {"batch": BatchNorm, "layer": LayerNorm}
ROUTED = ("routed", "regional")


def stl_mixer(
    kind: str, site: Site, *, n_win: int = 7, topk: int | None = None, side_dwconv: int = 5, **common: Any
) -> nnx.Module:
    """The mixer of a block.

    Args:
      kind: "routed" attention; "regional", the same in its later form; "local_values", plain attention with a
        convolution of the values added; or another one of `attnlab.models.biformer.stage_mixer`.
      site: where it stands.
      n_win: regions per side, of the first two.
      topk: regions that a region attends to, of the first two.
      side_dwconv: side of the local enhancement's kernel.
      **common: `dtype`, `param_dtype`, `rngs`.
    """
    routing = {"num_heads": site.num_heads, "n_win": n_win, "topk": topk}
    if kind == "regional":
        return RegionalRoutingAttention(site.features, side_dwconv=side_dwconv, **routing, **common)
    if kind == "local_values":
        plain = {"num_heads": 8, "qkv_bias": False, "of_values": True}
        return LocallyEnhancedAttention(site.features, side=side_dwconv, **plain, **common)
    return stage_mixer(kind, site, side_dwconv=side_dwconv, routing=routing, **common)


@register(
    "biformer_bra.stl",
    kind=Kind.BACKBONE,
    paper=PAPER,
    source=Source.AUTHORS_CODE,
    repository="rayleizhu/BiFormer",
    cost=Cost(time="O(N·k·(N/S²)·C + N·C²) per block", memory="O(k·N·C)"),
    summary="Swin-T with bi-level routing attention in place of its windows",
    small={
        "num_classes": 5,
        "depths": (1, 1),
        "features": (8, 16),
        "head_dim": 8,
        "n_wins": (1, 1),
        "mixers": ("routed", "regional"),
        "topks": (1, 1),
        "mlp_ratios": (1, 1),
    },
)
class BiFormerSTL(StagedBackbone):
    """Images (B, Hh, Ww, channels) to logits (B, classes) in float32. The defaults are those of `biformer_stl`.

    The sequences have one entry per stage.

    Args:
      num_classes: classes; without any the pooled features are the result.
      image_size: (rows, columns) of the images; None where any will do that the regions take.
      channels: of the images.
      depths: blocks.
      features: channels C.
      head_dim: D of routed attention.
      mixers: see `stl_mixer`.
      topks: regions that a region attends to in routed attention; None in other stages.
      n_wins: regions per side.
      mlp_ratios: hidden channels of the feed-forwards over C.
      norm: of the convolutions, "batch" or "layer"; those of the blocks are layer norms.
      last_norm: in front of the mean, "batch" or "layer"; `norm` when None.
      side_dwconv: see `stl_mixer`.
      drop_path: of the last block; it grows from 0 by equal steps.
      dtype: of the computation; that of the images when None.
      param_dtype: of the parameters.
      rngs: streams `params` and, with `drop_path`, `dropout`.

    Raises:
      ValueError: for sequences of unequal length, or options that do not fit together.
    """

    def __init__(
        self,
        num_classes: int | None = 1000,
        *,
        image_size: Sequence[int] | None = None,
        channels: int = 3,
        depths: Sequence[int] = (2, 2, 6, 2),
        features: Sequence[int] = (96, 192, 384, 768),
        head_dim: int = 32,
        mixers: Sequence[str] = ("routed", "routed", "routed", "local"),
        topks: Sequence[int | None] = (1, 4, 16, None),
        n_wins: Sequence[int] = (7, 7, 7, 7),
        mlp_ratios: Sequence[float] = (4, 4, 4, 4),
        norm: str = "batch",
        last_norm: str | None = None,
        side_dwconv: int = 5,
        drop_path: float = 0.0,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        lists = {"features": features, "mixers": mixers, "topks": topks, "n_wins": n_wins, "mlp_ratios": mlp_ratios}
        staged.per_stage(len(depths), **lists)
        last_norm = norm if last_norm is None else last_norm
        for name, value in (("norm", norm), ("last_norm", last_norm)):
            if value not in NORMS:
                raise ValueError(f"{name} must be one of {', '.join(NORMS)}, got {value!r}")
        if any((kind in ROUTED) != (topk is not None) for kind, topk in zip(mixers, topks, strict=True)):
            raise ValueError(f"topks go with the routed stages and are None in others, got {topks} for {mixers}")
        common = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        stages, layer, layers = [], 0, sum(depths)
        for stage, (width, depth) in enumerate(zip(features, depths, strict=True)):
            grid = None if image_size is None else tuple(side // (4 << stage) for side in image_size)
            blocks = []
            for _ in range(depth):
                site = Site(width, width // head_dim, Layout.IMAGE, grid=grid, layer=layer, num_layers=layers)
                options = {"n_win": n_wins[stage], "topk": topks[stage], "side_dwconv": side_dwconv}
                mixer = stl_mixer(mixers[stage], site, **options, **common)
                own = {"mlp_ratio": mlp_ratios[stage], "drop_path": drop_path * layer / max(layers - 1, 1)}
                blocks.append(biformer_block(mixer, width, position_conv=False, **own, **common))
                layer += 1
            down = None
            if stage:
                merging = {"stride": 2, "padding": "VALID", "norm": NORMS[norm], "norm_first": True}
                down = ConvNorm(features[stage - 1], width, 2, **merging, **common)
            stages.append(Stage(blocks, down=down))
        super().__init__(
            ConvNorm(channels, features[0], 4, stride=4, padding="VALID", norm=NORMS[norm], **common),
            stages,
            norm=NORMS[last_norm](features[-1], param_dtype=param_dtype, rngs=rngs),
            head=staged.classifier(features[-1], num_classes, **common),
            image_size=image_size,
            channels=channels,
            dtype=dtype,
        )
        redraw_kernels(self, trunc_normal, rngs=rngs)


BIFORMER_STLS: Models = {
    "biformer_stl": (BiFormerSTL, {}),
    "biformer_stl_nchw": (
        BiFormerSTL,
        {"mixers": ("regional", "regional", "regional", "local_values")},
    ),
}
"""For `staged.build_named`: both have 28.4 M parameters, 4.6 G multiply-adds and 82.7 % on ImageNet-1K at 224²."""
