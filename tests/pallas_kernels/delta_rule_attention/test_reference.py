"""The specification itself, against a loop in NumPy that follows the other form of the recurrence."""

import jax
import numpy as np
import pytest

from pallas_kernels import delta_rule_attention
from pallas_kernels.delta_rule_attention.cases import REFLECTIONS, SMALL


def loop(q, k, v, beta, log_decay=None, initial_state=None, scale=1.0, segment_ids=None):
    """S = exp(g) (I - β k kᵀ) S + β k vᵀ, one token at a time."""
    (b, n, h, d), (g, e) = q.shape, v.shape[2:]
    y, last = np.zeros((b, n, h, e)), np.zeros((b, h, d, e))
    for i in np.ndindex(b, h):
        state = np.zeros((d, e)) if initial_state is None else initial_state[i]
        head = i[1] // (h // g)
        for t in range(n):
            if segment_ids is not None and t and segment_ids[i[0], t] != segment_ids[i[0], t - 1]:
                state = np.zeros((d, e))
            decay = 0.0 if log_decay is None else log_decay[i[1]] if log_decay.ndim == 1 else log_decay[i[0], t, i[1]]
            key, strength = k[i[0], t, head], beta[i[0], t, i[1]]
            state = np.exp(decay) * (np.eye(d) - strength * np.outer(key, key)) @ state
            state = state + strength * np.outer(key, v[i[0], t, head])
            y[i[0], t, i[1]] = scale * q[i[0], t, i[1]] @ state
        last[i] = state
    return y, last


@pytest.mark.parametrize("case", SMALL + REFLECTIONS, ids=lambda case: case.name)
def test_reference_is_the_definition(case):
    arrays, options = case.arrays()
    with jax.enable_x64(True):
        got = delta_rule_attention(**arrays, **options, return_state=True, implementation="reference")
        for g, w in zip(got, loop(**arrays, **options), strict=True):
            np.testing.assert_allclose(g, w, rtol=1e-9, atol=1e-11)
