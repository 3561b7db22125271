"""Sparsifiner: who attends to whom, pruned patches, the two phases of training, its losses, and sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab.attention.sparse.sparsifiner import MaskPredictor, SparsifinerAttention
from attnlab.models.sparsifiner import SPARSIFINERS, Sparsifiner, with_reconstruction
from attnlab.models.staged import build_named
from attnlab.objectives.token_distillation import attention_reconstruction, sparsifiner_loss, token_distillation

SIZES = {"num_heads": 2, "num_tokens": 9, "keep_rate": 0.4, "reduce_n_factor": 2, "top_coefficients": 2}
SIZES |= {"basis_threshold": 0.0}
SMALL = {"features": 8, "num_heads": 2, "depth": 2, "mlp_ratio": 1.0, "image_size": 24, "patch_size": 8}
SMALL |= {"num_classes": 3, "reduce_n_factor": 3, "top_coefficients": 2, "basis_threshold": 0.0}
DEIT = {192: 5_717_416, 384: 22_050_664, 768: 86_567_656}
AUTHORS = {192: 5_918_632, 384: 22_251_880, 768: 86_768_872}


def draw(*shape):
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n == "sparsifiner_small" else pytest.mark.slow) for n in SPARSIFINERS]
)
def test_sizes_are_those_of_deit_and_the_guesses(name):
    features = SPARSIFINERS[name][1].get("features", 384)
    model = nnx.eval_shape(lambda: build_named(SPARSIFINERS, name, rngs=nnx.Rngs(0)))
    count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    assert count == AUTHORS[features] == DEIT[features] + 12 * (2 * (64 * 32 + 32) + 2 * 197 * 32)


def test_the_class_token_sees_all_and_others_their_largest():
    module = SparsifinerAttention(8, **SIZES, rngs=nnx.Rngs(0))
    made = jax.jit(lambda x: module(x))(draw(2, 9, 8))
    assert made.connectivity[:, :, 0].all()
    np.testing.assert_array_equal(made.connectivity[:, :, 1:].sum(-1), 4)  # of 9 tokens two fifths, rounded up
    lowest = jnp.where(made.connectivity[:, :, 1:], made.approximation, jnp.inf).min(-1)
    highest = jnp.where(made.connectivity[:, :, 1:], -jnp.inf, made.approximation).max(-1)
    assert (lowest >= highest).all()
    np.testing.assert_allclose(made.weights.sum(-1), 1, rtol=1e-5)
    assert (made.weights[~made.connectivity] == 0).all() and (made.full > 0).all()


def test_dead_patches_are_seen_by_the_class_token_alone_and_the_budget_falls():
    module = SparsifinerAttention(8, **SIZES, prune_rows=True, prune_tokens=True, token_keep_rate=0.3, rngs=nnx.Rngs(0))
    alive = np.ones((2, 8), bool)
    alive[:, 3:] = False
    run = jax.jit(lambda x, alive, budget: module(x, alive, budget=budget))
    made = run(draw(2, 9, 8), alive, np.int32(8))
    assert not made.connectivity[:, :, 1:, 4:].any() and not made.connectivity[:, :, 4:].any()
    assert (made.weights[:, :, 4:] == 0).all()
    np.testing.assert_array_equal(run(draw(2, 9, 8), alive, np.int32(2)).connectivity[:, :, 1:4].sum(-1), 2)
    np.testing.assert_array_equal(made.alive.sum(-1), 3)
    assert (made.alive <= alive).all()
    own = module(draw(2, 9, 8), alive)
    np.testing.assert_array_equal(own.connectivity[:, :, 1:4].sum(-1), 3)


@pytest.mark.slow
def test_the_phases_of_training():
    model = Sparsifiner(**SMALL, prune_layers=(0,), token_keep_rates=0.5, rngs=nnx.Rngs(0))
    images = draw(2, 24, 24, 3)

    first = with_reconstruction(model, True)
    graph, state = nnx.split(first)

    @jax.jit
    def run(state):
        first = nnx.merge(graph, state)
        model = with_reconstruction(first, False)
        trained = first.with_layers(images, deterministic=False)
        return model.with_layers(images), trained, model(images), model.stages(images)[0]

    sparse, trained, logits, behind = run(state)
    np.testing.assert_array_equal(sparse.layers[1].alive.sum(-1), 5)
    np.testing.assert_allclose(logits, sparse.logits, atol=1e-6)
    assert (behind.reshape(2, 9, 8)[~sparse.layers[1].alive] == 0).all()
    for layer in trained.layers:
        np.testing.assert_array_equal(layer.weights, layer.full)
        assert layer.alive is None and (layer.approximation < 0).any()

    def loss(model):
        made = model.with_layers(images, deterministic=False)
        return attention_reconstruction(
            [one.approximation for one in made.layers], [one.full for one in made.layers]
        ).sum()

    gradient = nnx.jit(nnx.grad(loss))(first)
    for block in gradient["stage"][0]["blocks"].values():
        assert all(np.any(leaf) for leaf in jax.tree.leaves(block["mixer"]["predictor"]))
    assert not model.blocks[0].mixer.reconstruct and first.blocks[0].mixer.reconstruct


def test_losses_are_the_terms_of_the_paper():
    logits, teacher = draw(2, 5), draw(5, 2).T
    tokens, other = draw(2, 4, 3), draw(3, 4, 2).T
    guess, full = draw(2, 1, 4, 5), draw(2, 1, 5, 5)
    alive = np.array([[True, True, False, True], [False] * 4])
    labels = np.array([1, 4])
    np.testing.assert_allclose(
        token_distillation(tokens, other, alive=alive)[0], np.square(tokens - other)[0, [0, 1, 3]].mean(), rtol=1e-5
    )
    assert token_distillation(tokens, other, alive=alive)[1] == 0
    p, q = jax.nn.softmax(teacher), jax.nn.log_softmax(logits)
    want = -q[np.arange(2), labels] + 0.5 * (p * (jnp.log(p) - q)).sum(-1)
    want = want + 0.5 * np.square(tokens - other).mean((1, 2)) + 0.01 * np.square(guess - full[:, :, 1:]).sum((1, 2, 3))
    got = sparsifiner_loss(logits, labels, tokens, teacher, other, [guess], [full])
    np.testing.assert_allclose(got, want, rtol=1e-5)
    with pytest.raises(ValueError, match="one map for each layer"):
        attention_reconstruction([guess], [])


def test_refusals():
    predictor = {"num_heads": 2, "num_tokens": 9, "reduce_n_factor": 3, "rngs": nnx.Rngs(0)}
    for options, words in (
        ({"top_coefficients": 4}, "top_coefficients must be in 1..3, got 4"),
        ({"reduce_c_factor": 9}, "must leave some of 9 tokens and 8 channels"),
        ({"keep_rate": 0.0}, r"keep_rate must be in \(0, 1\]"),
        ({"score_threshold": 0.0, "top_coefficients": 1}, "score_threshold must be positive"),
    ):
        with pytest.raises(ValueError, match=words):
            MaskPredictor(8, **predictor | options)
    module = SparsifinerAttention(8, **SIZES, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="tokens must be the 9 that the layer was built for, got 5"):
        module(draw(1, 5, 8))
    with pytest.raises(ValueError, match="alive must be boolean"):
        module(draw(1, 9, 8), np.ones((1, 9), bool))
    with pytest.raises(ValueError, match="one for each of 2 blocks"):
        Sparsifiner(**SMALL, keep_rate=(0.5,), rngs=nnx.Rngs(0))
