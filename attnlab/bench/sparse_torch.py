"""PyTorch's masked and its FlexAttention under the masks of `attnlab.bench.sparse`, on a CPU, in another process.

The rule goes there as numbers: of each axis of tokens the first and the last key that a query sees, and the period in
which it sees them, with keys at the start that all see. What is not of this form is not compared.
"""

import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from attnlab.bench.cpu import Peer
from pallas_kernels.masks import Mask

CONTENDERS = {"sdpa": "torch SDPA, masked", "flex": "torch FlexAttention"}
ROWS = 1024  # of a mask that are looked at together


@dataclasses.dataclass(frozen=True)
class Axis:
    """Keys `first[i]` to `last[i]` in steps of `period` along one axis of tokens."""

    first: np.ndarray
    last: np.ndarray
    period: int = 1


def axis_of(mask: Mask, length: int, *, period: int = 1, prefix: int = 0) -> Axis | None:
    """The mask of one axis in this form; None where it has another.

    Args:
      mask: of `length` tokens.
      length: N.
      period: of the keys that a query sees.
      prefix: keys at the start that all queries see, beside those of the form.
    """
    first, last = np.zeros(length, np.int64), np.full(length, -1, np.int64)
    j = np.arange(length)
    for start in range(0, length, ROWS):
        i = np.arange(start, min(start + ROWS, length))
        seen = np.broadcast_to(np.asarray(mask(i[:, None], j[None])), (i.size, length))
        rest = seen & (j >= prefix)
        some = rest.any(1)
        first[i] = np.where(some, rest.argmax(1), 0)
        last[i] = np.where(some, length - 1 - rest[:, ::-1].argmax(1), -1)
        formed = (j >= first[i, None]) & (j <= last[i, None]) & (j % period == i[:, None] % period)
        if not np.array_equal(formed | (j < prefix), seen):
            return None
    return Axis(first, last, period)


def times(
    peer: Peer,
    contender: str,
    axes: list[Axis],
    prefix: int,
    arrays: dict[str, np.ndarray],
    mode: str,
    check: Callable[[str, np.ndarray], float],
) -> tuple[float, Callable[[float], float]]:
    """The largest error of what the peer computes, and a call that times it for so many seconds.

    Args:
      peer: the other process.
      contender: one of `CONTENDERS`.
      axes: the rule.
      prefix: keys that all see.
      arrays: q, k, v and dy, (B, N, H, D) float32.
      mode: "forward" or "gradient".
      check: the error of an output or gradient.

    Raises:
      RuntimeError: with the reason, if it can't compute this.
    """
    tables = {f"{name}{a}": getattr(axis, name) for a, axis in enumerate(axes) for name in ("first", "last")}
    with tempfile.TemporaryDirectory() as folder:
        inputs, outputs = Path(folder) / "in.npz", Path(folder) / "out.npz"
        np.savez(inputs, **arrays, **tables)
        request = {"what": "build", "kind": "sparse", "contender": contender, "mode": mode, "prefix": prefix}
        request |= {"lengths": [axis.first.size for axis in axes], "periods": [axis.period for axis in axes]}
        built = peer.ask(request | {"inputs": str(inputs), "outputs": str(outputs)})
        if "reason" in built:
            raise RuntimeError(built["reason"])
        with np.load(outputs) as found:
            error = max(check(name, found[name]) for name in found.files)
    what = "step" if mode == "gradient" else "forward"
    return error, lambda seconds: peer.ask({"what": what, "seconds": seconds})["seconds"]
