"""Packed segments whose ids come back, are hashes of 64 bits, or of another type than integers."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import attnlab
from attnlab.contract import Site, UnsupportedArgument, View
from attnlab.nn.masking import segment_orders
from attnlab.nn.softmax import softmax_attention
from pallas_kernels.masks import Causal
from tests.accuracy import relative_rms

RNG = np.random.default_rng(0)
Q, K, V = (jnp.asarray(RNG.normal(size=(1, 6, 1, 4)), jnp.float32) for _ in range(3))
RETURNS = np.array([[1, 1, 2, 2, 1, 1]])


@pytest.mark.parametrize("block_size", [None, 4])
def test_a_segment_that_comes_back_is_another(block_size):
    got = softmax_attention(Q, K, V, segment_ids=RETURNS, causal=True, block_size=block_size)
    parts = (slice(0, 2), slice(2, 4), slice(4, 6))
    want = [softmax_attention(Q[:, part], K[:, part], V[:, part], causal=True) for part in parts]
    assert relative_rms(got, np.concatenate(want, axis=1)) < 1e-6


def test_a_pair_of_ids_tells_segments_by_their_ids():
    keys = np.array([[2, 1, 2, 1, 1, 2]])
    got = softmax_attention(Q, K, V, segment_ids=(RETURNS, keys))
    for one in (1, 2):
        rows, columns = RETURNS[0] == one, keys[0] == one
        want = softmax_attention(Q[:, rows], K[:, columns], V[:, columns])
        assert relative_rms(got[:, rows], want) < 1e-6
    q_order, k_order = segment_orders((RETURNS, keys))
    assert q_order.tolist() == [[0, 1, 0, 1, 2, 3]]
    assert k_order.tolist() == [[0, 0, 1, 1, 2, 2]]


@pytest.mark.parametrize("name", ["softmax_attention", "hedgehog"])
def test_ids_of_64_bits(name):
    mixer = attnlab.create(name, Site(8, 2, causal=True), rngs=nnx.Rngs(0))
    x = RNG.normal(size=(1, 8, 8)).astype(np.float32)
    ids = np.repeat([[0, 2**32]], 4, axis=1)
    assert relative_rms(mixer(x, segment_ids=ids)[:, 4:], mixer(x[:, 4:])) < 1e-5
    if "positions" in mixer.accepts:
        with pytest.raises(ValueError, match="positions must fit int32"):
            mixer(x, positions=np.arange(8)[None] + 2**32)


@pytest.mark.parametrize("name", ["softmax_attention", "hedgehog"])
def test_views_are_taken_whole_or_refused(name):
    mixer = attnlab.create(name, Site(8, 2, causal=True), rngs=nnx.Rngs(0))
    x = RNG.normal(size=(1, 4, 8)).astype(np.float32)
    order = np.arange(4)[None]
    with pytest.raises(UnsupportedArgument, match="segment_ids"):
        mixer.prefill(x, mixer.init_state(1, 8), mask=View(segment_ids=order))
    with pytest.raises(UnsupportedArgument, match="q_idx"):
        mixer.prefill(x, mixer.init_state(1, 8), mask=View(q_idx=order))
    if "rule" in mixer.accepts:
        with pytest.raises(ValueError, match="q_labels must be integers"):
            mixer(x, mask=View(rule=Causal(), q_labels=order.astype(np.float32)))
    else:
        with pytest.raises(UnsupportedArgument, match="q_idx"):
            mixer(x, mask=View(q_idx=order))
