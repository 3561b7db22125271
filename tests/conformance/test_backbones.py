"""Properties of every registered backbone, at miniature sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import attnlab
from attnlab import Kind
from tests.conformance.subjects import close, parameters

PYRAMID = {"num_heads": (1, 2, 2, 2), "depths": (1, 1, 1, 1), "num_classes": 5, "image_size": 32}
BACKBONES = {
    "agent_attention.pvt": {"features": (8, 8, 16, 16), "num_agents": (4, 4, 1, 1), **PYRAMID},
    "agent_attention.swin": {"features": 8, "num_agents": (4, 4, 1, 1), "window": 8, **PYRAMID},
    "agent_attention.cswin": {"features": 8, **PYRAMID, "num_heads": (2, 2, 4, 4), "num_agents": (4, 4, 1, 1)},
    "agent_attention.deit": {
        "features": 16, "num_heads": 2, "depth": 2, "num_agents": 4, "num_classes": 5, "image_size": 32,
    },
    "inline_attention.pvt": {"features": (8, 8, 16, 16), **PYRAMID},
    "inline_attention.swin": {"features": 8, "window": 8, **PYRAMID},
    "inline_attention.cswin": {"features": 8, **PYRAMID, "num_heads": (2, 2, 4, 4)},
    "inline_attention.deit": {"features": 16, "num_heads": 2, "depth": 2, "num_classes": 5, "image_size": 32},
    "biformer_bra.biformer": {
        "num_classes": 5, "depths": (1, 1, 1, 1), "widths": (8, 8, 16, 16), "head_dim": 8, "n_win": 1,
        "topks": (1, 1, 1, -2),
    },
    "tnl.transnormer": {"vocab_size": 11, "features": 16, "depth": 2, "num_heads": 2},
}  # fmt: skip
every_backbone = pytest.mark.parametrize("name", sorted(BACKBONES))


def build(name: str, seed: int = 0, **options) -> nnx.Module:
    return attnlab.get(name).cls(**BACKBONES[name], **options, rngs=nnx.Rngs(seed))


def inputs(name: str) -> jax.Array:
    if "vocab_size" in BACKBONES[name]:
        return jax.random.randint(jax.random.key(1), (2, 7), 0, BACKBONES[name]["vocab_size"])
    return jax.random.normal(jax.random.key(1), (2, 32, 32, 3))


def test_every_registered_backbone_is_here():
    assert sorted(BACKBONES) == list(attnlab.names(kind=Kind.BACKBONE))


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
