"""Properties of every registered backbone, at miniature sizes."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import attnlab
from attnlab import Kind
from tests.conformance.programs import Programs
from tests.conformance.subjects import close, finite, named, parameters

# Of images by tokens, by windows and by convolutions, and of a text. Half of the others have golden cases of the whole.
OFTEN = {"deit", "davit.backbone", "hornet.backbone", "gpt2"}
every_backbone = pytest.mark.parametrize(
    "subject",
    [pytest.param(name, marks=() if name in OFTEN else pytest.mark.slow) for name in attnlab.names(kind=Kind.BACKBONE)],
)


def build(name: str, **options: Any) -> nnx.Module:
    variant = attnlab.get(name)
    return variant.target(**variant.options, **options, rngs=nnx.Rngs(0))


def inputs(name: str) -> np.ndarray:
    random = np.random.default_rng(1)
    if vocabulary := attnlab.get(name).options.get("vocab_size"):
        return random.integers(0, vocabulary, (2, 7), np.int32)
    if numbers := attnlab.get(name).options.get("token_features"):
        return random.standard_normal((2, 7, numbers)).astype(np.float32)
    return random.standard_normal((2, 32, 32, 3)).astype(np.float32)


@functools.lru_cache(maxsize=2)
def programs(name: str) -> Programs:
    return Programs(build(name), (inputs(name),))


@every_backbone
def test_gradients(subject):
    its = programs(subject)
    for name, gradient in named(its.plain.params).items():
        assert finite(gradient), name
    assert any(np.any(gradient != 0) for gradient in jax.tree.leaves(its.plain.params))


@every_backbone
def test_examples_are_independent(subject):
    its = programs(subject)
    x = inputs(subject)
    other = its.pull((np.stack([x[1], x[1][::-1]]),)).y
    close(other[:1], its.plain.y[1:], 1e-4)


@every_backbone
def test_dtypes(subject):
    its = programs(subject)
    assert its.plain.y.dtype == jnp.float32
    assert {leaf.dtype for leaf in parameters(its.module).values()} == {jnp.dtype(jnp.float32)}
    graph = nnx.graphdef(nnx.eval_shape(lambda: build(subject, dtype=jnp.bfloat16)))
    got = jax.jit(lambda state, x: nnx.merge(graph, state)(x))(its.state, inputs(subject))
    assert finite(got)
    want = its.plain.y
    assert np.abs(np.asarray(got, np.float32) - want).max() <= 0.1 * max(np.abs(want).max(), 0.1)


@every_backbone
def test_parameters_are_not_shared(subject):
    assert not nnx.find_duplicates(programs(subject).module)
