"""Properties of every registered pooling: tokens (B, N, C) to one vector (B, C')."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import attnlab
from attnlab import Kind, Site
from tests.conformance.programs import Programs, rounded
from tests.conformance.subjects import close, finite, named, parameters

FEATURES, HEADS, TOKENS, BATCH = 32, 4, 16, 3
every_pooling = pytest.mark.parametrize("subject", attnlab.names(kind=Kind.POOLING))


def build(name: str, **options: Any) -> attnlab.Pooling:
    variant = attnlab.get(name)
    return variant.create(Site(FEATURES, HEADS, grid=(4, 4)), rngs=nnx.Rngs(0), **{**variant.options, **options})


@functools.lru_cache(maxsize=2)
def programs(name: str) -> Programs:
    return Programs(build(name), (tokens(),))


def tokens() -> np.ndarray:
    return np.random.default_rng(1).standard_normal((BATCH, TOKENS, FEATURES)).astype(np.float32)


@every_pooling
def test_shape_and_dtype(subject):
    its = programs(subject)
    for dtype, y in {jnp.float32: its.plain.y, jnp.bfloat16: its.half.y}.items():
        assert y.shape == (BATCH, its.module.out_features)
        assert y.dtype == dtype
        assert finite(y)
    chosen = nnx.eval_shape(lambda: build(subject, dtype=jnp.bfloat16))
    graph, state = nnx.split(chosen)
    y = jax.eval_shape(lambda state, x: nnx.merge(graph, state)(x), state, tokens())
    assert y.dtype == jnp.bfloat16
    stored = nnx.eval_shape(lambda: build(subject, param_dtype=jnp.bfloat16))
    assert {leaf.dtype for leaf in parameters(stored).values()} <= {jnp.dtype(jnp.bfloat16)}


@every_pooling
def test_bfloat16_is_near_float32(subject):
    its = programs(subject)
    close(its.half.y, its.pull(rounded(rounded(its.arguments), np.float32)).y, 4e-2)


@every_pooling
def test_jit_equals_eager(subject):
    its = programs(subject)
    close(its.plain.y, its.module(tokens()))


@every_pooling
def test_examples_are_independent(subject):
    """In evaluation; what couples a batch in training is said in the mechanism's docstring."""
    its = programs(subject)
    alone = [its.call(tokens()[i : i + 1]) for i in range(BATCH)]
    close(np.concatenate(alone), its.plain.y)


@every_pooling
def test_gradients(subject):
    its = programs(subject)
    for name, gradient in named((its.plain.params, its.plain.arguments)).items():
        assert finite(gradient), name
        assert np.any(gradient != 0), f"{name} has no gradient"


@every_pooling
def test_records_what_it_attends_to(subject):
    its = programs(subject)
    y, intermediates = jax.jit(lambda state, x: nnx.capture(nnx.merge(its.graph, state), nnx.Intermediate)(x))(
        its.state, tokens()
    )
    close(y, its.plain.y, 1e-6)
    if "attention" in intermediates:
        weights = intermediates["attention"][0]
        assert weights.ndim == 4
        assert weights.shape[0] == BATCH
        assert weights.dtype == jnp.float32


@every_pooling
def test_refusals(subject):
    pool = programs(subject).module
    for wrong in (tokens()[0], tokens()[..., :-1], tokens()[:, :0]):
        with pytest.raises(ValueError, match="tokens"):
            pool(wrong)
    with pytest.raises(TypeError, match="no option"):
        build(subject, no_such_option=1)
