"""One sequence over many devices. What needs several devices is in on_eight_devices/sparse_context_parallel.py."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from pallas_kernels import block_sparse_attention
from pallas_kernels.block_masks import Block
from pallas_kernels.block_sparse_attention import context_parallel_attention, zigzag
from pallas_kernels.masks import Causal
from tests.pallas_kernels import eight_devices

X = jnp.sin(jnp.arange(64.0)).reshape(1, 16, 2, 2)
ONE = jax.make_mesh((1,), ("seq",), axis_types=(jax.sharding.AxisType.Auto,))


@pytest.mark.slow
def test_on_several_devices():
    eight_devices.passes(pathlib.Path(__file__).parents[1] / "on_eight_devices" / "sparse_context_parallel.py")


def over_one_device(**options):
    def local(x):
        return context_parallel_attention(x, x, x, "seq", **options)

    return jax.shard_map(local, mesh=ONE, in_specs=P(None, "seq"), out_specs=P(None, "seq"))


@pytest.mark.parametrize("method", ["ring", "all_to_all"])
def test_one_device_is_a_ring_too(method):
    y = over_one_device(method=method, mask=Causal())(X)
    np.testing.assert_allclose(y, block_sparse_attention(X, X, X, mask=Causal()), rtol=1e-5, atol=1e-6)


def test_zigzag_gives_each_device_early_and_late_tokens():
    assert zigzag(8, 2).tolist() == [0, 1, 6, 7, 2, 3, 4, 5]
    with pytest.raises(ValueError, match="multiple of twice the 4 devices, got 12"):
        zigzag(12, 4)


def test_a_ring_refuses_masks_that_are_no_rule_on_positions():
    with pytest.raises(ValueError, match="to be asked of positions, got Block"):
        over_one_device(mask=Block(4))(X)
