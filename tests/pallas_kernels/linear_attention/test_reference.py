"""The specification itself, against loops in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import NormalizedState, linear_attention
from pallas_kernels.linear_attention import api, reference
from pallas_kernels.linear_attention.cases import SMALL


def loop(q, k, v, log_decay=None, initial_state=None, *, causal, normalize, segment_ids=None):
    """The definition, one query, one key at a time."""
    (b, n, h, d), (m, g, e) = q.shape, v.shape[1:]
    y = np.zeros((b, n, h, e))
    last = np.zeros((b, h, d, e)), np.zeros((b, h, d))
    for i in np.ndindex(b, h):
        kv, z = np.zeros((d, e)), np.zeros(d)
        if initial_state is not None:
            kv, z = (initial_state[0][i], initial_state[1][i]) if normalize else (initial_state[i], z)
        head = i[1] // (h // g)
        for t in range(n):
            if causal:
                if segment_ids is not None and t and segment_ids[i[0], t] != segment_ids[i[0], t - 1]:
                    kv, z = np.zeros((d, e)), np.zeros(d)
                decay = (
                    0.0 if log_decay is None else log_decay[i[1]] if log_decay.ndim == 1 else log_decay[i[0], t, i[1]]
                )
                factor = np.broadcast_to(np.exp(decay), (d,))
                kv = factor[:, None] * kv + np.outer(k[i[0], t, head], v[i[0], t, head])
                z = factor * z + k[i[0], t, head]
                read, total = kv, z
            else:
                seen = np.ones(m, bool) if segment_ids is None else segment_ids[1][i[0]] == segment_ids[0][i[0], t]
                read = kv + k[i[0], seen, head].T @ v[i[0], seen, head]
                total = z + k[i[0], seen, head].sum(0)
            query = q[i[0], t, i[1]]
            y[i[0], t, i[1]] = query @ read
            if normalize:
                weight = query @ total
                y[i[0], t, i[1]] = 0 if weight == 0 else y[i[0], t, i[1]] / (weight + np.sign(weight) * 1e-12)
        last[0][i], last[1][i] = read, total
    return y, last


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_reference_is_the_definition(case):
    arrays, options = case.arrays()
    want, (kv, sums) = loop(**arrays, **options)
    stateful = case.causal or not case.segments
    with jax.enable_x64(True):
        got = linear_attention(**arrays, **options, return_state=stateful, implementation="reference")
        y, state = got if stateful else (got, None)
        np.testing.assert_allclose(y, want, rtol=1e-9, atol=1e-11)
        if stateful:
            assert isinstance(state, NormalizedState) == case.normalize
            np.testing.assert_allclose(state.kv if case.normalize else state, kv, rtol=1e-9, atol=1e-11)
            if case.normalize:
                np.testing.assert_allclose(state.k, sums, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("case", [c for c in SMALL if c.causal and c.decay != "channel"], ids=lambda case: case.name)
def test_parallel_form_agrees_with_the_recurrence(case):
    arrays, options = case.arrays()
    arrays.pop("initial_state", None)
    with jax.enable_x64(True):
        args = api.normal_form(**arrays, **options)
        want, _ = reference.run(args)
        got, _ = reference.quadratic(args)
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-11)


def test_parallel_form_refuses_what_it_has_not():
    x = jnp.ones((1, 3, 1, 2))
    with pytest.raises(ValueError, match="takes no initial_state, return_state or log_decay per channel"):
        reference.quadratic(api.normal_form(x, x, x, log_decay=-x))
