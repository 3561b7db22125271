"""How large a decode state is: bytes that each token costs, and bytes at any length.

Measured from shapes alone, at two lengths, for a mixer or a model of mixers.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

LENGTHS = (1024, 65536)


class DecodeSize(NamedTuple):
    """The size of a decode state of one sequence.

    Attributes:
      per_token: bytes of caches for each token of the greatest length.
      fixed: bytes beside them, such as recurrent states and windows.
    """

    per_token: float
    fixed: float

    def __str__(self) -> str:
        parts = [
            f"{self.per_token:,.0f} bytes a token" if self.per_token else "",
            f"{self.fixed:,.0f} bytes" if self.fixed or not self.per_token else "",
        ]
        return " and ".join(part for part in parts if part)


def state_bytes(init_state: Callable[[int], Any], length: int) -> int:
    """Bytes of what `init_state(length)` returns, the state for so many tokens; nothing is computed."""
    state = jax.eval_shape(lambda: init_state(length))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def decode_size(init_state: Callable[[int], Any], lengths: Sequence[int] = LENGTHS) -> DecodeSize:
    """The line through the sizes at two lengths.

    Args:
      init_state: from the greatest number of tokens to the state of one sequence.
      lengths: two of them, rising; longer than windows, which do not grow beyond their size.
    """
    short, long = (state_bytes(init_state, length) for length in lengths)
    per_token = (long - short) / (lengths[1] - lengths[0])
    return DecodeSize(per_token, short - per_token * lengths[0])
