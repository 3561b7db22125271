"""Prefix scans: equality with loops, restarts at segments, padding, and in parts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.nn.prefix_scans import NOTHING, prefix_logsumexp, prefix_max, prefix_sum, segment_logsumexp

SCANS = {prefix_sum: np.add, prefix_max: np.maximum, prefix_logsumexp: np.logaddexp}
X = np.random.default_rng(0).normal(size=(2, 9, 3)).astype(np.float32)
IDS = np.array([[3, 3, 3, 5, 5, 5, 5, 1, 1], [2, 7, 7, 7, 7, 7, 7, 7, 7]])


@pytest.mark.parametrize("scan", SCANS, ids=lambda scan: scan.__name__)
def test_equals_a_loop_that_restarts_and_goes_on(scan):
    want = X.astype(np.float64)
    for row, ids in zip(want, IDS, strict=True):
        for t in range(1, 9):
            if ids[t] == ids[t - 1]:
                row[t] = SCANS[scan](row[t - 1], row[t])
    np.testing.assert_allclose(scan(X, segment_ids=IDS), want, atol=1e-5)
    whole = scan(X)
    np.testing.assert_allclose(whole, SCANS[scan].accumulate(X.astype(np.float64), axis=1), atol=1e-5)
    np.testing.assert_allclose(scan(X[:, 4:], initial=whole[:, 3]), whole[:, 4:], atol=1e-5)
    assert scan(X.astype(jnp.bfloat16)).dtype == jnp.float32


@pytest.mark.parametrize("ids", [None, IDS])
def test_logsumexp_of_segments_counts_real_tokens_alone(ids):
    real = np.arange(9) % 4 != 0
    real = np.stack([real, np.zeros(9, bool)])
    total = np.broadcast_to(segment_logsumexp(X, real=real, segment_ids=ids), X.shape)
    for t in range(9):
        same = real[0] & (True if ids is None else ids[0] == ids[0, t])
        np.testing.assert_allclose(total[0, t], np.log(np.exp(X[0, same]).sum(0)), atol=1e-5)
    assert (total[1] < NOTHING / 2).all()
    for function in (segment_logsumexp, prefix_logsumexp):
        gradient = jax.grad(lambda x, f=function: f(x, real=real, segment_ids=ids).clip(-9).sum())(X)
        assert jnp.isfinite(gradient).all() and not gradient[~real].any()
