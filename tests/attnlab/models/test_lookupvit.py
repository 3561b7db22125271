"""LookupViT: the identities that the paper states, its cost, and sizes; there is no code of the authors to compare."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab.attention.cross.lookupvit import LookupAttention
from attnlab.models.deit import DeiT
from attnlab.models.lookupvit import LOOKUPVITS, LookupBlock, LookupViT
from attnlab.models.staged import build_named
from tests.accuracy import relative_rms

SMALL = {"features": 8, "num_heads": 2, "depth": 1, "p": 1.0, "image_size": 32, "patch_size": 8, "num_classes": 3}


def draw(*shape):
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n == "lookupvit_tiny" else pytest.mark.slow) for n in LOOKUPVITS]
)
def test_sizes_are_the_sum_of_the_maps(name):
    width = LOOKUPVITS[name][1].get("features", 192)

    def parameters(depth):
        model = nnx.eval_shape(lambda: build_named(LOOKUPVITS, name, depth=depth, rngs=nnx.Rngs(0)))
        return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))

    one, two = parameters(1), parameters(2)
    # gathering 4, infusion 2, refinement 4 + 8, the lookup tokens' feed-forward 1; biases; six norms.
    block = 19 * width**2 + (4 + 2 + 4) * width + 5 * width + width // 2 + width + 12 * width
    outside = (3 * 256 + 1) * width + (196 + 25) * width + 2 * width + 1000 * (width + 1)
    assert two - one == block and one == block + outside


def test_the_map_is_read_both_ways_as_it_is():
    """Rows sum to 1; what is given back goes along the same map, or along its scores normalised over the few."""
    few, many, later = draw(2, 3, 8), draw(2, 7, 8), draw(2, 3, 8)
    module = LookupAttention(8, num_heads=2, rngs=nnx.Rngs(0))
    gathered, ways = module.gather(few, many)
    weights = np.asarray(ways.all_weights(), np.float64)
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-6)
    q, k = (np.asarray(a, np.float64) for a in (module.query(few), module.key(many)))
    scores = np.einsum("bmhd,bnhd->bhmn", q, k) / 2
    want = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    assert relative_rms(weights, want) < 1e-6
    np.testing.assert_allclose(
        gathered, module.out(jnp.einsum("bhmn,bnhd->bmhd", want.astype(np.float32), module.value(many))), atol=1e-5
    )
    value = module.back_value(later)
    for renorm, backwards in (("none", want), ("softmax", np.exp(scores) / np.exp(scores).sum(2, keepdims=True))):
        module.renorm = renorm
        infused = jnp.einsum("bhmn,bmhd->bnhd", backwards.astype(np.float32), value)
        np.testing.assert_allclose(module.infuse(later, ways), module.back_out(infused), atol=1e-5)


def test_lookup_tokens_are_a_set_and_equal_ones_are_told_the_same():
    block = LookupBlock(8, num_heads=2, p=1.0, rngs=nnx.Rngs(0))
    run = jax.jit(lambda p, l: block(p, l))
    few, many, order = draw(1, 3, 8), draw(1, 7, 8), np.array([3, 0, 6, 5, 1, 2, 4])
    compressed, lookup = run(few, many)
    permuted = run(few, many[:, order])
    np.testing.assert_allclose(permuted.compressed, compressed, atol=1e-5)
    np.testing.assert_allclose(permuted.lookup, lookup[:, order], atol=1e-5)
    same = run(few, np.broadcast_to(many[:, :1], many.shape)).lookup
    np.testing.assert_allclose(same, np.broadcast_to(same[:, :1], same.shape), atol=1e-5)
    with pytest.raises(ValueError, match=r"compressed must be \(B, M, C\)"):
        block(few, many[..., :4])


def test_the_kernel_gives_the_same_without_a_map():
    few, many = draw(2, 3, 8), draw(2, 7, 8)
    graph, state = nnx.split(LookupBlock(8, num_heads=2, p=1.0, rngs=nnx.Rngs(0)))

    def loss(state, kernel):
        block = nnx.merge(graph, state)
        block.attention.kernel = kernel
        compressed, lookup = block(few, many)
        return jnp.sin(compressed).sum() + jnp.sin(lookup).sum()

    run = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    dense, kernel = (np.concatenate([np.ravel(a) for a in jax.tree.leaves(run(state, k))]) for k in (None, "auto"))
    assert relative_rms(kernel, dense) < 2e-6


def test_half_the_work_of_a_vit_of_the_same_width():
    """At 196 patches and 25 compressed tokens, counted in the programs of one block more; without compiling them."""

    def operations(depth, family, **sizes):
        model = nnx.eval_shape(lambda: family(depth=depth, num_classes=None, **sizes, rngs=nnx.Rngs(0)))
        graph, state = nnx.split(model)
        images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
        program = jax.jit(lambda state, x: nnx.merge(graph, state)(x)).lower(state, images)
        return program.cost_analysis()["flops"]

    ours, vit = (operations(2, family) - operations(1, family) for family in (LookupViT, DeiT))
    assert 0.3 < ours / vit <= 0.5


def test_a_call_chooses_the_compressed_grid():
    model = LookupViT(**SMALL, compressed_grid=(2, 2), rngs=nnx.Rngs(0))
    images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    for grid, tokens in ((None, 4), ((3, 1), 3), ((4, 4), 16)):
        assert nnx.eval_shape(lambda m, x, g=grid: m.tokens(x, compressed_grid=g), model, images).shape == (
            2,
            tokens,
            8,
        )
        assert nnx.eval_shape(lambda m, x, g=grid: m(x, compressed_grid=g), model, images).shape == (2, 3)
    larger = jax.ShapeDtypeStruct((2, 48, 32, 3), jnp.float32)
    assert nnx.eval_shape(lambda m, x: m.stages(x), model, larger)[0].shape == (2, 6, 4, 8)
    with pytest.raises(ValueError, match="compressed_grid must be rows and columns"):
        nnx.eval_shape(lambda m, x: m(x, compressed_grid=(0, 2)), model, images)
    with pytest.raises(ValueError, match="renorm must be"):
        LookupViT(**SMALL, renorm="mean", rngs=nnx.Rngs(0))
