"""Cores that take the place of a plain softmax: what they keep of it, and what they refuse."""

from typing import Any

from attnlab.contract import UnsupportedArgument, View
from attnlab.nn.dense_mixer import Core
from attnlab.nn.softmax_core import SoftmaxCore
from pallas_kernels.masks import Causal


def plain_softmax(core: Core) -> dict[str, Any]:
    """The options `rotary` and `scale` of a core that is softmax of products, and nothing else.

    Raises:
      ValueError: for another core, or one with a bias, a rule, a softcap, ALiBi, or keys that are not rotated.
    """
    if not isinstance(core, SoftmaxCore):
        raise ValueError(f"the core in place must be a SoftmaxCore, got {type(core).__name__}")
    more = [name for name in ("bias", "structural_mask", "softcap") if getattr(core, name) is not None]
    more += ["alibi"] * core.alibi + ["rotate_keys=False"] * (not core.rotate_keys)
    if more:
        raise ValueError(f"the SoftmaxCore in place must be plain, without {', '.join(more)}")
    return {"rotary": core.rotary, "scale": core.scale}


def check_causal(core: Core, view: View, *, segments: bool = False) -> None:
    """For cores that are causal, and take masks of keys alone.

    Args:
      core: which it is.
      view: who sees whom, complete.
      segments: whether it takes packed segments.

    Raises:
      UnsupportedArgument: for another view.
    """
    name = type(core).__name__
    if view.rule != Causal():
        raise UnsupportedArgument(f"{name} is for the causal rule, got {view.rule}")
    if view.mask is not None and view.mask.ndim != 2:
        raise UnsupportedArgument(f"{name} takes masks (B, M) of keys, got mask of shape {view.mask.shape}")
    if view.segment_ids is not None and not segments:
        raise UnsupportedArgument(f"{name} does not take segment_ids")
