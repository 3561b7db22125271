"""Elastic rules: what heads see in prefill and decoding, plans, their search, and what they cost."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import UnsupportedArgument
from attnlab.analysis.moa_sparse import choose_plan, pareto_plans, rule_grids
from attnlab.attention.dense.softmax_attention import SoftmaxAttention
from attnlab.interventions.moa_sparse import ElasticCore, Plan, cache_sizes, elastic_mask, with_plan
from attnlab.models.language_model import LanguageModel
from attnlab.nn.dense_mixer import with_core
from attnlab.nn.softmax import softmax_attention
from tests.accuracy import relative_rms
from tests.attnlab.attention.sparse_cost import check_growth, temporaries, visited_pairs

ALPHA, BETA = np.array([0.0, 4.0], np.float32), np.array([0.25, 0.0], np.float32)
SMALL = {"block_size": 2, "sink_size": 2, "minimum_size": 1, "page_size": 2}
N, PROMPT = 20, 12


def kept_in_decoding():
    """(H, N, N): the first two tokens, and the newest of which the cache has room for."""
    ring = cache_sizes(ALPHA, BETA, PROMPT, N - PROMPT, sink_size=2, minimum_size=1, page_size=2).size - 2
    behind = np.arange(N)[:, None] - np.arange(N)
    return (behind >= 0) & ((np.arange(N) < 2) | (behind < ring[:, None, None]))


@pytest.mark.parametrize("runs", [(12,), (7, 5)])
def test_prefill_is_by_blocks_and_decoding_by_a_ring_for_each_head(runs):
    mixer = SoftmaxAttention(8, num_heads=4, num_kv_heads=2, causal=True, rotary=100.0, rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).standard_normal((2, N, 8)).astype(np.float32)
    elastic = with_core(mixer, ElasticCore(ALPHA, BETA, rotary=100.0, **SMALL))
    seen, start = kept_in_decoding(), 0
    for run in runs:
        stop = start + run
        rule = np.asarray(elastic_mask(ALPHA, BETA, stop, block_size=2))
        seen[:, start:stop, start:stop] = rule[:, start:, start:]
        start = stop
    # Of two examples the second has padding in front of every run.
    padded = np.zeros((2, PROMPT + 3 * len(runs), 8), np.float32)
    real = np.ones(padded.shape[:2], bool)
    start = 0
    for i, run in enumerate(runs):
        here = slice(start + 3 * i, start + 3 * i + 3 + run)
        real[0, here][run:], real[1, here][:3] = False, False
        for example in range(2):
            padded[example, here][real[example, here]] = x[example, start : start + run]
        start += run

    @jax.jit
    def both(x, padded, real, seen):
        state, rows, start = elastic.init_state(2, N), [], 0
        for run in runs:
            part = slice(start, start + run + 3)
            y, state = elastic.prefill(padded[:, part], state, mask=real[:, part])
            rows.append(y)
            start += run + 3

        def step(state, x_t):
            y, state = elastic.step(x_t, state)
            return state, y

        _, last = jax.lax.scan(step, state, jnp.swapaxes(x[:, PROMPT:], 0, 1))
        at = jnp.arange(N)[None]
        heads = mixer.core.rotary(mixer.query(x), at), mixer.core.rotary(mixer.key(x), at), mixer.value(x)
        want = mixer.out(softmax_attention(*heads, mask=jnp.repeat(seen, 2, axis=0)[None]))
        return jnp.concatenate(rows, 1), jnp.swapaxes(last, 0, 1), want

    prefill, last, want = both(x, padded, real, seen)
    for example in range(2):
        assert relative_rms(prefill[example][real[example]], want[example, :PROMPT]) < 1e-5
    assert relative_rms(last, want[:, PROMPT:]) < 1e-5


def test_a_plan_goes_over_layers_and_keys_that_are_not_there():
    model = LanguageModel(11, features=8, depth=2, num_heads=2, rngs=nnx.Rngs(0))
    ids = np.arange(16).reshape(1, 16) % 11
    sparse = with_plan(model, Plan([ALPHA, ALPHA], [BETA, BETA]), **SMALL)
    full = with_plan(model, Plan([[0, 0]] * 2, [[1, 1]] * 2), **SMALL)
    real = np.arange(16)[None] < 10

    @jax.jit
    def results(ids):
        return model(ids), full(ids), sparse(ids), sparse(ids, mask=real), sparse(ids[:, :10])

    want, whole, some, masked, alone = results(ids)
    assert relative_rms(whole, want) < 1e-5
    assert not np.allclose(some, want, atol=1e-3)
    assert relative_rms(masked[:, :10], alone) < 1e-5
    with pytest.raises(ValueError, match="plan has 1 layers, the model 2"):
        with_plan(model, Plan([ALPHA], [BETA]))
    with pytest.raises(ValueError, match="3 rules for 2 key heads"):
        with_plan(model, Plan([[0] * 3] * 2, [[1] * 3] * 2))
    with pytest.raises(UnsupportedArgument, match="segment_ids"):
        sparse(ids, segment_ids=np.zeros((1, 16), int))


def test_plans_are_the_best_there_are():
    rng = np.random.default_rng(0)
    densities = np.array([[0.2, 0.4, 0.6, 0.9], [0.1, 0.5, 0.7, 0.9]])
    losses = np.sort(rng.random((2, 1, 3, 4)))[..., ::-1] * 4

    def allowed(rules):
        mean = densities[:, rules].mean(1)
        return len(set(rules)) <= 2 and (mean <= 0.5 + 1e-9).all() and (mean >= 0.35 - 1e-9).all()

    choices = [rules for rules in itertools.product(range(4), repeat=3) if allowed(rules)]
    totals = np.array([losses[:, 0, range(3), rules].sum(1) for rules in choices])
    found = pareto_plans(losses, densities, bound=0.5, least=0.7)
    for objective in range(2):
        np.testing.assert_allclose(min(one.losses[objective] for one in found), totals[:, objective].min())
    for one in found:
        assert tuple(one.rules[0]) in choices
        assert not ((totals <= one.losses - 1e-9).all(1)).any(), "nothing is better in all objectives"
    alpha, beta = np.arange(4.0), np.arange(4.0) / 4
    unseen = rng.random((1, 3, 4))
    plan = choose_plan(found, alpha, beta, unseen)
    cost = [unseen[0, range(3), one.rules[0]].sum() for one in found]
    assert plan.alphas[0] == alpha[found[int(np.argmin(cost))].rules[0]].tolist()
    with pytest.raises(ValueError, match="no choice of rules"):
        pareto_plans(losses, densities, bound=0.05)
    np.testing.assert_array_equal(rule_grids(2048, 1024)[0], [-1024, 0, 1024, 2048])


def core(**options):
    return ElasticCore([64.0, 128.0], [0.0, 0.0], **options)


def mixer_of(features=4, **options):
    mixer = SoftmaxAttention(features, num_heads=2, causal=True, rngs=nnx.Rngs(0))
    return with_core(mixer, core(**options))


@pytest.mark.slow
def test_tiles_that_are_visited_grow_as_declared():
    """Linearly in prefill, and not at all in a step: with spans that do not grow."""
    mixer, sizes = mixer_of(minimum_size=64), (512, 1024)
    x = np.zeros((1, 1024, 4), np.float32)
    visited = [visited_pairs(mixer, x[:, :n]) for n in sizes]
    check_growth(visited, sizes, 1.1)
    assert visited[1] < 0.25 * 2 * 1024**2
    steps = []
    for n in sizes:
        _, state = jax.jit(mixer.prefill)(x[:, : n - 1], mixer.init_state(1, n))
        steps.append(visited_pairs(mixer.step, x[:, n - 1], state))
    assert steps == [64 + 128] * 2


@pytest.mark.slow
def test_memory_grows_as_declared():
    mixer, sizes = mixer_of(64), (2048, 4096)
    shapes = [jax.ShapeDtypeStruct((1, n, 64), np.float32) for n in sizes]
    check_growth([temporaries(mixer, shape) for shape in shapes], sizes)
