"""Properties of every registered pooling: tokens (B, N, C) to one vector (B, C')."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import attnlab
from attnlab import Kind, Site
from tests.conformance.subjects import close, parameters

FEATURES, HEADS, TOKENS = 32, 4, 16
every_pooling = pytest.mark.parametrize("variant", attnlab.variants(kind=Kind.POOLING), ids=lambda v: v.name)


def build(variant: attnlab.Variant, seed: int = 0, **options) -> attnlab.Pooling:
    site = Site(FEATURES, HEADS, grid=(4, 4))
    return variant.create(site, rngs=nnx.Rngs(seed), **{**variant.options, **options})


def tokens(batch: int = 2) -> jax.Array:
    return jax.random.normal(jax.random.key(1), (batch, TOKENS, FEATURES))


@every_pooling
def test_shape_and_dtype(variant):
    pool = build(variant)
    for batch in (1, 3):
        for dtype in (jnp.float32, jnp.bfloat16):
            y = pool(tokens(batch).astype(dtype))
            assert y.shape == (batch, pool.out_features)
            assert y.dtype == dtype
            assert jnp.isfinite(y).all()
    assert build(variant, dtype=jnp.bfloat16)(tokens()).dtype == jnp.bfloat16
    stored = build(variant, param_dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in parameters(stored).values()} <= {jnp.dtype(jnp.bfloat16)}


@every_pooling
def test_bfloat16_is_near_float32(variant):
    pool, x = build(variant), tokens().astype(jnp.bfloat16)
    close(pool(x), pool(x.astype(jnp.float32)), 4e-2)


@every_pooling
def test_jit_equals_eager(variant):
    pool = build(variant)
    close(nnx.jit(lambda pool, x: pool(x))(pool, tokens()), pool(tokens()))


@every_pooling
def test_examples_are_independent(variant):
    """In evaluation; what couples a batch in training is said in the mechanism's docstring."""
    pool, x = build(variant), tokens(3)
    close(jnp.concatenate([pool(x[i : i + 1]) for i in range(3)]), pool(x))


@every_pooling
def test_gradients(variant):
    graph, params, rest = nnx.split(build(variant), nnx.Param, ...)

    def loss(params, x):
        y = nnx.merge(graph, params, rest)(x)
        return jnp.sum(y * jax.random.normal(jax.random.key(9), y.shape))

    of_params, of_tokens = jax.jit(jax.grad(loss, (0, 1)))(params, tokens())
    for path, gradient in jax.tree_util.tree_leaves_with_path((of_params, of_tokens)):
        assert jnp.isfinite(gradient).all(), path
        assert jnp.any(gradient != 0), f"{jax.tree_util.keystr(path)} has no gradient"


@every_pooling
def test_records_what_it_attends_to(variant):
    pool, x = build(variant), tokens()
    y, intermediates = nnx.capture(pool, nnx.Intermediate)(x)
    np.testing.assert_array_equal(y, pool(x))
    if "attention" in intermediates:
        weights = intermediates["attention"][0]
        assert weights.ndim == 4
        assert weights.shape[0] == 2
        assert weights.dtype == jnp.float32


@every_pooling
def test_refusals(variant):
    pool = build(variant)
    for wrong in (tokens()[0], tokens()[..., :-1], tokens()[:, :0]):
        with pytest.raises(ValueError, match="tokens"):
            pool(wrong)
    with pytest.raises(TypeError, match="no option"):
        build(variant, no_such_option=1)
