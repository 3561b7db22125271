"""The models of agent attention (Han et al., ECCV 2024, arXiv:2312.08874): PVT, Swin, CSwin and DeiT with agents.

`replaced` says how many of the first blocks of each stage have agent attention; the others keep that of the original
model. Names, sizes and training rates are those of LeapLabTHU/Agent-Attention.
"""

import functools
from collections.abc import Sequence
from typing import Any

from flax import nnx

from attnlab.attention.linear.agent_attention import PAPER, AgentAttention, AgentCore
from attnlab.attention.local.cross_shaped_windows import CrossShapedWindowAttention
from attnlab.models import staged
from attnlab.models.cswin import CSwinTransformer
from attnlab.models.deit import DeiT
from attnlab.models.pvt import PyramidVisionTransformer
from attnlab.models.staged import Choice, Models
from attnlab.models.swin import SwinTransformer, Windowed
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
      num_agents: per stage.
      agent_reductions: stride of the convolution before keys and values of agent attention, per stage.
      rngs: streams `params`, and `dropout` if there is any.
      **family: further arguments of `PyramidVisionTransformer`.
    """

    def __init__(
        self,
        *,
        num_agents: Sequence[int] = (9, 16, 49, 49),
        agent_reductions: Sequence[int] = (1, 1, 1, 1),
        rngs: nnx.Rngs,
        **family: Any,
    ):
        staged.per_stage(len(num_agents), agent_reductions=agent_reductions)
        options = zip(num_agents, agent_reductions, strict=True)
        mixers = [Choice(AgentAttention, {"num_agents": n, "reduction": r}) for n, r in options]
        super().__init__(mixers=mixers, rngs=rngs, **family)


@register(
    "agent_attention.swin",
    summary="Swin with agent attention in large windows",
    small={**_SMALL, "features": 8, "agent_window": 8},
    **_ENTRY,
)
class AgentSwin(SwinTransformer):
    """Agent-Swin; the defaults are Agent-Swin-T.

    Args:
      replaced: in how many of the first blocks of each stage agents stand; in all where it is None.
      num_agents: per stage.
      agent_window: tokens on a side of the windows of agent attention, clipped to the stage's grid (56 at 224 pixels:
        one window). Windows of odd blocks are shifted by half a window.
      rngs: streams `params`, and `dropout` if there is any.
      **family: further arguments of `SwinTransformer`.
    """

    def __init__(
        self,
        *,
        replaced: Sequence[int | None] = (None, None, None, 0),
        num_agents: Sequence[int] = (9, 16, 49, 49),
        agent_window: int = 56,
        rngs: nnx.Rngs,
        **family: Any,
    ):
        mixers = [Windowed(AgentAttention, {"num_agents": n}, agent_window) for n in num_agents]
        super().__init__(mixers=mixers, replaced=replaced, rngs=rngs, **family)


@register(
    "agent_attention.cswin",
    summary="CSwin with agent attention in wide stripes",
    small={**_SMALL, "features": 8, "num_heads": (2, 2, 4, 4)},
    **_ENTRY,
)
class AgentCSwin(CSwinTransformer):
    """Agent-CSwin; the defaults are Agent-CSwin-T.

    Args:
      depths: blocks per stage.
      replaced: in how many of the first blocks of each stage agents stand; in all where it is None.
      num_agents: per stage.
      agent_splits: width of the stripes of agent attention per stage; None and the stage's side mean one window, which
        the last stage always has.
      attention_dropout: rate on the weights of both attentions.
      rngs: streams `params`, and `dropout` if there is any.
      **family: further arguments of `CSwinTransformer`.
    """

    def __init__(
        self,
        *,
        depths: Sequence[int] = (2, 4, 18, 1),
        replaced: Sequence[int | None] = (None, None, 0, 0),
        num_agents: Sequence[int] = (9, 16, 49, 49),
        agent_splits: Sequence[int] | None = None,
        attention_dropout: float = 0.0,
        rngs: nnx.Rngs,
        **family: Any,
    ):
        mixers, last = [], len(depths) - 1
        for stage, agents in enumerate(num_agents):
            whole = agent_splits is None or stage == last
            stripes = {"whole": True} if whole else {"split": agent_splits[stage]}
            core = functools.partial(AgentCore, num_agents=agents, dropout=attention_dropout)
            mixers.append(Choice(CrossShapedWindowAttention, {"core": core} | stripes))
        family |= {"depths": depths, "replaced": replaced, "attention_dropout": attention_dropout}
        super().__init__(mixers=mixers, rngs=rngs, **family)


@register(
    "agent_attention.deit",
    summary="DeiT with agent attention in all or the first blocks",
    small={"features": 16, "num_heads": 2, "depth": 2, "num_agents": 4, "num_classes": 5, "image_size": 32},
    **_ENTRY,
)
class AgentDeiT(DeiT):
    """Agent-DeiT; the defaults are Agent-DeiT-T.

    Args:
      num_agents: in every block, or one number for each.
      rngs: streams `params`, and `dropout` if there is any.
      **family: further arguments of `DeiT`.
    """

    def __init__(self, *, num_agents: int | Sequence[int] = 49, rngs: nnx.Rngs, **family: Any):
        def agents(site: Any, index: int, **shared: Any) -> nnx.Module:
            count = num_agents if isinstance(num_agents, int) else num_agents[index]
            return Choice(AgentAttention, {"num_agents": count})(site, index, **shared)

        super().__init__(mixers=agents, rngs=rngs, **family)


_SWIN_BASE = {"features": 128, "num_heads": (4, 8, 16, 32), "depths": (2, 2, 18, 2), "replaced": (2, 2, 2, 0)}
_CSWIN_BASE = {"features": 96, "num_heads": (4, 8, 16, 32), "depths": (3, 6, 29, 2)}

PVT_SIZES: dict[str, dict[str, Any]] = {
    "pvt_tiny": {"depths": (2, 2, 2, 2), "drop_path": 0.1},
    "pvt_small": {"depths": (3, 4, 6, 3), "drop_path": 0.1},
    "pvt_medium": {"depths": (3, 4, 18, 3), "drop_path": 0.3},
    "pvt_large": {"depths": (3, 8, 27, 3), "drop_path": 0.3},
}
SWIN_SIZES: dict[str, dict[str, Any]] = {
    "swin_tiny": {"drop_path": 0.2},
    "swin_small": {"depths": (2, 2, 18, 2), "replaced": (2, 2, 0, 0), "drop_path": 0.3},
    "swin_base": _SWIN_BASE | {"drop_path": 0.5},
    "swin_base_384": _SWIN_BASE | {"drop_path": 0.5, "image_size": 384, "window": 12},
}
CSWIN_SIZES: dict[str, dict[str, Any]] = {
    "cswin_tiny": {"drop_path": 0.2},
    "cswin_small": {"depths": (3, 6, 29, 2), "drop_path": 0.4},
    "cswin_base": _CSWIN_BASE | {"drop_path": 0.5},
    "cswin_base_384": _CSWIN_BASE | {"drop_path": 0.7, "image_size": 384, "splits": (1, 2, 12, 12)},
}
"""Sizes and training rates, with the blocks whose attention is replaced, that this paper and InLine's share."""

