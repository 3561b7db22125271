"""Optimizers against optax and closed forms, schedules, decay masks, and refusals."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from attnlab.nn.linear import Linear
from attnlab.nn.norms import LayerNorm
from attnlab.training.optimizer import OPTIMIZERS, OptimizerConfig, decay_mask, make_optimizer, make_schedule


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.embedding = nnx.Param(jnp.ones((6, 4)), logical_axes=("vocab", "embed"))
        self.position = nnx.Param(jnp.ones((3, 4)))
        self.class_token = nnx.Param(jnp.ones((1, 1, 4)))
        self.layers = nnx.List([Linear(4, 4, rngs=rngs)])
        self.norm = LayerNorm(4, rngs=rngs)
        self.norm_like = nnx.List([Linear(4, 4, rngs=rngs)])
        self.gates = nnx.Param(jnp.ones((4,)))
        self.frozen_size = nnx.Param(jnp.ones((4, 4)), weight_decay=False)
        self.wanted = nnx.Param(jnp.ones((4,)), weight_decay=True)


@pytest.fixture
def params():
    return nnx.state(Net(nnx.Rngs(0)), nnx.Param)


def flat(tree):
    return {
        "/".join(str(p.key) for p in path[:-1]): np.asarray(a) for path, a in jax.tree_util.tree_leaves_with_path(tree)
    }


def update(config, params, grads, steps=1):
    optimizer = make_optimizer(config, total_steps=10)
    state = optimizer.init(params)
    for _ in range(steps):
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def test_decay_mask(params):
    decayed = {name for name, yes in flat(decay_mask(params)).items() if yes}
    assert decayed == {"embedding", "layers/0/kernel", "wanted"}


def test_only_decaying_parameters_shrink_without_a_gradient(params):
    config = OptimizerConfig("adamw", learning_rate=0.1, schedule="constant", weight_decay=0.5)
    after, before = flat(update(config, params, jax.tree.map(jnp.zeros_like, params))[0]), flat(params)
    for name, value in before.items():
        factor = 0.95 if name in ("embedding", "layers/0/kernel", "wanted") else 1.0
        np.testing.assert_allclose(after[name], factor * value, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    ("name", "peer"),
    [
        ("adamw", optax.adamw(0.1, weight_decay=0.2, mask=decay_mask)),
        ("nadamw", optax.nadamw(0.1, weight_decay=0.2, mask=decay_mask)),
        ("lion", optax.lion(0.1, weight_decay=0.2, mask=decay_mask)),
        ("lamb", optax.lamb(0.1, weight_decay=0.2, mask=decay_mask)),
        ("adafactor", optax.adafactor(0.1, weight_decay_rate=0.02, weight_decay_mask=decay_mask)),
    ],
)
def test_equals_optax(params, name, peer):
    grads = jax.tree.map(lambda p: jnp.cos(jnp.arange(p.size, dtype=jnp.float32)).reshape(p.shape), params)
    config = OptimizerConfig(name, learning_rate=0.1, schedule="constant", weight_decay=0.2, clip_norm=None)
    ours = flat(update(config, params, grads, steps=3)[0])
    theirs, state = params, peer.init(params)
    for _ in range(3):
        updates, state = peer.update(grads, state, theirs)
        theirs = optax.apply_updates(theirs, updates)
    for key, value in flat(theirs).items():
        np.testing.assert_allclose(ours[key], value, rtol=1e-5, atol=1e-6, err_msg=key)


def test_sgd_with_momentum_and_clipping(params):
    config = OptimizerConfig(
        "sgd", learning_rate=0.1, schedule="constant", weight_decay=0.0, clip_norm=2.0, momentum=0.5
    )
    grads = jax.tree.map(jnp.ones_like, params)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    after = update(config, params, grads, steps=2)[0]
    # Clipped to norm 2; the second step has momentum 1 + 0.5.
    expected = np.asarray(params["gates"][...]) - 0.1 * 2 / math.sqrt(count) * 2.5
    np.testing.assert_allclose(after["gates"][...], expected, rtol=1e-5)


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_minimises_a_quadratic(name):
    # Adafactor and LAMB step in proportion to the size of the parameters, so these are not small.
    params = jax.tree.map(jnp.ones_like, nnx.state(Linear(5, 7, rngs=nnx.Rngs(0)), nnx.Param))
    target = jax.tree.map(lambda p: p + 0.5 * jnp.cos(jnp.arange(p.size)).reshape(p.shape), params)

    def loss(p):
        return optax.tree.norm(jax.tree.map(jnp.subtract, p, target), squared=True)

    optimizer = make_optimizer(OptimizerConfig(name, learning_rate=0.1, weight_decay=0.0), total_steps=60)

    def step(carry, _):
        p, state = carry
        updates, state = optimizer.update(jax.grad(loss)(p), state, p)
        return (optax.apply_updates(p, updates), state), None

    (after, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, length=60))((params, optimizer.init(params)))
    assert loss(after) < 0.3 * loss(params)


def test_muon_treats_inner_matrices_alone(params):
    grads = jax.tree.map(lambda p: jnp.cos(jnp.arange(p.size, dtype=jnp.float32)).reshape(p.shape), params)
    muon = OptimizerConfig("muon", learning_rate=0.1, schedule="constant", weight_decay=0.0, clip_norm=None)
    adam = OptimizerConfig("nadamw", learning_rate=0.1, schedule="constant", weight_decay=0.0, clip_norm=None)
    a, b = flat(update(muon, params, grads)[0]), flat(update(adam, params, grads)[0])
    different = {name for name in a if not np.allclose(a[name], b[name], atol=1e-5)}
    assert different == {"layers/0/kernel"}
    # An orthogonal 4 x 4 update has entries of root mean square 1/2; scaled to 0.2 x sqrt(4).
    step = (a["layers/0/kernel"] - flat(params)["layers/0/kernel"]) / 0.1
    assert np.sqrt(np.mean(step**2)) < 0.25


def test_schedules():
    def rates(**changes):
        schedule = make_schedule(OptimizerConfig(learning_rate=2.0, warmup_steps=4, **changes), total_steps=9)
        return [float(schedule(step)) for step in range(9)]

    rise = [0.5, 1.0, 1.5, 2.0]
    assert rates(schedule="constant") == pytest.approx([*rise, 2, 2, 2, 2, 2])
    assert rates(schedule="linear") == pytest.approx([*rise, 2, 1.5, 1, 0.5, 0])
    assert rates(schedule="linear", end_fraction=0.5) == pytest.approx([*rise, 2, 1.75, 1.5, 1.25, 1])
    cosine = [1 + math.cos(math.pi * i / 4) for i in range(5)]
    assert rates(schedule="cosine") == pytest.approx([*rise, *cosine], abs=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "adamv"}, "no optimizer is called 'adamv': did you mean adamw"),
        ({"name": "zzz"}, "there are adamw, nadamw, lion, lamb, sgd, adafactor, muon"),
        ({"schedule": "cosin"}, "did you mean cosine?"),
        ({"name": "lion", "eps": 1e-8}, "lion has no hyperparameter eps; it has: b1, b2"),
        ({"name": "adamw", "momentum": 0.9}, "adamw has no hyperparameter momentum; it has: b1, b2, eps"),
        ({"clip_norm": -1.0}, "clip_norm must be a finite number of at least 0, not -1.0"),
    ],
)
def test_refusals(settings, message):
    with pytest.raises(ValueError) as error:
        OptimizerConfig(**settings)
    assert message in str(error.value)


def test_warm_up_longer_than_the_training_is_refused():
    with pytest.raises(ValueError, match="warmup_steps=11 is more than the 10 steps"):
        make_optimizer(OptimizerConfig(warmup_steps=11), total_steps=10)
