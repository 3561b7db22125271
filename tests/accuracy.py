"""The measure of error of all tests."""

import numpy as np
from numpy.typing import ArrayLike


def relative_rms(got: ArrayLike, want: ArrayLike) -> float:
    """RMS of the difference, in float64, over that of what is wanted, or itself where that is 0."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, f"shape {got.shape} for {want.shape}"
    scale = np.sqrt(np.mean(want**2))
    return float(np.sqrt(np.mean((got - want) ** 2)) / (scale or 1.0))
