"""Sparse query attention: its sizes, and rotation of queries alone as the authors' code has it."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab.attention.dense.sqa import SparseQueryAttention
from attnlab.interop.sqa import OFFICIAL
from tests.accuracy import relative_rms


def test_sizes_follow_from_the_nominal_heads():
    mixer = SparseQueryAttention(32, num_heads=8, num_kv_heads=2, rngs=nnx.Rngs(0))
    assert mixer.query.kernel.shape == (32, 4, 4) and mixer.out.kernel.shape == (4, 4, 32)
    assert mixer.key.kernel.shape == (32, 2, 4) and mixer.query.bias is None and mixer.out.bias is not None
    assert SparseQueryAttention(32, num_heads=8, rngs=nnx.Rngs(0)).sizes == (4, 4, 4)
    for sizes in ({"num_heads": 5}, {"num_heads": 8, "num_query_heads": 9}, {"num_heads": 8, "num_kv_heads": 3}):
        with pytest.raises(ValueError, match="num_heads"):
            SparseQueryAttention(32, **sizes, rngs=nnx.Rngs(0))


def test_queries_alone_rotated():
    """Rotated queries come out with the first members of all pairs in front, against keys that were not touched."""
    config = {"embed_dim": 24, "num_heads": 6, "num_query_groups": 3, "num_groups": 1, "rope": True}
    mixer = OFFICIAL[0].build(config | {"rope_only_for_query": True, "is_causal": True})
    x = np.random.default_rng(0).normal(size=(1, 5, 24))
    q, k, v = (np.einsum("bnc,chd->bnhd", x, getattr(mixer, part).kernel[...]) for part in ("query", "key", "value"))
    turned = (q[..., 0::2] + 1j * q[..., 1::2]) * np.exp(1j * np.outer(np.arange(5), [1, 0.01]))[:, None]
    scores = np.einsum("bnhd,bmd->bhnm", np.concatenate([turned.real, turned.imag], -1), k[:, :, 0]) / 2
    weights = np.exp(scores) * np.tri(5)
    y = np.einsum("bhnm,bme->bnhe", weights / weights.sum(-1, keepdims=True), v[:, :, 0])
    want = np.einsum("bnhe,hec->bnc", y, mixer.out.kernel[...])
    assert relative_rms(mixer(jnp.asarray(x, jnp.float32)), want) < 1e-6
