"""Curvature-adaptive attention: its branches against their definitions, its options, and the task it is for."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from attnlab.attention.dense.cat_curvature import BRANCHES, CurvatureAdaptiveAttention
from attnlab.models.link_predictor import LinkPredictor
from attnlab.nn.aux_loss import total_aux_loss
from attnlab.tasks.link_prediction import LinkPrediction
from tests.accuracy import relative_rms


def draw(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def build(**options):
    return CurvatureAdaptiveAttention(8, num_heads=2, **options, rngs=nnx.Rngs(0))


def softmax(scores):
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


@pytest.mark.parametrize("branch", BRANCHES)
def test_each_geometry_alone_is_its_definition(branch):
    mixer, x = build(branches=(branch,)), draw(2, 5, 8)
    graph, state = nnx.split(mixer)

    @jax.jit
    def run(state, x):
        mixer = nnx.merge(graph, state)
        return mixer(x), *(part(x) for part in (mixer.query, mixer.key, mixer.value))

    got, *heads = run(state, x)
    q, k, v = (np.asarray(part, np.float64) for part in heads)
    q, k, v = q / 2, k / 2, v / 2  # √D
    if branch == "euclidean":
        y = np.einsum("bhnm,bmhe->bnhe", softmax(2 * np.einsum("bnhd,bmhd->bhnm", q, k)), v)
    elif branch == "spherical":
        lengths = [np.linalg.norm(part, axis=-1, keepdims=True) for part in (q, k, v)]
        weights = softmax(np.einsum("bnhd,bmhd->bhnm", q / lengths[0], k / lengths[1]))
        y = np.einsum("bhnm,bmhe->bnhe", weights, v / lengths[2])
        y = y / np.linalg.norm(y, axis=-1, keepdims=True) * np.einsum("bhnm,bmhe->bnhe", weights, lengths[2])
    else:

        def point(v):
            r = np.linalg.norm(v, axis=-1, keepdims=True)
            p = np.tanh(r) * v / r
            return p * np.minimum(1, (1 - 4e-3) / np.linalg.norm(p, axis=-1, keepdims=True))

        p, s, t = point(q).swapaxes(1, 2)[:, :, :, None], point(k).swapaxes(1, 2)[:, :, None], point(v).swapaxes(1, 2)
        squares = (np.square(a).sum(-1) for a in (p - s, p, s))
        apart, pp, ss = squares
        weights = softmax(-np.arccosh(1 + 2 * apart / (1 - pp) / (1 - ss)))
        factor = 2 / (1 - np.square(t).sum(-1, keepdims=True))
        m = weights @ (factor * t) / (weights @ (factor - 1))
        r = np.linalg.norm(m, axis=-1, keepdims=True)
        y = (np.arctanh(r) / 2 * m / r).swapaxes(1, 2)
    want = mixer.out((2 * y).astype(np.float32))
    assert relative_rms(got, want) < 2e-5
    assert mixer.router is None


@pytest.mark.slow
def test_options():
    x, mask = draw(2, 6, 8), np.random.default_rng(1).random((2, 2, 6, 6)) < 0.7
    options = {"share_qkv": True, "hyper_agg": "tangent", "sphere_logit": "geodesic", "entropy_weight": 0.5}
    mixer = build(**options, causal=True)
    graph, state = nnx.split(mixer)

    @jax.jit
    def run(state, x, mask):
        mixer = nnx.merge(graph, state, copy=True)
        y, recorded = nnx.capture(mixer, nnx.Intermediate)(x, mask=mask)
        whole = mixer(x)
        prompt, cache = mixer.prefill(x[:, :4], mixer.init_state(2, 6))
        last, _ = mixer.step(x[:, 4], cache)
        mixer(x, deterministic=False)
        return y, recorded["attention"][0], recorded["gate"][0], whole, prompt, last, total_aux_loss(mixer)

    y, weights, shares, whole, prompt, last, loss = run(state, x, mask)
    assert np.isfinite(y).all() and weights.shape == (2, 6, 6, 6)
    hidden = ~np.repeat(mask & np.tri(6, dtype=bool), 3, axis=1)
    assert not np.any(np.asarray(weights)[hidden]), "a mask of each head hides keys in all its geometries"
    np.testing.assert_allclose(shares.sum(-1), 1, rtol=1e-6)
    assert relative_rms(jnp.concatenate([prompt, last[:, None]], 1), whole[:, :5]) < 1e-5
    np.testing.assert_allclose(loss, 0.5 * -(shares * np.log(shares)).sum(-1).mean(), rtol=1e-5)
    few, many = (
        sum(leaf.size for leaf in jax.tree.leaves(nnx.state(build(share_qkv=share), nnx.Param)))
        for share in (True, False)
    )
    assert few < many / 1.7
    for wrong in ({"branches": ("flat",)}, {"hyper_agg": "mean"}, {"sphere_logit": "sin"}, {"num_kv_heads": 1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            build(**wrong)


def test_links_of_the_graph_and_ranks():
    task = LinkPrediction(tree=7, cycle=5, rows=2, columns=3)
    assert len(task.edges()) == 6 + 5 + 7 and task.vocab_size == 18
    assert [(task.parts() == part).sum() for part in range(3)] == [7, 5, 6]
    rest, held = task.split(np.random.default_rng(0), 0.25)
    assert len(held) == 5 and len(rest) == 13
    perfect = np.zeros((18, 18))
    for low, high in task.edges():
        perfect[low, high] = perfect[high, low] = 1
    assert np.all(task.ranks(perfect, held) == 1)
    assert np.all(task.ranks(np.zeros((18, 18)), held) > 5)
    with pytest.raises(ValueError, match="length must be even"):
        LinkPrediction(length=3)


@pytest.mark.slow
def test_a_predictor_learns_the_graph():
    """Trained on all links of a small graph it ranks them far above chance, whose MRR is about 0.25 here."""
    task = LinkPrediction(tree=15, cycle=12, rows=3, columns=4)
    model = LinkPredictor(task.vocab_size, depth=1, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    linked = jnp.asarray(task.oracle(np.stack(np.meshgrid(*[np.arange(39)] * 2, indexing="ij"), -1).reshape(-1, 2)))
    linked = linked[:, 1].reshape(39, 39)

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            losses = optax.sigmoid_binary_cross_entropy(model.scores(), linked)
            return jnp.sum(losses * jnp.where(linked == 1, 10.0, 1.0)) / 39**2

        value, gradient = nnx.value_and_grad(loss)(model)
        optimizer.update(model, gradient)
        return value

    losses = [step(model, optimizer) for _ in range(200)]
    assert losses[-1] < losses[0] / 3
    ranks = task.ranks(np.asarray(model.scores()), task.edges())
    assert np.mean(1 / ranks) > 0.7
