"""Properties of every registered backbone, at miniature sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import attnlab
from attnlab import Kind
from tests.conformance.subjects import close, parameters

every_backbone = pytest.mark.parametrize("name", attnlab.names(kind=Kind.BACKBONE))


def build(name: str, seed: int = 0, **options) -> nnx.Module:
    return attnlab.get(name).target(**attnlab.get(name).options, **options, rngs=nnx.Rngs(seed))


def inputs(name: str) -> jax.Array:
    if vocabulary := attnlab.get(name).options.get("vocab_size"):
        return jax.random.randint(jax.random.key(1), (2, 7), 0, vocabulary)
    return jax.random.normal(jax.random.key(1), (2, 32, 32, 3))


@every_backbone
def test_logits_and_gradients(name):
    """Every parameter has a finite gradient, and examples are independent."""
    model, x = build(name), inputs(name)
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params, x):
        y = nnx.merge(graph, params, rest)(x)
        return jnp.sum(y * jax.random.normal(jax.random.key(9), y.shape)), y

    (_, y), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, x)
    assert y.dtype == jnp.float32
    alone = jax.jit(lambda params, x: loss(params, x)[1])(params, x[:1])
    close(alone, y[:1], 1e-4)
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        assert jnp.isfinite(gradient).all(), path


@every_backbone
def test_dtypes(name):
    model, x = build(name, dtype=jnp.bfloat16), inputs(name)
    assert {leaf.dtype for leaf in parameters(model).values()} == {jnp.dtype(jnp.float32)}
    call = nnx.jit(lambda model, x: model(x))
    got, want = np.asarray(call(model, x), np.float32), np.asarray(call(build(name), x))
    assert np.isfinite(got).all()
    assert np.abs(got - want).max() <= 0.1 * max(np.abs(want).max(), 0.1)


@every_backbone
def test_parameters_are_not_shared(name):
    assert not nnx.find_duplicates(build(name))
