"""The specification itself, against a loop in NumPy."""

import jax
import numpy as np
import pytest

from pallas_kernels import selective_scan
from pallas_kernels.selective_scan.cases import SMALL


def loop(
    x, delta, a, b, c, skip=None, gate=None, delta_bias=None, softplus=False, initial_state=None, segment_ids=None
):
    """One number of one state at a time."""
    batch, n, channels = x.shape
    b, c = (each[:, :, None] if each.ndim == 3 else each for each in (b, c))
    share, states = channels // b.shape[2], np.zeros((batch, n, channels, a.shape[1]))
    step = delta if delta_bias is None else delta + delta_bias
    step = np.logaddexp(0, step) if softplus else step
    y = np.zeros_like(x)
    for i, t, j in np.ndindex(batch, n, channels):
        before = states[i, t - 1, j] if t else np.zeros(a.shape[1]) if initial_state is None else initial_state[i, j]
        if segment_ids is not None and t and segment_ids[i, t] != segment_ids[i, t - 1]:
            before = np.zeros(a.shape[1])
        states[i, t, j] = np.exp(step[i, t, j] * a[j]) * before + step[i, t, j] * x[i, t, j] * b[i, t, j // share]
        y[i, t, j] = c[i, t, j // share] @ states[i, t, j]
    y = y if skip is None else y + skip * x
    return y if gate is None else y * gate / (1 + np.exp(-gate)), states[:, -1], states


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_reference_is_the_definition(case):
    arrays, options = case.arrays()
    with jax.enable_x64(True):
        want = loop(**arrays, **options)
        got = selective_scan(**arrays, **options, return_state=True, implementation="reference")
        for g, w in zip(got, want[:2], strict=True):
            np.testing.assert_allclose(g, w, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["grouped_130", "packed_150"])
def test_all_states_are_those_of_the_definition(name):
    arrays, options = next(case for case in SMALL if case.name == name).arrays()
    with jax.enable_x64(True):
        got = selective_scan(**arrays, **options, return_state=True, return_states=True)
        for g, w in zip(got, loop(**arrays, **options), strict=True):
            np.testing.assert_allclose(g, w, rtol=1e-9, atol=1e-11)
