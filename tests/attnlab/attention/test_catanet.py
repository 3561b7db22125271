"""CATANet's centres, groups and patches: what is kept, what is seen, and running state."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab.attention.sparse.catanet import (
    IntraGroupAttention,
    assign,
    chunk_means,
    cut_patches,
    join_patches,
    mirrored,
    refine,
)
from attnlab.models.catanet import CATANETS, CATANet, TokenAggregationBlock
from attnlab.models.staged import build_named
from attnlab.training.state import count_parameters

SMALL = {"qk_features": 4, "mlp_features": 4, "num_heads": 2, "num_centres": 3, "group_size": 4}


def tokens(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def test_refined_centres_are_unit_sums_of_their_tokens_and_an_empty_one_keeps_its_direction():
    x, centres = tokens(2, 20, 3), jnp.asarray([[1.0, 0, 0], [0, 1, 0], [-3, -4, 0]])
    x = x.at[..., :2].set(jnp.abs(x[..., :2]))  # none is near the third
    new, labels = refine(x, centres), np.asarray(assign(x, centres))
    unit = np.asarray(x / jnp.linalg.norm(x, axis=-1, keepdims=True))
    want = unit[labels == 0].sum(0)
    np.testing.assert_allclose(new[0], want / np.linalg.norm(want), atol=1e-6)
    np.testing.assert_allclose(new[2], [-0.6, -0.8, 0], atol=1e-6)


def test_first_centres_are_means_of_chunks_with_the_tail_mirrored():
    x = jnp.arange(7.0).reshape(1, 7, 1)
    np.testing.assert_allclose(chunk_means(x, 4)[:, 0], [0.5, 2.5, 4.5, 6.0])
    np.testing.assert_allclose(chunk_means(x[:, :4], 4)[:, 0], [0.5, 2.5, 2.5, 0.5])
    np.testing.assert_array_equal(mirrored(2, 7), [0, 1, 1, 0, 0, 1, 1])


def test_a_token_sees_its_group_and_the_next_of_the_sorted_row():
    layer = IntraGroupAttention(4, num_heads=1, group_size=3, rngs=nnx.Rngs(0))
    x, centres = tokens(1, 12, 4), tokens(2, 1, 4)
    places = np.random.default_rng(0).permutation(12)[None].astype(np.int32)
    first = int(places[0, 0])
    seen = jax.jit(jax.grad(lambda x: layer(x, places, centres, centres)[0, first].sum()))(x)
    assert set(np.flatnonzero(np.asarray(seen)[0].any(-1))) == set(places[0, :6].tolist())


@pytest.mark.parametrize(("grid", "size"), [((8, 10), 6), ((6, 6), 6), ((5, 13), 8), ((14, 8), 5)])
def test_patches_are_joined_to_what_they_were_cut_from(grid, size):
    x = tokens(2, *grid, 3)
    np.testing.assert_allclose(join_patches(cut_patches(x, size), grid, size), x, atol=1e-6)


def test_centres_are_running_means_of_training_alone():
    block, x = TokenAggregationBlock(4, **SMALL, decay=0.9, rngs=nnx.Rngs(0)), tokens(2, 3, 4, 4)
    drawn, train = np.asarray(block.centres[...]), nnx.jit(lambda block, x: block(x, deterministic=False))
    nnx.jit(lambda block, x: block(x))(block, x)
    assert not block.ready[...] and np.array_equal(block.centres[...], drawn)
    train(block, x)
    first = np.asarray(block.centres[...])
    assert block.ready[...] and np.abs(np.linalg.norm(first, axis=-1) - 1).max() < 1e-5
    train(block, -x)
    assert 0 < np.abs(block.centres[...] - first).max() <= 0.1 * 2 + 1e-6


@pytest.mark.parametrize("count", range(1, 9))
def test_any_number_of_tokens_is_cut_into_groups(count):
    layer = IntraGroupAttention(4, num_heads=1, group_size=4, rngs=nnx.Rngs(0))
    centres = tokens(2, 1, 4)
    x, places = jax.ShapeDtypeStruct((1, count, 4), jnp.float32), np.arange(count, dtype=np.int32)[None]
    assert jax.eval_shape(lambda x: layer(x, places, centres, centres), x).shape == x.shape


@pytest.mark.parametrize(
    ("name", "thousands"),
    [("catanet_x2", 477), *(pytest.param(f"catanet_x{f}", n, marks=pytest.mark.slow) for f, n in ((3, 550), (4, 535)))],
)
def test_sizes_are_those_of_the_paper(name, thousands):
    model = nnx.eval_shape(lambda: build_named(CATANETS, name, rngs=nnx.Rngs(0)))
    assert abs(count_parameters(nnx.state(model, nnx.Param)) / 1000 - thousands) < 1


def test_refusals():
    with pytest.raises(ValueError, match="upscale must be from 1 to 4"):
        CATANet(upscale=5, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="first must be one of data, random"):
        TokenAggregationBlock(4, **SMALL, first="zeros", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="group_size must have one entry"):
        CATANet(group_size=(3,), rngs=nnx.Rngs(0))
