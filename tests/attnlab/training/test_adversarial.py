"""Training on turned and perturbed images: the bound, the state, the loss and what is reported."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab.data import Digits
from attnlab.training.optimizer import OptimizerConfig, make_optimizer
from attnlab.training.state import init_state, make_train_step
from attnlab.training.task import AdversarialTask, ClassificationTask
from experiments.shapes_adversarial import CONFIG
from tests.attnlab.training.toy import Classifier


def batch(size=32, seed=0):
    """A bright corner says the class."""
    generator = np.random.default_rng(seed)
    image, label = generator.uniform(0, 0.3, (size, 4, 4, 1)), np.arange(size) % 2
    image[label == 1, ::3, ::3] += 0.6
    return {"image": image.astype(np.float32), "label": label.astype(np.int32), "weight": np.ones(size, np.float32)}


class Linear(nnx.Module):
    """Images to logits; it keeps what it was given last, outside of gradients."""

    given = None

    def __init__(self):
        self.kernel = nnx.Param(jax.random.normal(jax.random.key(0), (16, 2)))

    def __call__(self, images, *, deterministic=True):
        if not isinstance(images, jax.core.Tracer):
            Linear.given = np.asarray(images)
        return images.reshape(images.shape[0], -1) @ self.kernel[...]


def test_images_are_changed_by_at_most_epsilon_and_turned():
    rows, task = batch(), AdversarialTask(epsilon=0.1, step=0.125, turns=False)
    found = task.sums(Linear(), rows, deterministic=False)
    change = Linear.given - rows["image"]
    assert abs(change).max() <= 0.1 + 1e-6 and abs(change).mean() > 0.04
    assert Linear.given.min() >= 0 and Linear.given.max() <= 1
    assert found["loss"] > ClassificationTask().sums(Linear(), rows, deterministic=False)["loss"]
    again = task.sums(Linear(), rows, deterministic=False)
    assert again == found  # a run that goes on after a stop makes the same numbers
    turned = AdversarialTask(epsilon=1e-6, step=1e-6)
    turned.sums(Linear(), rows, deterministic=False)
    turns = [np.rot90(rows["image"], k, (1, 2)) for k in range(4)]
    nearest = np.stack([abs(Linear.given - each).max((1, 2, 3)) for each in turns])
    assert nearest.min(0).max() < 1e-5 and set(nearest.argmin(0)) == {0, 1, 2, 3}


def test_evaluation_reports_both_accuracies():
    rows, task = batch(), AdversarialTask(epsilon=0.2, step=0.25)
    sums = task.sums(Linear(), rows, deterministic=True)
    plain = ClassificationTask().sums(Linear(), rows, deterministic=True)
    assert sums["loss"] == plain["loss"] and sums["correct"] == plain["correct"] > sums["robust"]
    metrics = task.metrics({name: float(value) for name, value in sums.items()})
    assert metrics["robust_accuracy"] == sums["robust"] / 32
    assert "robust_accuracy" not in task.metrics({"loss": 1.0, "correct": 1.0, "weight": 2.0})


def test_the_loss_falls_with_statistics_and_dropout():
    model = Classifier(dropout=0.1, dtype=jnp.float32, rngs=nnx.Rngs(0))
    optimizer = make_optimizer(OptimizerConfig(learning_rate=0.02, warmup_steps=0, weight_decay=0.0), 30)
    graph, params, other = nnx.split(model, nnx.Param, ...)
    state = init_state(params, other, optimizer, with_ema=False)
    step = jax.jit(make_train_step(graph, AdversarialTask(epsilon=0.05, step=0.06), optimizer))
    losses = []
    for index in range(30):
        state, sums = step(state, batch(seed=index))
        losses.append(float(sums["loss"]) / 32)
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:3])
    # One pass, not two, is counted in the state.
    counts = [int(leaf.get_value()) for path, leaf in nnx.to_flat_state(state.other) if path[-1] == "count"]
    assert counts and set(counts) == {30}


def test_what_is_refused():
    for options, message in (({"epsilon": 0.0}, "epsilon must lie in 0..1"), ({"step": 2.0}, "step must lie in 0..1")):
        with pytest.raises(ValueError, match=message):
            AdversarialTask(**options)
    with pytest.raises(ValueError, match=r"data.scale: AdversarialTask perturbs images in \[0, 1\].* not 'symmetric'"):
        dataclasses.replace(CONFIG, data=Digits(scale="symmetric")).check()
