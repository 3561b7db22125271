"""Poolings: the contract over every registered one, and what each promises beyond its goldens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import attnlab
from attnlab import Kind, Site, UnsupportedArgument
from attnlab.pooling.abmilp import ABMILPPooling
from attnlab.pooling.cbam import CBAMPooling
from attnlab.pooling.efficient_probing import EfficientProbing, efficient_probing
from attnlab.pooling.mean import FirstToken, MeanPooling
from attnlab.pooling.probe import Probe
from attnlab.pooling.siglip import SigLIPPooling
from attnlab.pooling.simpool import SimPool

FEATURES, GRID = 16, (3, 4)
GATED = {"efficient_probing.cbam", "efficient_probing.dolg"}
every_pooling = pytest.mark.parametrize("name", attnlab.names(kind=Kind.POOLING))


def tokens(batch: int = 3, count: int = 12, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (batch, count, FEATURES))


def build(name: str, grid: tuple[int, ...] | None = GRID, **options) -> attnlab.Pooling:
    return attnlab.create(name, Site(FEATURES, 2, grid=grid), rngs=nnx.Rngs(0), **options)


def test_all_poolings_of_the_paper_are_registered():
    words = ("abmilp", "aim", "cae", "cait", "cbam", "clip", "coca", "dinovit", "dolg", "esimpool", "jepa", "siglip")
    names = {"efficient_probing", "efficient_probing.simpool", *(f"efficient_probing.{word}" for word in words)}
    assert names <= set(attnlab.names(kind=Kind.POOLING))


@every_pooling
def test_a_mask_leaves_the_tokens_that_exist(name: str):
    """Masked tokens are as if they were not there, and nothing breaks where none is; or the mask is refused."""
    pool, x = build(name), tokens(2)
    last = jnp.arange(12) < 7
    mask = jnp.stack([last, jnp.zeros(12, bool)])
    if "mask" not in pool.accepts:
        with pytest.raises(UnsupportedArgument, match="does not take mask"):
            pool(x, mask=mask)
        return

    @jax.jit
    def values(x):
        y, pull = jax.vjp(lambda x: pool(x, mask=mask), x)
        return y, pool(jnp.where(mask[..., None], x, 7 * x + 1), mask=mask), pool(x[:1, :7]), pull(y)[0]

    if name == "efficient_probing.clip":  # has a position for each token, and so their number: none can be missing
        values = jax.jit(lambda x: (*(pool(x, mask=mask),) * 3, jax.grad(lambda x: pool(x, mask=mask).sum())(x)))
    y, changed, alone, gradient = values(x)
    assert jnp.isfinite(y).all() and jnp.isfinite(gradient).all() and not jnp.any(gradient[0, 7:])
    np.testing.assert_allclose(changed, y, rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(alone[:1], y[:1], rtol=2e-5, atol=2e-6)


# The branches of ACMIL stand beside its vector.
MADE_OF_BRANCHES = [name for name in attnlab.names(kind=Kind.POOLING) if name not in ("acmil", "acmil.heads")]


@pytest.mark.parametrize("name", MADE_OF_BRANCHES)
def test_branches_make_the_vector(name: str):
    pool, x = build(name), tokens(2)
    branches, y = jax.jit(lambda x: (pool.branches(x), pool(x)))(x)
    assert branches.ndim == 3 and branches.shape[0] == 2
    np.testing.assert_allclose(branches.reshape(2, -1), y, rtol=2e-5, atol=2e-6)


@every_pooling
def test_every_token_matters_and_gradients_are_finite(name: str):
    pool, x = build(name), tokens(2)
    direction = jax.random.normal(jax.random.key(5), (2, pool.out_features))
    graph, state = nnx.split(pool)

    def score(state, x):
        return jnp.vdot(nnx.merge(graph, state)(x), direction)

    by_parameter, by_token = jax.jit(jax.grad(score, argnums=(0, 1), allow_int=True))(state, x)
    assert (jnp.abs(by_token).max(-1) > 0).all()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((by_parameter, by_token)) if leaf.dtype == x.dtype)


@every_pooling
def test_weights_are_recorded(name: str):
    pool, x = build(name), tokens(2)
    intermediates = nnx.jit(lambda pool, x: nnx.capture(nnx.clone(pool), nnx.Intermediate)(x)[1])(pool, x)
    if name in GATED:
        assert "gate" in intermediates
        return
    (weights,) = intermediates["attention"]
    assert weights.ndim == 4 and weights.shape[0] == 2 and weights.shape[-1] == 12 and weights.dtype == jnp.float32
    sums = np.asarray(weights.sum(-1))
    # Where a class token is among the keys, it has the rest.
    rest = name in ("efficient_probing.clip", "efficient_probing.cait")
    assert (sums < 1).all() if rest else np.allclose(sums, 1, atol=1e-5)


@every_pooling
def test_other_shapes_are_refused(name: str):
    pool = build(name)
    for shape in [(12, FEATURES), (2, 12, FEATURES + 1), (2, 0, FEATURES)]:
        with pytest.raises(ValueError, match=r"pools tokens \(B, N, 16\)"):
            pool(jnp.zeros(shape))


def test_pooling_before_projecting_is_projecting_before_pooling():
    rng = np.random.default_rng(0)
    x, queries = rng.normal(size=(2, 9, 12)), rng.normal(size=(3, 12))
    value, bias = rng.normal(size=(12, 6)), rng.normal(size=6)
    scores = np.einsum("qc,bnc->bqn", queries, x) * 12**-0.5
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    projected = (x @ value + bias).reshape(2, 9, 3, 2)
    expected = np.einsum("bqn,bnqd->bqd", weights, projected).reshape(2, 6)
    got = efficient_probing(*(jnp.asarray(a, jnp.float32) for a in (x, queries, value, bias)))
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_efficient_probing_has_one_rectangular_map_and_its_queries():
    pool = EfficientProbing(64, num_queries=4, out_features=32, rngs=nnx.Rngs(0))
    count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(pool, nnx.Param)))
    assert count == 4 * 64 + 64 * 32
    assert pool(jnp.ones((1, 5, 64))).shape == (1, 32)


def test_queries_of_the_caller_replace_the_learned_ones():
    pool, x = build("efficient_probing"), tokens(2)
    learned = jnp.broadcast_to(pool.queries[...], (2, *pool.queries.shape))
    np.testing.assert_allclose(pool(x, learned), pool(x), rtol=1e-6)
    assert not np.allclose(pool(x, -10 * learned), pool(x))
    with pytest.raises(ValueError, match=r"queries must have shape \(2, 16, 16\), got \(2, 1, 16\)"):
        pool(x, learned[:, :1])


def test_options_that_do_not_fit_are_refused():
    rngs = nnx.Rngs(0)
    with pytest.raises(ValueError, match="num_queries must divide out_features 16, got 5"):
        EfficientProbing(16, num_queries=5, rngs=rngs)
    with pytest.raises(ValueError, match="num_heads must divide the 16 channels, got 3"):
        SigLIPPooling(16, num_heads=3, rngs=rngs)
    with pytest.raises(ValueError, match="use_beta shifts the generalised mean: it needs gamma"):
        SimPool(16, use_beta=True, rngs=rngs)
    with pytest.raises(ValueError, match="positions need the grid"):
        ABMILPPooling(16, positions=True, rngs=rngs)
    with pytest.raises(UnsupportedArgument, match="the site must say its grid"):
        build("efficient_probing.clip", grid=None)


def test_a_map_must_be_square_or_have_a_grid():
    with pytest.raises(ValueError, match="a square number of tokens"):
        CBAMPooling(16, rngs=nnx.Rngs(0))(tokens())
    assert CBAMPooling(16, grid=(3, 4), rngs=nnx.Rngs(0))(tokens()).shape == (3, 16)


def test_mean_and_first_token():
    x = tokens()
    np.testing.assert_allclose(MeanPooling(FEATURES)(x), np.asarray(x).mean(1), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(FirstToken(FEATURES)(x), x[:, 0])
    # 300 ones and 300 zeros: a sum in bfloat16 stops at 256.
    ones = jnp.concatenate([jnp.ones((1, 300, FEATURES)), jnp.zeros((1, 300, FEATURES))], 1).astype(jnp.bfloat16)
    np.testing.assert_array_equal(MeanPooling(FEATURES)(ones), jnp.full((1, FEATURES), 0.5, jnp.bfloat16))


def test_a_probe_normalises_what_is_pooled():
    probe = Probe(MeanPooling(FEATURES), 5, rngs=nnx.Rngs(0))
    x = 100 + 3 * tokens(64, 2)
    trained = probe(x, deterministic=False)
    assert trained.shape == (64, 5)
    mean = np.asarray(x).mean(1)
    normal = (mean - mean.mean(0)) / np.sqrt(mean.var(0) + 1e-6)
    np.testing.assert_allclose(trained, normal @ np.asarray(probe.classifier.kernel[...]), rtol=2e-3, atol=2e-4)
    np.testing.assert_allclose(probe.norm.mean[...], 0.1 * mean.mean(0), rtol=1e-4)
    assert {"scale", "bias"} & set(dict(nnx.to_flat_state(nnx.state(probe.norm, nnx.Param)))) == set()