AGENT_TRANSFORMERS: Models = {
    **{f"agent_{name}": (AgentPVT, sizes) for name, sizes in PVT_SIZES.items()},
    **{f"agent_{name}": (AgentSwin, sizes) for name, sizes in SWIN_SIZES.items()},
    "agent_swin_small_288": (
        AgentSwin,
        SWIN_SIZES["swin_small"] | {"image_size": 288, "agent_window": 72, "window": 9},
    ),
    "agent_swin_base_384": (AgentSwin, SWIN_SIZES["swin_base_384"] | {"agent_window": 96}),
    **{f"agent_{name}": (AgentCSwin, sizes) for name, sizes in CSWIN_SIZES.items()},
    "agent_deit_tiny": (AgentDeiT, {}),
    "agent_deit_small": (AgentDeiT, {"features": 384, "num_heads": 6, "drop_path": 0.1}),
    "agent_deit_base": (
        AgentDeiT,
        {"features": 768, "num_heads": 12, "num_agents": 81, "replaced": 4, "drop_path": 0.3},
    ),
}
"""The models of the paper by name: class and constructor arguments."""


def agent_transformer(name: str, *, rngs: nnx.Rngs, **overrides: Any) -> staged.StagedBackbone:
    """A model of `AGENT_TRANSFORMERS` by name; `overrides` replace its constructor arguments.

    Raises:
      KeyError: with the nearest names, if there is none.
    """
    return staged.build_named(AGENT_TRANSFORMERS, name, rngs=rngs, **overrides)
