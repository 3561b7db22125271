"""Attention over devices: refusals. What needs several devices is in on_eight_devices/sharded_attention.py."""

import pathlib

import jax
import numpy as np
import pytest

from attnlab.nn.sharded_attention import sharded_attention
from tests.pallas_kernels import eight_devices

ONE = jax.make_mesh((1,), ("seq",), axis_types=(jax.sharding.AxisType.Auto,))


@pytest.mark.slow
def test_on_eight_devices():
    eight_devices.passes(pathlib.Path(__file__).parent / "on_eight_devices" / "sharded_attention.py")


def test_refusals():
    x = np.ones((1, 6, 2, 4), np.float32)
    with pytest.raises(ValueError, match="no 'heads' to cut heads over"):
        sharded_attention(x, x, x, mesh=ONE, head_axis="heads")
    with pytest.raises(ValueError, match="mesh is needed"):
        sharded_attention(x, x, x, head_axis="a", token_axis="b")
    with pytest.raises(ValueError, match="zigzag"):
        sharded_attention(x, x[:, :4], x[:, :4], mesh=ONE, token_axis="seq", order="zigzag")
    two = jax.sharding.AbstractMesh((4,), ("seq",))
    with pytest.raises(ValueError, match="4 devices of 'seq' must divide the tokens"):
        sharded_attention(x, x, x, mesh=two, token_axis="seq")
