"""Distillation by logits, the smooth absolute error and adversarial steps against their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.objectives.adversarial import adversarial_step
from attnlab.objectives.logit_distillation import exit_distillation, logit_distillation
from attnlab.objectives.smooth_l1 import smooth_l1
from tests.accuracy import relative_rms


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def test_logits_are_compared_at_a_temperature():
    student, teacher, weight = draw(0, 3, 4, 5), draw(1, 3, 4, 5), np.array([[1, 1, 0, 0], [2, 1, 1, 0], [0] * 4])
    p, q = softmax(np.float64(teacher) / 3), softmax(np.float64(student) / 3)
    of_places = 9 * (p * np.log(p / q)).sum(-1)
    assert relative_rms(logit_distillation(student, teacher, temperature=3.0), of_places.mean(1)) < 1e-5
    got = logit_distillation(student, teacher, temperature=3.0, weight=weight)
    assert relative_rms(got, (of_places * weight).sum(1) / np.maximum(weight.sum(1), 1)) < 1e-5
    both = exit_distillation([student, teacher], teacher, temperature=3.0)
    assert relative_rms(both, of_places.mean(1)) < 1e-5
    ds, dt = jax.grad(lambda s, t: logit_distillation(s, t, temperature=3.0).sum(), (0, 1))(student, teacher)
    assert relative_rms(ds, 3 * (q - p) / 4) < 1e-5 and not dt.any()
    far = logit_distillation(jnp.array([[0.0, -1e4]], jnp.bfloat16), jnp.array([[-1e4, 0.0]], jnp.bfloat16))
    assert far.dtype == jnp.float32 and np.isfinite(far).all()
    for call, words in (
        (lambda: logit_distillation(student, teacher[:2]), "one shape"),
        (lambda: logit_distillation(student, teacher, temperature=0.0), "temperature must be positive"),
        (lambda: logit_distillation(student, teacher, weight=weight[:, 0]), "weight must be"),
        (lambda: exit_distillation([], teacher), "exits must be"),
    ):
        with pytest.raises(ValueError, match=words):
            call()


@pytest.mark.parametrize("beta", [0.0, 0.01, 1.0])
def test_small_errors_are_squared(beta):
    prediction, target = draw(0, 2, 3, 4), draw(1, 2, 3, 4)
    error = np.abs(np.float64(prediction) - target)
    want = np.where(error < beta, error**2 / max(2 * beta, 1e-9), error - beta / 2)
    assert relative_rms(smooth_l1(prediction, target, beta=beta), want.mean((1, 2))) < 1e-6
    weight = np.array([[[1], [0], [1]], [[0], [0], [0]]])
    got = smooth_l1(prediction, target, beta=beta, weight=weight)
    np.testing.assert_allclose(got, [want[0, [0, 2]].mean(), 0], rtol=1e-5)
    same = jax.grad(lambda x: smooth_l1(x, target, beta=beta).sum())(target)
    assert np.isfinite(same).all()
    with pytest.raises(ValueError, match="beta must be at least 0"):
        smooth_l1(prediction, target, beta=-1.0)


@pytest.mark.parametrize("norm", ["l2", "sign"])
def test_a_step_raises_the_loss(norm):
    slope, start = draw(0, 2, 3, 4), 0.1 * draw(1, 2, 3, 4)
    where = np.array([True, True, False])[:, None]
    got = adversarial_step(lambda d: (d * slope).sum((1, 2)), start, size=0.5, norm=norm, where=where, bound=0.4)
    g = np.where(where, np.float64(slope), 0)
    g = np.sign(g) if norm == "sign" else g / np.sqrt((g**2).sum((1, 2), keepdims=True))
    assert relative_rms(got, np.where(where, np.clip(start + 0.5 * g, -0.4, 0.4), 0)) < 1e-6
    flat = adversarial_step(lambda d: (0 * d).sum(), jnp.asarray(start, jnp.bfloat16), size=1.0, norm=norm)
    assert flat.dtype == jnp.bfloat16
    np.testing.assert_array_equal(flat, jnp.asarray(start, jnp.bfloat16))
    assert not jax.grad(lambda s: adversarial_step(lambda d: (d**2).sum(), s, size=0.1, norm=norm).sum())(start).any()


def test_steps_that_have_no_meaning_are_refused():
    for options, words in (({"norm": "l1"}, "norm must be"), ({"bound": 0.0}, "bound must be")):
        with pytest.raises(ValueError, match=words):
            adversarial_step(jnp.sum, np.ones((1, 2)), size=1.0, **options)
