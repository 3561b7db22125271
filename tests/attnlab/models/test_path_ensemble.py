"""Path ensembles: the paths' sum, pruning and factors on the ensemble alone, and what removing paths costs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab.analysis.path_ensemble import pruning_curve, removals, residual_paths
from attnlab.contract import Site, UnsupportedArgument
from attnlab.models.block import block_for
from attnlab.models.path_ensemble import PathEnsemble, PathEnsembleViT, with_mask
from attnlab.models.vit import ViT
from attnlab.nn.mlp import LayerScale
from attnlab.objectives.exits import prefix_distillation
from tests.accuracy import relative_rms

SIZES = {"features": 8, "num_heads": 2, "depth": 2, "patch_size": 8, "mlp_ratio": 1.0, "pooling": "cls"}


def draw(*shape):
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def ensemble_of(**options):
    return PathEnsembleViT((16, 16), 3, **SIZES, **options, rngs=nnx.Rngs(0))


def test_paths_of_causal_and_scaled_blocks_sum_to_their_output():
    site = Site(8, 2, causal=True)
    blocks = [block_for(site, mixer=name, rngs=nnx.Rngs(i)) for i, name in enumerate(("softmax_attention", "hedgehog"))]
    blocks[0].scale1 = LayerScale(8, init=0.3, rngs=nnx.Rngs(0))
    x = draw(2, 6, 8)
    paths = residual_paths(blocks, x)
    assert paths.shape == (5, 2, 6, 8)
    assert relative_rms(paths.sum(0), blocks[1](blocks[0](jnp.asarray(x)))) < 1e-6
    assert relative_rms(paths[1], 0.3 * blocks[0].mixer(blocks[0].norm1(x))) < 1e-6
    with pytest.raises(UnsupportedArgument, match="blocks must be pre-norm"):
        residual_paths([block_for(site, mixer="softmax_attention", order="post", rngs=nnx.Rngs(0))], x)


def test_with_all_weights_one_it_is_the_transformer():
    images = draw(2, 16, 16, 3)
    vit = ViT((16, 16), 3, **SIZES, rngs=nnx.Rngs(0))
    for mode in ("none", "prune", "scale"):
        model = ensemble_of(mode=mode)
        same = nnx.state(model, lambda path, value: isinstance(value, nnx.Param) and path[0] != "ensemble")
        for one, other in zip(*map(jax.tree.leaves, (same, nnx.state(vit, nnx.Param))), strict=True):
            np.testing.assert_array_equal(one, other)
        assert relative_rms(model(images), vit(images)) < 1e-6


def test_a_pruned_path_is_missing_in_the_ensemble_and_there_for_later_layers():
    images = draw(2, 16, 16, 3)
    model = ensemble_of(mode="both", granularity="scalar")
    model.ensemble.scale[...] = jnp.array([[1.0], [0.5], [2.0], [1.0], [-1.0]])
    pruned = with_mask(model, (True, False, True, True, True))

    @nnx.jit
    def run(model):
        return model.paths(images), model(images), model.tokens(images), model.prefix_logits(images, layers=(1,))

    paths, logits, tokens, prefixes = run(pruned)
    for one, other in zip(paths, run(model)[0], strict=True):
        np.testing.assert_array_equal(one, other)
    want = paths[0] + 2 * paths[2] + paths[3] - paths[4]
    assert relative_rms(tokens, pruned.norm(want)) < 1e-5
    assert relative_rms(logits, pruned.classified(want)) < 1e-5
    assert relative_rms(prefixes[0], pruned.classified(paths[0] + 2 * paths[2])) < 1e-5
    np.testing.assert_allclose(prefixes[1], logits, rtol=1e-5)
    labels = np.array([0, 2])
    loss = prefix_distillation(prefixes[:1], prefixes[1], labels, alpha=0.0)
    np.testing.assert_allclose(loss, -jax.nn.log_softmax(logits)[np.arange(2), labels], rtol=1e-5)
    assert (prefix_distillation(prefixes[:1], prefixes[1], labels, temperature=2.0) > loss).all()


def test_what_removing_paths_costs():
    model = ensemble_of(mode="prune")
    images = draw(8, 16, 16, 3)
    labels = np.asarray(model(images).argmax(-1))  # what the whole model says counts as right
    found = removals(model, images, labels)
    assert found.whole == 1 and found.without.shape == (5,)
    for path in (0, 3):
        keep = np.arange(5) != path
        np.testing.assert_allclose(found.without[path], (with_mask(model, keep)(images).argmax(-1) == labels).mean())
    curve = pruning_curve(model, images, labels, removed=2)
    assert curve.accuracy[0] == 1 and curve.accuracy[1] == found.without.max() == found.without[curve.order[0]]
    keep = curve.mask(5, 2)
    np.testing.assert_allclose(curve.accuracy[2], (with_mask(model, keep)(images).argmax(-1) == labels).mean())


def test_refusals():
    for options, words in (
        ({"mode": "drop"}, "mode must be one of none, prune, scale, both"),
        ({"granularity": "token"}, "granularity must be"),
        ({"keep_mask": (True,) * 5}, "keep_mask is for mode 'prune'"),
        ({"mode": "prune", "keep_mask": (True,) * 3}, "keep_mask must keep some of 5 paths"),
        ({"remat": True}, "remat must be False"),
    ):
        with pytest.raises(ValueError, match=words):
            ensemble_of(**options)
    with pytest.raises(ValueError, match="a model of mode 'prune'"):
        with_mask(ensemble_of(), (True,) * 5)
    with pytest.raises(ValueError, match="paths must be 2, got 1"):
        PathEnsemble(4, 2)([draw(1, 2, 4)])
