"""Which keys a query sees along one axis: the definition that every implementation shares.

With dilation d, positions fall into d groups that do not see each other: position x has the group g = x mod d and the
coordinate i = x // d in it; the group has L = ⌈(X - g) / d⌉ positions. Queries come in runs of s (the stride) that
follow one leader. In coordinates of the group the window of i is a run of keys, `first` to `last`:

    not causal   leader ℓ = min(⌊i/s⌋ s + ⌊s/2⌋, L - 1)
                 centre c = clamp(ℓ, ⌊k/2⌋, L - 1 - R),  R = ⌊k/2⌋ + k mod 2 - 1
                 first = c - ⌊k/2⌋,  last = c + R            always k keys: at a border the window is shifted
    causal       leader ℓ = min(⌊i/s⌋ s + s - 1, L - 1)
                 first = max(ℓ - k + 1, 0),  last = i        1 to k keys

Source: arXiv:2403.04690 and, for the stride, arXiv:2504.16922; code SHI-Labs/NATTEN.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.masks import EMPTY, FULL, UNKNOWN, Index, Interval, Mask


@dataclasses.dataclass(frozen=True)
class Window(Mask):
    """The window along one axis, as a mask on positions of that axis.

    Attributes:
      length: X, positions of the axis.
      kernel_size: k, keys of a window.
      stride: s, queries that share a window; at most k.
      dilation: d, distance between the keys of a window; k·d is at most X.
      is_causal: whether keys behind the query are left out.

    Raises:
      ValueError: for sizes out of range; the message names the argument.
    """

    length: int
    kernel_size: int
    stride: int = 1
    dilation: int = 1
    is_causal: bool = False

    def __post_init__(self) -> None:
        for name in ("kernel_size", "stride", "dilation"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.stride > self.kernel_size:
            raise ValueError(f"stride must be at most kernel_size = {self.kernel_size}, got {self.stride}")
        if self.kernel_size * self.dilation > self.length:
            raise ValueError(
                f"kernel_size * dilation must be at most the length of the axis, {self.length}, "
                f"got {self.kernel_size} * {self.dilation}"
            )

    @property
    def group_length(self) -> int:
        """Positions of the longest dilation group, ⌈X / d⌉."""
        return -(-self.length // self.dilation)

    @property
    def covers(self) -> bool:
        """Whether every query sees the whole axis."""
        return self.kernel_size == self.length and not self.is_causal

    def bounds(self, i: Index, length: Index | int) -> tuple[Index, Index]:
        """First and last key of query `i`, both included, in coordinates of a group of `length` positions."""
        lib = jnp if isinstance(i, jax.Array) or isinstance(length, jax.Array) else np
        run = i // self.stride * self.stride
        if self.is_causal:
            leader = lib.minimum(run + self.stride - 1, length - 1)
            return lib.maximum(leader - self.kernel_size + 1, 0), i
        left = self.kernel_size // 2
        right = left + self.kernel_size % 2 - 1
        leader = lib.minimum(run + self.stride // 2, length - 1)
        centre = lib.minimum(lib.maximum(leader, left), length - 1 - right)
        return centre - left, centre + right

    def __call__(self, q_idx: Index, k_idx: Index) -> Index:
        group = q_idx % self.dilation
        first, last = self.bounds(q_idx // self.dilation, (self.length - group + self.dilation - 1) // self.dilation)
        j = k_idx // self.dilation
        return (k_idx % self.dilation == group) & (j >= first) & (j <= last)

    def judge(self, q: Interval, k: Interval) -> np.ndarray:
        # Both bounds grow with the query and with the length of the group, which is one of two.
        q, k = (Interval(x.lo // self.dilation, x.hi // self.dilation) for x in (q, k))
        first, _ = self.bounds(q.lo, self.length // self.dilation)
        _, last = self.bounds(q.hi, self.group_length)
        verdict = np.where((k.hi < first) | (k.lo > last), EMPTY, UNKNOWN)
        if self.dilation == 1:
            inside = (k.lo >= self.bounds(q.hi, self.length)[0]) & (k.hi <= self.bounds(q.lo, self.length)[1])
            verdict = np.where(inside, FULL, verdict)
        return verdict.astype(np.int8)

    def table(self) -> tuple[np.ndarray, np.ndarray]:
        """Bounds of all queries, (d, ⌈X / d⌉) each; a coordinate that its group does not have sees nothing: (0, -1)."""
        group = np.arange(self.dilation)[:, None]
        i = np.arange(self.group_length)
        length = (self.length - group + self.dilation - 1) // self.dilation
        first, last = self.bounds(i + 0 * group, length)
        return np.where(i < length, first, 0), np.where(i < length, last, -1)
