"""Block and grid attention: which tokens see each other."""

import jax
import numpy as np
import pytest
from flax import nnx

from attnlab.attention.local.maxvit import PartitionAttention


def attention_map(mixer, x):
    _, found = nnx.capture(mixer, nnx.Intermediate)(x)
    return found["attention"][0]


def test_both_attentions_together_reach_the_whole_image():
    x = jax.random.normal(jax.random.key(0), (1, 16, 16, 8))
    block, grid = (
        np.asarray(
            attention_map(PartitionAttention(8, num_heads=1, partition=kind, window=4, rngs=nnx.Rngs(0)), x)
        )[0].any(0)
        for kind in ("block", "grid")
    )  # fmt: skip
    assert (block.sum(1) == 16).all() and (grid.sum(1) == 16).all()
    assert (grid.astype(int) @ block > 0).all()
    rows, columns = np.divmod(np.arange(256), 16)
    assert (grid == ((rows % 4 == (rows % 4)[:, None]) & (columns % 4 == (columns % 4)[:, None]))).all()


def test_refusals():
    with pytest.raises(ValueError, match="partition must be block or grid"):
        PartitionAttention(8, num_heads=1, partition="tile", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="do not tile a grid"):
        PartitionAttention(8, num_heads=1, window=(3, 4), grid=(8, 8), rngs=nnx.Rngs(0))
