"""Selection, orders and merging of tokens against loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.nn.token_merging import match_alternate
from attnlab.nn.token_selection import group_by, select_top
from tests.accuracy import relative_rms


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_the_best_stay_and_the_rest_are_fused():
    x, scores = draw(0, 2, 5, 3), np.array([[0.2, 0.9, 0.1, 0.9, 0.3], [5.0, 4.0, 3.0, 2.0, 1.0]], np.float32)
    chosen = select_top(scores, 3)
    np.testing.assert_array_equal(chosen.kept, [[1, 3, 4], [0, 1, 2]])
    np.testing.assert_array_equal(chosen.rest, [[0, 2], [3, 4]])
    np.testing.assert_array_equal(select_top(scores, 3, by_score=True).kept, [[1, 3, 4], [0, 1, 2]])
    np.testing.assert_array_equal(select_top(scores, 4, by_score=True).kept[0], [1, 3, 4, 0])
    np.testing.assert_array_equal(chosen.keep(x)[0], x[0, [1, 3, 4]])
    want = np.stack([0.2 * x[0, 0] + 0.1 * x[0, 2], 2.0 * x[1, 3] + x[1, 4]])[:, None]
    assert relative_rms(chosen.fuse(x, scores), want) < 1e-6
    assert chosen.fuse(jnp.asarray(x, jnp.bfloat16), scores).dtype == jnp.bfloat16

    def total(x, scores):
        chosen = select_top(scores, 3)
        return chosen.keep(x).sum() + chosen.fuse(x, scores).sum()

    dx, dscores = jax.grad(total, (0, 1))(x, scores)
    np.testing.assert_allclose(dx[0, :, 0], [0.2, 1, 0.1, 1, 1], rtol=1e-6)
    np.testing.assert_allclose(dscores[0], [x[0, 0].sum(), 0, x[0, 2].sum(), 0, 0], rtol=1e-5)
    with pytest.raises(ValueError, match=r"k must be in 0\.\.5"):
        select_top(scores, 6)


def test_groups_and_back():
    labels, x = np.array([[2, 0, 2, 1, 0]]), draw(0, 1, 5, 3)
    order = group_by(labels)
    np.testing.assert_array_equal(order.places, [[1, 4, 3, 0, 2]])
    np.testing.assert_array_equal(order.sort(x)[0], x[0, [1, 4, 3, 0, 2]])
    np.testing.assert_array_equal(order.unsort(order.sort(x)), x)


def test_alternate_tokens_merge_by_size():
    tokens, merged, protected = 9, 3, 1
    x, sizes = draw(0, 2, tokens, 4), np.random.default_rng(1).integers(1, 4, (2, tokens)).astype(np.float32)
    merging = match_alternate(x, merged, protected=protected)
    got, new_sizes, back = merging.merge(x, sizes), merging.sizes(sizes), merging.unmerge(merging.merge(x))
    for b in range(2):
        unit = np.float64(x[b]) / np.linalg.norm(x[b], axis=-1, keepdims=True)
        like = unit[0::2] @ unit[1::2].T
        like[0] = -np.inf
        best = sorted(np.argsort(-like.max(1), kind="stable")[:merged])
        groups = [[2 * s] for s in range(5) if s not in best]
        groups += [[2 * d + 1, *(2 * s for s in best if like[s].argmax() == d)] for d in range(4)]
        for place, group in enumerate(groups):
            share = sizes[b, group] / sizes[b, group].sum()
            assert relative_rms(got[b, place], share @ np.float64(x[b, group])) < 1e-6
            assert float(new_sizes[b, place]) == sizes[b, group].sum()
            for token in group:
                assert relative_rms(back[b, token], np.float64(x[b, group]).mean(0)) < 1e-6
    assert groups[0] == [0]
    half = merging.merge(jnp.asarray(x, jnp.bfloat16))
    assert half.dtype == jnp.bfloat16 and relative_rms(half, merging.merge(x)) < 1e-2
    gradient = jax.grad(lambda x: match_alternate(x, merged).merge(x).sum())(x)
    assert float(gradient.sum()) == pytest.approx(2 * 4 * (tokens - merged), rel=1e-5)


def test_no_more_are_merged_than_may():
    assert match_alternate(draw(0, 1, 5, 2), 9, protected=1).merged == 2
    assert match_alternate(draw(0, 1, 2, 2), 9, protected=2).merged == 0
    alone = match_alternate(draw(0, 1, 1, 2), 3)
    np.testing.assert_array_equal(alone.unmerge(alone.merge(np.ones((1, 1, 2)))), np.ones((1, 1, 2)))
    with pytest.raises(ValueError, match="merged and protected"):
        match_alternate(draw(0, 1, 4, 2), -1)
