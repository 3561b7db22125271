"""One step: tasks' sums, accumulation, auxiliary losses, averages, and state that is no parameter."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from attnlab.nn.aux_loss import AuxLoss, total_aux_loss
from attnlab.training.optimizer import OptimizerConfig, make_optimizer
from attnlab.training.state import init_state, make_eval_step, make_train_step
from attnlab.training.task import ClassificationTask, LanguageTask
from tests.attnlab.training.toy import Bigram, Classifier

SGD = make_optimizer(OptimizerConfig("sgd", learning_rate=1.0, schedule="constant", weight_decay=0.0, momentum=0.0,
                                     clip_norm=None), 10)  # fmt: skip


def batch(size=8, seed=0):
    generator = np.random.default_rng(seed)
    return {
        "image": generator.normal(size=(size, 4, 4, 1)).astype(np.float32),
        "label": generator.integers(4, size=size).astype(np.int32),
        "weight": generator.integers(0, 3, size=size).astype(np.float32),
    }


def start(model, task, optimizer=SGD, **options):
    graphdef, params, other = nnx.split(model, nnx.Param, ...)
    state = init_state(params, other, optimizer, with_ema="ema_decay" in options)
    return state, make_train_step(graphdef, task, optimizer, **options), make_eval_step(graphdef, task)


def plain_classifier():
    return Classifier(batch_norm=False, dropout=0.0, dtype=jnp.float32, rngs=nnx.Rngs(0))


def numpy_sums(logits, label, weight, smoothing=0.0):
    logits = np.asarray(logits, np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    target = np.eye(4)[label] * (1 - smoothing) + smoothing / 4
    return -(weight * (target * log_p).sum(-1)).sum(), (weight * (logits.argmax(-1) == label)).sum()


def test_classification_sums_are_weighted():
    model, rows = plain_classifier(), batch()
    task = ClassificationTask(label_smoothing=0.2)
    for deterministic, smoothing in ((True, 0.0), (False, 0.2)):
        sums = task.sums(model, rows, deterministic=deterministic)
        loss, correct = numpy_sums(model(rows["image"]), rows["label"], rows["weight"], smoothing)
        np.testing.assert_allclose(sums["loss"], loss, rtol=1e-5)
        assert (sums["correct"], sums["weight"]) == (correct, rows["weight"].sum())
    assert task.metrics({"loss": 6.0, "correct": 3.0, "weight": 4.0}) == {"loss": 1.5, "accuracy": 0.75}


def test_language_sums_and_metrics():
    generator = np.random.default_rng(0)
    model = Bigram(11, dtype=jnp.float32, rngs=nnx.Rngs(0))
    tokens = generator.integers(11, size=(2, 6))
    rows = {
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "weight": np.float32([[1, 1, 0, 1, 1], [0, 0, 1, 1, 1]]),
    }
    segments, positions = generator.integers(3, size=(2, 5)), np.tile(np.arange(5), (2, 1))
    for extra in ({}, {"segment_ids": segments}, {"segment_ids": segments, "positions": positions}):
        log_p = jax.nn.log_softmax(model(rows["inputs"], **extra))
        expected = -sum(rows["weight"][b, n] * log_p[b, n, rows["targets"][b, n]] for b in range(2) for n in range(5))
        sums = LanguageTask(5).sums(model, rows | extra, deterministic=True)
        np.testing.assert_allclose(sums["loss"], expected, rtol=1e-5)
        assert sums["weight"] == 7
        assert sums["correct"] == (rows["weight"] * (log_p.argmax(-1) == rows["targets"])).sum()
    everything = rows | {"segment_ids": segments, "positions": positions}
    np.testing.assert_array_equal(
        LanguageTask(5, positions=False).sums(model, everything, deterministic=True)["loss"],
        LanguageTask(5).sums(model, rows | {"segment_ids": segments}, deterministic=True)["loss"],
    )
    metrics = LanguageTask(5, bytes_per_token=4).metrics({"loss": 7 * np.log(16), "weight": 7, "correct": 3})
    want = {"loss": np.log(16), "perplexity": 16, "bits_per_byte": 1.0, "accuracy": 3 / 7}
    assert metrics == pytest.approx(want)


@pytest.mark.parametrize("accumulate", [2, 4])
def test_micro_batches_equal_one_big_batch(accumulate):
    task = ClassificationTask(label_smoothing=0.1)
    rows = batch()
    state, step, _ = start(plain_classifier(), task)
    state2, step2, _ = start(plain_classifier(), task, accumulate=accumulate)
    (a, sums_a), (b, sums_b) = jax.jit(step)(state, rows), jax.jit(step2)(state2, rows)
    for left, right in zip(jax.tree.leaves(a.params), jax.tree.leaves(b.params), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-5, atol=1e-6)
    for name in sums_a:
        np.testing.assert_allclose(sums_a[name], sums_b[name], rtol=1e-5)


def test_the_gradient_is_that_of_the_weighted_mean():
    model, rows, task = plain_classifier(), batch(), ClassificationTask()
    state, step, _ = start(model, task)

    def mean_loss(model):
        losses = optax.softmax_cross_entropy_with_integer_labels(model(rows["image"]), rows["label"])
        return (losses * rows["weight"]).sum() / rows["weight"].sum()

    grads = nnx.grad(mean_loss)(model)
    after, sums = step(state, rows)
    moved = jax.tree.map(jnp.subtract, state.params, after.params)
    for left, right in zip(jax.tree.leaves(moved), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(sums["grad_norm"], optax.tree.norm(grads), rtol=1e-5)


def test_a_label_that_is_no_class_is_not_taken_for_one():
    model, rows, task = plain_classifier(), batch(), ClassificationTask()
    sums = [
        task.sums(
            model, rows | {"label": jnp.asarray(rows["label"]).at[0].set(wrong), "weight": weight}, deterministic=True
        )["loss"]
        for wrong in (-1, 1000)
        for weight in (jnp.ones_like(rows["weight"]), jnp.ones_like(rows["weight"]).at[0].set(0))
    ]
    assert [bool(jnp.isnan(loss)) for loss in sums] == [True, False, True, False]


def test_a_batch_without_weight_changes_nothing():
    state, step, _ = start(plain_classifier(), ClassificationTask())
    after, sums = step(state, batch() | {"weight": np.zeros(8, np.float32)})
    for left, right in zip(jax.tree.leaves(state.params), jax.tree.leaves(after.params), strict=True):
        np.testing.assert_array_equal(left, right)
    assert ClassificationTask().metrics({k: float(v) for k, v in sums.items()}) == {"loss": 0.0, "accuracy": 0.0}


class WithAuxLoss(nnx.Module):
    def __init__(self, factor):
        self.inner, self.factor = plain_classifier(), factor
        self.penalty = AuxLoss(jnp.zeros((), jnp.float32))

    def __call__(self, images, *, deterministic=True):
        if not deterministic:
            self.penalty[...] = self.factor * jnp.square(self.inner.head.bias[...] - 1).sum()
        return self.inner(images)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_auxiliary_losses_are_added_and_reported(accumulate):
    assert total_aux_loss(plain_classifier()) is None
    rows, task = batch(), ClassificationTask()
    with_aux, step, _ = start(WithAuxLoss(0.5), task, accumulate=accumulate)
    without, plain_step, _ = start(WithAuxLoss(0.0), task)
    after, sums = step(with_aux, rows)
    plain, _ = plain_step(without, rows)
    assert sums["aux_loss"] == pytest.approx(0.5 * 4 * rows["weight"].sum())
    # d/db 0.5 (b - 1)^2 = -1 at b = 0, times the learning rate of 1.
    bias = lambda state: state.params["inner"]["head"]["bias"][...]  # noqa: E731
    np.testing.assert_allclose(bias(after) - bias(plain), np.ones(4), rtol=1e-5)


def test_statistics_and_dropout_move_in_training_and_rest_in_evaluation():
    model = Classifier(dtype=jnp.float32, rngs=nnx.Rngs(0))
    state, step, evaluate = start(model, ClassificationTask())
    rows = batch()
    one, first = step(state, rows)
    np.testing.assert_array_equal(state.other["dropout"]["rngs"]["count"][...], 0)
    np.testing.assert_array_equal(one.other["dropout"]["rngs"]["count"][...], 1)
    hidden = model.hidden(rows["image"].reshape(8, -1))
    np.testing.assert_allclose(one.other["norm"]["mean"][...], 0.01 * hidden.mean(0), rtol=1e-4, atol=1e-7)
    # The same parameters and another count: another draw of dropout.
    _, second = step(one._replace(params=state.params), rows)
    assert first["loss"] != second["loss"]
    a, b = (evaluate(one.params, one.other, rows) for _ in range(2))
    assert a["loss"] == b["loss"]


def test_average_follows_its_formula():
    state, step, _ = start(plain_classifier(), ClassificationTask(), ema_decay=0.3)
    states = [state]
    for seed in range(5):
        states.append(step(states[-1], batch(seed=seed))[0])
    kernel = lambda tree: np.asarray(tree["head"]["kernel"][...], np.float64)  # noqa: E731
    expected = kernel(state.params)
    for t, later in enumerate(states[1:]):
        decay = min(0.3, (1 + t) / (10 + t))
        expected = decay * expected + (1 - decay) * kernel(later.params)
        np.testing.assert_allclose(kernel(later.ema), expected, rtol=1e-5, atol=1e-7)
