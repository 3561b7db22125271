"""The models of agent attention (Han et al., ECCV 2024, arXiv:2312.08874): PVT, Swin, CSwin and DeiT with agents.

Stages are named by letters, as in the authors' configurations: `A` agent attention, `B` the softmax attention of the
original model, `M` agents in the first k blocks only, k behind the letters (`AAMB2`). The number of agents is 9, 16,
49, 49 in the four stages. Names, sizes and training rates are those of LeapLabTHU/Agent-Attention.
"""

import functools
from collections.abc import Collection, Sequence
from typing import Any

from flax import nnx

from attnlab.attention.dense.softmax_attention import SoftmaxAttention
from attnlab.attention.dense.spatial_reduction_attention import SpatialReductionAttention
from attnlab.attention.linear.agent_attention import PAPER, AgentAttention, AgentCore
from attnlab.attention.local.cross_shaped_windows import CrossShapedWindowAttention, softmax_core
from attnlab.attention.local.window_attention import WindowAttention
from attnlab.models.backbone import Choice, build_named, choices_from_letters
from attnlab.models.cswin import CSwinTransformer
from attnlab.models.deit import DeiT
from attnlab.models.pvt import PyramidVisionTransformer
from attnlab.models.swin import SwinTransformer, swin_grids, swin_window
from attnlab.registry import Cost, Kind, Source, register

_ENTRY = {
    "paper": PAPER,
    "source": Source.AUTHORS_CODE,
    "repository": "LeapLabTHU/Agent-Attention",
    "cost": Cost(time="O(N·n·C)", memory="O(N·n·H)"),
    "kind": Kind.BACKBONE,
}
_SMALL = {
    "num_heads": (1, 2, 2, 2),
    "depths": (1, 1, 1, 1),
    "num_agents": (4, 4, 1, 1),
    "num_classes": 5,
    "image_size": 32,
}


@register(
    "agent_attention.pvt",
    summary="PVT with agent attention",
    small={**_SMALL, "features": (8, 8, 16, 16)},
    **_ENTRY,
)
class AgentPVT(PyramidVisionTransformer):
    """Agent-PVT; the defaults are Agent-PVT-T.

    Args:
      features: channels per stage.
      num_heads: heads per stage.
      depths: blocks per stage.
      attention: a letter per stage, `A`, `B` or `M`.
      num_agents: per stage, or one number for all.
      agent_reductions: stride of the convolution before keys and values of `A` blocks, per stage.
      softmax_reductions: the same for `B` blocks.
      qkv_bias: whether queries, keys and values have a bias.
      scale: of the scores of `B` blocks, D^-1/2 when None.
      attention_dropout: rate on softmax weights.
      dropout: rate after the positions, in feed-forwards and on what mixers return.
      rngs: streams `params`, and `dropout` if there is any.
      **family: further arguments of `PyramidVisionTransformer`.
    """

    def __init__(
        self,
        features: Sequence[int] = (64, 128, 320, 512),
        *,
        num_heads: Sequence[int] = (1, 2, 5, 8),
        depths: Sequence[int] = (2, 2, 2, 2),
        attention: str = "AAAA",
        num_agents: int | Sequence[int] = (9, 16, 49, 49),
        agent_reductions: Sequence[int] = (1, 1, 1, 1),
        softmax_reductions: Sequence[int] = (8, 4, 2, 1),
        qkv_bias: bool = True,
        scale: float | None = None,
        attention_dropout: float = 0.0,
        dropout: float = 0.0,
        rngs: nnx.Rngs,
        **family: Any,
    ):
        common = _mixer_options(qkv_bias, attention_dropout, dropout)
        num_agents = _per_stage(num_agents, depths)

        def agents(stage: int, block: int) -> Choice:
            options = {"num_agents": num_agents[stage], "reduction": agent_reductions[stage]}
            return Choice(AgentAttention, options | common)

        def softmax(stage: int, block: int) -> Choice:
            options = {"reduction": softmax_reductions[stage], "scale": scale}
            return Choice(SpatialReductionAttention, options | common)

        choices = choices_from_letters(attention, depths, "AB", {"A": agents, "B": softmax})
        super().__init__(features, choices=choices, num_heads=num_heads, dropout=dropout, rngs=rngs, **family)


