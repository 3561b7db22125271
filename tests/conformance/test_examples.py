"""Registered functions, modules, objectives, interventions and analyses; and that the checks find what is wrong."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import attnlab
from attnlab import Example, Kind
from attnlab.nn.linear import Linear
from attnlab.registry import BUILT_FROM_OPTIONS
from tests.conformance.examples import CHECKS, Case, check_jit_equals_eager, check_save_and_restore

X = np.random.default_rng(0).standard_normal((3, 4, 8)).astype(np.float32)


class Readout(nnx.Module):
    """Weighs tokens, for the tests of the checks."""

    def __init__(self):
        self.score = Linear(8, 1, rngs=nnx.Rngs(0))

    def __call__(self, x, *, mask=None):
        scores = self.score(x)[..., 0].astype(jnp.float32)
        weights = jax.nn.softmax(scores if mask is None else jnp.where(mask, scores, -jnp.inf))
        return jnp.einsum("bn,bnc->bc", weights.astype(x.dtype), x)


def squares(x, y):
    return jnp.mean((x - y) ** 2, axis=(1, 2), dtype=jnp.float32)


TOYS = {
    "a module of the tests": (
        Kind.MODULE,
        lambda: Example(Readout(), (X,), {"mask": np.arange(4) < [[4], [2], [3]]}, batched=(0, "mask")),
    ),
    "an objective of the tests": (
        Kind.OBJECTIVE,
        lambda: Example(squares, (X, X[::-1]), batched=(0, 1), differentiable=(0, 1)),
    ),
}
REGISTERED = {
    variant.name: (variant.kind, variant.example)
    for variant in attnlab.variants()
    if variant.kind not in BUILT_FROM_OPTIONS
}
every_example = pytest.mark.parametrize("subject", sorted(TOYS | REGISTERED))


@functools.lru_cache(maxsize=2)
def case(name: str) -> tuple[Case, Kind]:
    kind, example = (TOYS | REGISTERED)[name]
    return Case(example()), kind


@pytest.mark.parametrize(
    ("subject", "check"),
    [
        # Eager calls compile every operation by itself.
        pytest.param(
            subject, check, marks=pytest.mark.slow if check is check_jit_equals_eager and subject in REGISTERED else ()
        )
        for subject in sorted(TOYS | REGISTERED)
        for check in CHECKS
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__.removeprefix("check_"),
)
def test_holds(subject, check):
    check(*case(subject))


@every_example
def test_save_and_restore(subject, tmp_path):
    check_save_and_restore(*case(subject), tmp_path)


@pytest.mark.parametrize(
    ("fault", "wrong", "options"),
    [
        ("jit_equals_eager", lambda x: x if isinstance(x, jax.core.Tracer) else 2 * x, {}),
        ("dtypes", lambda x: x.astype(jnp.float16), {}),
        ("bfloat16_is_near_float32", lambda x: x + (x.dtype == jnp.bfloat16), {}),
        ("examples_are_independent", lambda x: x - x.mean(0), {}),
        ("examples_are_independent", lambda x: x[0], {}),
        ("gradients", lambda x: jnp.sqrt(x - x), {}),
        ("gradients", jax.lax.stop_gradient, {}),
        ("refusals", lambda x, **anything: x, {}),
        ("refusals", lambda x, y: x, {"args": (X, X), "batched": (0, 1)}),
    ],
)
def test_what_is_wrong_is_found(fault, wrong, options):
    (check,) = (check for check in CHECKS if check.__name__ == f"check_{fault}")
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        check(Case(Example(wrong, **{"args": (X,), **options})), Kind.FUNCTION)
