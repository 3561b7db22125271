"""ContMix: kernels from the context, small maps, the merged convolution, sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab.mixers.overlock import ContextMixing, DynamicKernels, offset_bias
from attnlab.models.overlock import OVERLOCKS, DynamicConvBlock, RepConvBlock
from attnlab.models.staged import build_named
from attnlab.nn.norms import ResponseNorm
from attnlab.nn.reparam import BRANCHES, DilatedReparamConv, large_depthwise_conv, merged_branches
from attnlab.training.state import count_parameters
from tests.accuracy import relative_rms


def image(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def moved(module: nnx.Module) -> nnx.Module:
    """With statistics of norms as after a training."""
    rng = np.random.default_rng(0)
    for _, part in nnx.iter_modules(module):
        if isinstance(part, nnx.BatchNorm):
            part.mean[...] = jnp.asarray(rng.normal(size=part.mean.shape), jnp.float32)
            part.var[...] = jnp.asarray(rng.uniform(0.5, 2, part.var.shape), jnp.float32)
            part.scale[...] = jnp.asarray(rng.normal(size=part.scale.shape), jnp.float32)
            part.bias[...] = jnp.asarray(rng.normal(size=part.bias.shape), jnp.float32)
    return module


def test_bias_is_that_of_the_offset_also_at_borders():
    table = jnp.arange(25.0).reshape(1, 5, 5)
    bias = np.asarray(offset_bias(table, (4, 5), 3)).reshape(4, 5, 3, 3)
    np.testing.assert_array_equal(bias[1, 2], np.arange(25).reshape(5, 5)[1:4, 1:4])
    np.testing.assert_array_equal(bias[0, 4], np.arange(25).reshape(5, 5)[2:5, 0:3])


def test_kernels_are_averages_and_follow_the_whole_image():
    mixer = ContextMixing(8, num_groups=2, kernel_size=5, small_size=3, rngs=nnx.Rngs(0))
    x = image(1, 9, 9, 8)
    small, large = jax.jit(lambda x: mixer.kernels.kernels(x, x))(x)
    assert small.shape == (1, 9, 9, 2, 9) and large.shape == (1, 9, 9, 2, 25)
    np.testing.assert_allclose(large.sum(-1), 1, atol=1e-5)
    seen = np.asarray(jax.jit(jax.grad(lambda x: jnp.square(mixer(x)[0, 0, 0]).sum()))(x))[0].any(-1)
    assert seen.all(), "the context reaches a kernel from everywhere"


def test_maps_below_the_kernel_are_enlarged():
    kernels = DynamicKernels(8, 8, num_groups=2, kernel_size=7, small_size=3, rngs=nnx.Rngs(0))
    assert [kernels.enlarged(grid) for grid in ((7, 9), (5, 6), (6, 5), (3, 3))] == [(7, 9), (7, 8), (8, 7), (7, 7)]
    with pytest.raises(ValueError, match="2 num_groups must divide"):
        DynamicKernels(8, 8, num_groups=3, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="must be odd"):
        DynamicKernels(8, 8, num_groups=2, kernel_size=4, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("side", [7, 9])
def test_branches_merge_into_one_kernel(side):
    layer, x = moved(DilatedReparamConv(4, side, rngs=nnx.Rngs(0))), image(1, 11, 10, 4)
    apart = sum(part(x) for part in (layer.large, *layer.branches))
    assert relative_rms(layer(x), apart) < 1e-6 and relative_rms(layer.merge()(x), apart) < 1e-6
    assert all(dilation * (k - 1) + 1 <= side for k, dilation in BRANCHES[side])


def test_rows_of_a_large_kernel_are_the_kernel():
    kernel, x = image(11, 11, 3), image(2, 6, 13, 3, seed=1)
    whole = jax.lax.conv_general_dilated(
        x, kernel[:, :, None], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=3
    )
    assert relative_rms(large_depthwise_conv(x, kernel), whole) < 1e-5


def test_a_model_is_merged_for_inference():
    block, x = moved(RepConvBlock(8, kernel_size=5, mlp_ratio=1.0, rngs=nnx.Rngs(0))), image(1, 6, 7, 8)
    merged = merged_branches(block)
    assert merged.large.merged and not block.large.merged
    assert relative_rms(merged(x), block(x)) < 1e-5


def test_the_response_norm_scales_a_channel_by_its_share():
    norm, x = ResponseNorm(3, rngs=nnx.Rngs(0)), image(1, 2, 2, 3)
    np.testing.assert_array_equal(norm(x), x)
    norm.scale[...] = jnp.ones(3)
    length = np.linalg.norm(np.asarray(x).reshape(4, 3), axis=0)
    np.testing.assert_allclose(norm(x), x * (1 + length / length.mean()), rtol=1e-5)


def test_maps_of_a_dynamic_block_are_of_one_grid():
    block = DynamicConvBlock(8, 8, kernel_size=5, small_size=3, num_heads=1, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="of the grid"):
        block(image(1, 5, 5, 8), image(1, 5, 4, 2), image(1, 5, 5, 2))


@pytest.mark.slow
def test_the_smallest_model_has_the_size_of_the_paper():
    """Of the model at inference, its large convolutions merged and without the second head."""
    options = {"merged": True, "auxiliary": False}
    model = nnx.eval_shape(lambda: build_named(OVERLOCKS, "overlock_xt", **options, rngs=nnx.Rngs(0)))
    assert abs(count_parameters(nnx.state(model, nnx.Param)) / 1e6 - 16.45) < 0.01