@register(
    "agent_attention.swin",
    summary="Swin with agent attention in large windows",
    small={**_SMALL, "features": 8, "window": 8},
    **_ENTRY,
)
class AgentSwin(SwinTransformer):
    """Agent-Swin; the defaults are Agent-Swin-T.

    `A` blocks use `window`, clipped to the stage's grid (56 at 224 pixels: one window); `B` blocks use windows of
    max(7, window // 8). Windows of odd blocks are shifted by half a window.

    Args:
      features: channels of the first stage.
      num_heads: heads per stage.
      depths: blocks per stage.
      attention: a letter per stage, `A`, `B` or `M`.
      num_agents: per stage, or one number for all.
      window: tokens on a side of the windows of `A` blocks.
      image_size: pixels on a side, or (rows, columns).
      patch_size: pixels on a side of a patch.
      qkv_bias: whether queries, keys and values have a bias.
      scale: of the scores of `B` blocks, D^-1/2 when None.
      attention_dropout: rate on softmax weights.
      dropout: rate after the patches, in feed-forwards and on what mixers return.
      rngs: streams `params`, and `dropout` if there is any.
      **family: further arguments of `SwinTransformer`.
    """

    def __init__(
        self,
        features: int = 96,
        *,
        num_heads: Sequence[int] = (3, 6, 12, 24),
        depths: Sequence[int] = (2, 2, 6, 2),
        attention: str = "AAAB",
        num_agents: int | Sequence[int] = (9, 16, 49, 49),
        window: int = 56,
        image_size: int | Sequence[int] = 224,
        patch_size: int | Sequence[int] = 4,
        qkv_bias: bool = True,
        scale: float | None = None,
        attention_dropout: float = 0.0,
        dropout: float = 0.0,
        rngs: nnx.Rngs,
        **family: Any,
    ):
        common = _mixer_options(qkv_bias, attention_dropout, dropout)
        num_agents = _per_stage(num_agents, depths)
        grids = swin_grids(image_size, patch_size, len(depths))

        def agents(stage: int, block: int) -> Choice:
            size, shift = swin_window(grids[stage], window, block)
            options = {"window": size, "shift": shift, "num_agents": num_agents[stage]}
            return Choice(AgentAttention, options | common)

        def softmax(stage: int, block: int) -> Choice:
            size, shift = swin_window(grids[stage], max(7, window // 8), block)
            return Choice(WindowAttention, {"window": size, "shift": shift, "scale": scale} | common)

        super().__init__(
            features,
            choices=choices_from_letters(attention, depths, "AB", {"A": agents, "B": softmax}),
            num_heads=num_heads,
            image_size=image_size,
            patch_size=patch_size,
            dropout=dropout,
            rngs=rngs,
            **family,
        )


@register(
    "agent_attention.cswin",
    summary="CSwin with agent attention in wide stripes",
    small={**_SMALL, "features": 8, "num_heads": (2, 2, 4, 4)},
    **_ENTRY,
)
class AgentCSwin(CSwinTransformer):
    """Agent-CSwin; the defaults are Agent-CSwin-T.

    Args:
      features: channels of the first stage.
      num_heads: heads per stage.
      depths: blocks per stage.
      attention: a letter per stage, `A`, `B` or `M`.
      num_agents: per stage, or one number for all.
      agent_splits: width of the stripes of `A` blocks per stage; None and the stage's side mean one window.
      softmax_splits: width of the stripes of `B` blocks per stage. The last stage always has one window.
      qkv_bias: whether queries, keys and values have a bias.
      scale: of the scores of `B` blocks, D^-1/2 when None.
      attention_dropout: rate on softmax weights.
      dropout: rate in feed-forwards.
      rngs: streams `params`, and `dropout` if there is any.
      **family: further arguments of `CSwinTransformer`.
    """

    def __init__(
        self,
        features: int = 64,
        *,
        num_heads: Sequence[int] = (2, 4, 8, 16),
        depths: Sequence[int] = (2, 4, 18, 1),
        attention: str = "AABB",
        num_agents: int | Sequence[int] = (9, 16, 49, 49),
        agent_splits: Sequence[int] | None = None,
        softmax_splits: Sequence[int] = (1, 2, 7, 7),
        qkv_bias: bool = True,
        scale: float | None = None,
        attention_dropout: float = 0.0,
        dropout: float = 0.0,
        rngs: nnx.Rngs,
        **family: Any,
    ):
        # The authors' code leaves the result of the attention without dropout here.
        common = {"qkv_bias": qkv_bias}
        num_agents = _per_stage(num_agents, depths)
        last = len(depths) - 1

        def agents(stage: int, block: int) -> Choice:
            core = functools.partial(AgentCore, num_agents=num_agents[stage], dropout=attention_dropout)
            options: dict[str, Any] = {"core": core}
            if agent_splits is None or stage == last:
                options["whole"] = True
            else:
                options["split"] = agent_splits[stage]
            return Choice(CrossShapedWindowAttention, options | common)

        def softmax(stage: int, block: int) -> Choice:
            core = functools.partial(softmax_core, scale=scale, dropout=attention_dropout)
            options = {"core": core, "split": softmax_splits[stage], "whole": stage == last}
            return Choice(CrossShapedWindowAttention, options | common)

        choices = choices_from_letters(attention, depths, "AB", {"A": agents, "B": softmax})
        super().__init__(features, choices=choices, num_heads=num_heads, dropout=dropout, rngs=rngs, **family)


@register(
    "agent_attention.deit",
    summary="DeiT with agent attention in all or the first blocks",
    small={"features": 16, "num_heads": 2, "depth": 2, "num_agents": 4, "num_classes": 5, "image_size": 32},
    **_ENTRY,
)
class AgentDeiT(DeiT):
    """Agent-DeiT; the defaults are Agent-DeiT-T.

    Args:
      features: channels.
      num_heads: heads.
      depth: blocks, at most 12 with agents: their number is given for blocks 0-1, 2-3, 4-9 and 10-11.
      num_agents: for these four runs of blocks, or one number for all.
      agent_layers: how many of the first blocks have agents, all when None; the others plain softmax attention.
      qkv_bias: whether queries, keys and values have a bias.
      attention_dropout: rate on softmax weights.
      dropout: rate after the positions, in feed-forwards and on what mixers return.
      rngs: streams `params`, and `dropout` if there is any.
      **family: further arguments of `DeiT`.

    Raises:
      ValueError: for agents beyond block 12.
    """

    def __init__(
        self,
        features: int = 192,
        *,
        num_heads: int = 3,
        depth: int = 12,
        num_agents: int | Sequence[int] = (49, 49, 49, 49),
        agent_layers: int | None = None,
        qkv_bias: bool = True,
        attention_dropout: float = 0.0,
        dropout: float = 0.0,
        rngs: nnx.Rngs,
        **family: Any,
    ):
        runs = (0, 0, 1, 1, 2, 2, 2, 2, 2, 2, 3, 3)
        count = depth if agent_layers is None else min(agent_layers, depth)
        if count > len(runs):
            raise ValueError(f"agents are defined for the first {len(runs)} blocks, got {count} blocks with agents")
        common = _mixer_options(qkv_bias, attention_dropout, dropout)
        num_agents = _per_stage(num_agents, set(runs))
        choices = [Choice(AgentAttention, {"num_agents": num_agents[runs[block]]} | common) for block in range(count)]
        choices += [Choice(SoftmaxAttention, common)] * (depth - count)
        super().__init__(features, choices=choices, num_heads=num_heads, dropout=dropout, rngs=rngs, **family)


def _per_stage(num_agents: int | Sequence[int], stages: Collection[int]) -> Sequence[int]:
    return [num_agents] * len(stages) if isinstance(num_agents, int) else num_agents


def _mixer_options(qkv_bias: bool, attention_dropout: float, projection_dropout: float) -> dict[str, Any]:
    return {
        "qkv_bias": qkv_bias,
        "attention_dropout": attention_dropout,
        "projection_dropout": projection_dropout,
    }


_SMALL = {"depths": (2, 2, 18, 2), "drop_path": 0.3, "attention": "AABB"}
_BASE = {"features": 128, "num_heads": (4, 8, 16, 32), "depths": (2, 2, 18, 2), "drop_path": 0.5, "attention": "AAMB2"}
_CSWIN_BASE = {"features": 96, "depths": (3, 6, 29, 2), "num_heads": (4, 8, 16, 32)}

AGENT_TRANSFORMERS: dict[str, tuple[type[nnx.Module], dict[str, Any]]] = {
    "agent_pvt_tiny": (AgentPVT, {"depths": (2, 2, 2, 2), "drop_path": 0.1}),
    "agent_pvt_small": (AgentPVT, {"depths": (3, 4, 6, 3), "drop_path": 0.1}),
    "agent_pvt_medium": (AgentPVT, {"depths": (3, 4, 18, 3), "drop_path": 0.3}),
    "agent_pvt_large": (AgentPVT, {"depths": (3, 8, 27, 3), "drop_path": 0.3}),
    "agent_swin_tiny": (AgentSwin, {"drop_path": 0.2}),
    "agent_swin_small": (AgentSwin, _SMALL),
    "agent_swin_small_288": (AgentSwin, _SMALL | {"image_size": 288, "window": 72}),
    "agent_swin_base": (AgentSwin, _BASE),
    "agent_swin_base_384": (AgentSwin, _BASE | {"image_size": 384, "window": 96}),
    "agent_cswin_tiny": (AgentCSwin, {"drop_path": 0.2}),
    "agent_cswin_small": (AgentCSwin, {"depths": (3, 6, 29, 2), "drop_path": 0.4}),
    "agent_cswin_base": (AgentCSwin, _CSWIN_BASE | {"drop_path": 0.5}),
    "agent_cswin_base_384": (
        AgentCSwin,
        _CSWIN_BASE | {"drop_path": 0.7, "image_size": 384, "softmax_splits": (1, 2, 12, 12)},
    ),
    "agent_deit_tiny": (AgentDeiT, {}),
    "agent_deit_small": (AgentDeiT, {"features": 384, "num_heads": 6, "drop_path": 0.1}),
    "agent_deit_base": (
        AgentDeiT,
        {"features": 768, "num_heads": 12, "num_agents": (81,) * 4, "agent_layers": 4, "drop_path": 0.3},
    ),
}
"""The models of the paper by name: class and constructor arguments."""


def agent_transformer(name: str, *, rngs: nnx.Rngs, **overrides: Any) -> nnx.Module:
    """A model of `AGENT_TRANSFORMERS` by name; `overrides` replace its constructor arguments.

    Raises:
      KeyError: with the nearest names, if there is none.
    """
    return build_named(AGENT_TRANSFORMERS, name, rngs=rngs, **overrides)
