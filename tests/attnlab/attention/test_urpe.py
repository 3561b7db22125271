"""What universal relative position attention is for: telling the tokens of a constant sequence apart."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab.attention.dense.urpe import SignedBuckets, UniversalAttention
from attnlab.nn.position_bias import OffsetTable


def test_a_factor_tells_equal_tokens_apart_and_a_bias_alone_does_not():
    x = jnp.ones((1, 6, 8)) * jnp.arange(8.0)
    apart = {}
    for factor in (False, True):
        mixer = UniversalAttention(8, num_heads=2, max_length=6, factor=factor, constant_factor=False, rngs=nnx.Rngs(0))
        for table in (part for _, part in nnx.iter_modules(mixer) if isinstance(part, OffsetTable)):
            table.table[...] = 50 * table.table[...]
        apart[factor] = float(jnp.std(mixer(x), axis=1).max())
    assert apart[False] < 1e-6 < 0.1 < apart[True]


def test_offsets_beyond_the_longest_sequence_share_the_outermost_row():
    buckets = SignedBuckets(num_buckets=16, max_distance=24, max_length=32)
    rows = np.asarray(buckets(jnp.arange(-40, 41)))
    assert rows[0] == rows[9] == 0 and rows[-1] == rows[-10] == buckets.rows - 1
    assert (np.diff(rows) >= 0).all()


@pytest.mark.parametrize("options", [{"num_buckets": 7}, {"num_buckets": 2}, {"num_buckets": 64, "max_distance": 16}])
def test_buckets_that_leave_nothing_are_refused(options):
    with pytest.raises(ValueError, match="num_buckets"):
        SignedBuckets(**options)
