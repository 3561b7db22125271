"""A2Mamba: its mixers' identities and refusals, and the sizes of its models."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab.attention.local.a2mamba import AttentionAugmentedScan, Maps, NeighborhoodScanAttention
from attnlab.models.a2mamba import A2MAMBAS, A2Mamba
from attnlab.models.staged import build_named
from tests.accuracy import relative_rms

# As the authors' classes have them. Their table rounds to 4, 15, 31, 51 and 95 millions.
SIZES = {
    "a2mamba_nano": 4_195_052,
    "a2mamba_tiny": 15_365_506,
    "a2mamba_small": 30_672_834,
    "a2mamba_base": 51_134_464,
    "a2mamba_large": 93_737_376,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SIZES)
def test_named_models_have_their_size(name):
    model = nnx.eval_shape(lambda: build_named(A2MAMBAS, name, rngs=nnx.Rngs(0)))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))) == SIZES[name]


def test_maps_of_one_token_and_no_mixing_of_heads_leave_the_states():
    scan = AttentionAugmentedScan(8, fused_heads=2, rngs=nnx.Rngs(0))
    scan.fusion.kernel[...], scan.fusion.bias[...] = jnp.eye(2), jnp.zeros(2)
    x, q, k = np.random.default_rng(0).standard_normal((3, 1, 4, 5, 8)).astype(np.float32)
    maps = Maps(q.reshape(1, 4, 5, 2, 4), k.reshape(1, 4, 5, 2, 4), 1, (1, 1), None)
    got, want = jax.jit(lambda x: (scan.augmented(x, maps), scan(x)))(x)
    assert relative_rms(got, want) < 1e-6


@pytest.mark.slow
def test_a_state_reads_what_is_ahead_through_its_neighbours():
    mixer = NeighborhoodScanAttention(8, num_heads=2, kernel_size=3, rngs=nnx.Rngs(0))
    x = np.random.default_rng(1).standard_normal((1, 7, 7, 8)).astype(np.float32)
    gradient = jax.jit(jax.grad(lambda x: mixer(x)[0, 0, 0].sum()))(x)
    assert np.all(np.abs(gradient[0]).sum(-1)[:3, :3] > 0)


def test_refusals():
    for options, message in (
        ({"num_heads": 1}, "num_heads must be even and divide the 8 channels, got 1"),
        ({"num_heads": 2, "kernel_size": 4}, "kernel_size must be odd, got 4"),
        ({"num_heads": 2, "grid": (5, 7)}, r"kernel_size 7 at dilation 1 must fit the image of \(5, 7\) tokens"),
        ({"num_heads": 2, "whole": True}, "a bias of pairs of tokens is for one grid"),
    ):
        with pytest.raises(ValueError, match=message):
            NeighborhoodScanAttention(8, **options, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="kinds must be some of scan, whole"):
        A2Mamba(kinds=("scan",) * 3 + ("global",), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="fused_heads must be even"):
        AttentionAugmentedScan(8, fused_heads=3, rngs=nnx.Rngs(0))
