"""Reversed attention: how messages are accounted for, the kernel's form, pruning and sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab.attention.dense.dependencyvit import ReversedAttention, parents, reversed_attention
from attnlab.models.dependencyvit import DEPENDENCYVITS, DependencyViT, kept_tokens
from attnlab.models.staged import build_named
from tests.accuracy import relative_rms

SMALL = {"features": 8, "num_heads": 2, "depth": 3, "mlp_ratio": 1.0, "image_size": 32, "patch_size": 8}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n == "dependencyvit_lite_tiny" else pytest.mark.slow) for n in DEPENDENCYVITS]
)
def test_sizes_are_those_of_vit_and_two_maps_in_each_block(name):
    features = DEPENDENCYVITS[name][1].get("features", 192)
    model = nnx.eval_shape(lambda: build_named(DEPENDENCYVITS, name, rngs=nnx.Rngs(0)))
    count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    # ViT-Ti and ViT-S without the class token and its position, without biases of qkv, with factors of both branches.
    vit = {192: 5_717_416, 384: 22_050_664}[features] - 2 * features - 12 * features
    assert count == vit + 12 * (features * 12 + features**2 // 2 + features // 2)


def test_what_parents_are_sent_is_what_children_send():
    module = ReversedAttention(16, num_heads=4, rngs=nnx.Rngs(0))
    keys = jax.random.split(jax.random.key(0), 2)
    x, before = jax.random.normal(keys[0], (2, 9, 16)), jax.random.uniform(keys[1], (2, 9))
    mask, after = module.dependencies(x, before), module(x, before).message
    np.testing.assert_allclose(mask.sum(1), after, atol=1e-6)
    assert (after < before).all()
    np.testing.assert_array_equal(parents(mask)[0, 3], np.argmax(mask[0, :, 3]))


def test_the_kernel_gives_the_same_without_a_map():
    q, k, v = (jax.random.normal(key, (2, 7, 2, 4)) for key in jax.random.split(jax.random.key(0), 3))
    gate = jax.random.uniform(jax.random.key(1), (2, 7, 2))

    def both(q, k, v, gate, kernel):
        return jax.value_and_grad(lambda *a: jnp.sin(reversed_attention(*a, kernel=kernel)).sum(), (0, 1, 2, 3))(
            q, k, v, gate
        )

    dense, kernel = (jax.jit(both, static_argnums=4)(q, k, v, gate, kernel) for kernel in (None, "auto"))
    for one, other in zip(*map(jax.tree.leaves, (dense, kernel)), strict=True):
        assert relative_rms(other, one) < 2e-6


def test_lite_models_leave_out_what_sends_least():
    model = DependencyViT(**SMALL, prune_layers=(1, 3), prune_ratio=0.25, num_classes=3, rngs=nnx.Rngs(0))
    assert [kept_tokens(16, 0.25, 1), kept_tokens(12, 0.25, 2)] == [12, 8]
    images = jax.random.normal(jax.random.key(0), (2, 32, 32, 3))
    messages = nnx.jit(lambda m, x: m.messages(x))(model, images)
    assert [m.shape[1] for m in messages] == [12, 12, 8]
    assert (np.diff(messages[0], axis=1) <= 0).all() and (messages[0] <= 1).all()
    with pytest.raises(ValueError, match="tokens are left out"):
        nnx.eval_shape(lambda m: m.stages(images), model)
    whole = nnx.eval_shape(lambda: DependencyViT(**SMALL, rngs=nnx.Rngs(0)))
    assert nnx.eval_shape(lambda m: m.stages(images), whole)[0].shape == (2, 4, 4, 8)


def test_refusals():
    for options in ({"prune_layers": (2,)}, {"prune_ratio": 0.1}, {"prune_layers": (1, 2), "prune_ratio": 0.5}):
        with pytest.raises(ValueError, match="prune_ratio must be"):
            DependencyViT(**SMALL, **options, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"prune_layers must be among 1..3"):
        DependencyViT(**SMALL, prune_layers=(4,), prune_ratio=0.1, rngs=nnx.Rngs(0))
    module = ReversedAttention(8, num_heads=2, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"message must be \(B, N\) = \(1, 3\)"):
        module(jnp.ones((1, 3, 8)), jnp.ones((1, 4)))
