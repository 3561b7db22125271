"""Raptor in the place of a vision transformer's layers, its phases, and the losses that teach it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab.analysis.depth_phases import depth_dynamics, max_cut, recursive_max_cut, thresholds_of
from attnlab.models.raptor import Raptor, RecurrentBlock, surrogate_of
from attnlab.models.vit import ViT
from attnlab.objectives.layer_imitation import autoregressive_loss, imitation_loss, teacher_forced_loss, teacher_share
from tests.accuracy import relative_rms


def draw(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def test_the_roll_out_is_its_steps_and_stands_for_the_layers_of_a_vit():
    raptor = Raptor(8, num_heads=2, layers=4, thresholds=(1, 3), mlp_ratio=1, layer_scale=0.5, rngs=nnx.Rngs(0))
    teacher = ViT((16, 16), 3, patch_size=8, features=8, depth=1, num_heads=2, pooling="cls", rngs=nnx.Rngs(1))
    model = surrogate_of(teacher, raptor)
    parts = [nnx.split(module) for module in (raptor, model)]

    @jax.jit
    def run(states, x, images):
        raptor, model = (nnx.merge(graph, state) for (graph, _), state in zip(parts, states, strict=True))
        rolled, stepped = raptor(x), [x]
        for t in range(1, 5):
            stepped.append(raptor.step(stepped[-1], t))
        recorded, seen = nnx.capture(raptor, nnx.Intermediate)(x)
        stage = model.stage[0]
        tokens = stage.prefix(model._embedded(images, True))
        tokens = raptor(tokens + stage.position(tokens))[:, -1]
        want = model.head(model.norm(tokens)[:, 0])
        layers = sum(len(block["mixer"]["attention"]) for block in seen["blocks"].values())
        return rolled, jnp.stack(stepped[1:], 1), recorded, layers, model(images), want

    rolled, stepped, recorded, layers, logits, want = run([s for _, s in parts], draw(2, 5, 8), draw(2, 16, 16, 3))
    assert relative_rms(rolled, stepped) < 1e-5
    assert relative_rms(recorded, stepped) < 1e-5
    assert layers == 4, "every layer's weights are recorded, as a scan could not"
    assert relative_rms(logits, want) < 1e-5
    assert len(teacher.blocks) == 1 and not isinstance(teacher.blocks[0].mixer, type(model.blocks[0].mixer))


def test_refusals():
    for thresholds in ((3, 2), (0,), (5,)):
        with pytest.raises(ValueError, match="thresholds must rise"):
            Raptor(8, num_heads=2, layers=5, thresholds=thresholds, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="t is missing"):
        RecurrentBlock(8, num_heads=2, rngs=nnx.Rngs(0))(draw(1, 3, 8))
    with pytest.raises(ValueError, match="key is needed"):
        autoregressive_loss(lambda x, t: x, draw(1, 3, 2, 4), sigma=0.1)
    with pytest.raises(ValueError, match="contiguous"):
        thresholds_of([0, 1, 0])


def test_phases_of_layers_in_two_groups():
    """Layers of one direction each, in groups that differ: phases are the groups, their ends the thresholds."""
    random = np.random.default_rng(1)
    bases = random.normal(size=(3, 1, 1, 6, 16))
    streams = np.concatenate([bases[i] + 0.1 * random.normal(size=(2, n, 6, 16)) for i, n in enumerate((4, 3, 5))], 1)
    found = depth_dynamics(streams.astype(np.float32), prefix=2)
    weights = np.asarray(found.dissimilarity.mean(0), np.float64)
    labels = recursive_max_cut(weights, 0.05 * weights.sum() / 2)
    assert thresholds_of(labels) == (4, 7)
    assert set(recursive_max_cut(weights, weights.sum())) == {0}
    side, across = max_cut(weights)
    assert not side[0]
    np.testing.assert_allclose(across, weights[np.ix_(~side, side)].sum())
    assert found.speed[:, 3].mean() > 5 * found.speed[:, 2].mean(), "tokens turn between phases"
    np.testing.assert_allclose(found.remaining[:, -1], 0, atol=1e-6)
    x = streams[0, 0].astype(np.float64)
    cosine = np.sum(x * streams[0, 1], -1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(streams[0, 1], axis=-1)
    np.testing.assert_allclose(found.speed[0, 0], np.arccos(cosine), rtol=1e-3)
    update = streams[0, 1] - streams[0, 0]
    values = np.linalg.svd(update, compute_uv=False)
    np.testing.assert_allclose(found.update_rank[0, 0], (values**2).sum() / values[0] ** 2, rtol=1e-4)


def test_imitation_goes_from_the_teachers_tokens_to_its_own():
    sequence = draw(2, 4, 3, 5)

    def layer(x, t):
        return x * (1 + 0.1 * t[:, None, None])

    forced, rolled = (loss(layer, sequence, start=2) for loss in (teacher_forced_loss, autoregressive_loss))
    x = sequence[:, 0]
    for i in range(3):
        np.testing.assert_allclose(
            teacher_forced_loss(layer, sequence[:, i : i + 2], start=2 + i),
            np.square(sequence[:, i] * (1.3 + 0.1 * i) - sequence[:, i + 1]).mean((1, 2)),
            rtol=1e-5,
        )
        x = x * (1.3 + 0.1 * i)
    mixed = functools.partial(imitation_loss, layer, sequence, start=2)
    np.testing.assert_allclose(mixed(teacher_share=0.25), 0.25 * forced + 0.75 * rolled, rtol=1e-6)
    noisy = [mixed(sigma=0.1, key=jax.random.key(k)) for k in (0, 0, 1)]
    np.testing.assert_array_equal(noisy[0], noisy[1])
    assert not np.allclose(noisy[0], noisy[2])
    np.testing.assert_allclose([teacher_share(s, 100) for s in (0, 10, 25, 90)], [1, 0.6, 0, 0], atol=1e-6)
