import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab.analysis.attention_maps import attention_maps
from attnlab.measure import each_layer, measure, watch
from attnlab.models.language_model import LanguageModel
from attnlab.models.vit import ViT


def by_hand(weights, rows, places, sinks=1, prefix=0):
    """In float64, row by row."""
    weights = np.asarray(weights, np.float64)
    found = np.zeros((3, *weights.shape[:2]))
    for b, h in np.ndindex(*weights.shape[:2]):
        sink, entropy, distance = [], [], []
        for n, row in enumerate(weights[b, h]):
            if not rows[b, n] or row.sum() == 0:
                continue
            sink.append(row[:sinks].sum())
            entropy.append(-sum(a * np.log(a) for a in row if a > 0))
            if n >= prefix:
                far = [np.linalg.norm(np.subtract(places[n - prefix], place)) for place in places]
                distance.append(np.dot(row[prefix:], far) / row[prefix:].sum())
        found[:, b, h] = [np.mean(values) if values else 0 for values in (sink, entropy, distance)]
    return found


def maps(tokens, *, causal=False, seed=0):
    scores = jax.random.normal(jax.random.key(seed), (2, 3, tokens, tokens))
    scores = jnp.where(np.tri(tokens, dtype=bool), scores, -jnp.inf) if causal else scores
    return jax.nn.softmax(2 * scores, axis=-1)


def test_equals_sums_by_hand():
    weights, rows = maps(6, causal=True).at[0, 1, 4].set(0), np.ones((2, 6), bool)
    rows[1, :2] = False
    found = attention_maps(weights, mask=jnp.asarray(rows), sinks=2)
    want = by_hand(weights, rows, [[n] for n in range(6)], sinks=2)
    np.testing.assert_allclose(np.stack(found[:3]), want, rtol=1e-5)
    np.testing.assert_array_equal(found.rows, [[6, 5, 6], [4, 4, 4]])

    weights, places = maps(7), [(row, column) for row in range(2) for column in range(3)]
    found = attention_maps(weights, grid=(2, 3), prefix=1)
    want = by_hand(weights, np.ones((2, 7), bool), places, prefix=1)
    np.testing.assert_allclose(np.stack(found[:3]), want, rtol=1e-5)


def test_maps_of_nothing_are_zero_with_finite_gradients():
    def total(weights):
        return sum(field.sum() for field in attention_maps(weights, grid=(2, 2))[:3])

    assert total(jnp.zeros((1, 1, 4, 4))) == 0
    assert jnp.isfinite(jax.grad(total)(jnp.zeros((1, 1, 4, 4)))).all()
    step = 0.02 * maps(4) * jax.random.normal(jax.random.key(1), (2, 3, 4, 4))
    slope = jnp.vdot(jax.grad(total)(maps(4)), step)
    np.testing.assert_allclose(slope, (total(maps(4) + step) - total(maps(4) - step)) / 2, rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prefix": 1}, "prefix 1 is of tokens in front of a grid"),
        ({"grid": (2, 3)}, r"prefix 0 and grid \(2, 3\) are 6 tokens"),
        ({"sinks": 8}, "sinks must be from 0 to the 7 keys, got 8"),
        ({"mask": jnp.ones((2, 6), bool)}, r"mask must be boolean \(2, 7\)"),
    ],
)
def test_refuses_what_does_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        attention_maps(maps(7), **options)


@pytest.mark.parametrize("images", [False, True])
def test_runs_over_a_model(images):
    if images:
        model = ViT((8, 8), 3, patch_size=4, features=8, depth=2, num_heads=2, rngs=nnx.Rngs(0))
        batch, options = jax.random.normal(jax.random.key(0), (3, 8, 8, 3)), {"grid": (2, 2)}
        places = [(row, column) for row in range(2) for column in range(2)]
    else:
        model = LanguageModel(7, features=8, depth=2, num_heads=2, rngs=nnx.Rngs(0))
        batch, options = jax.random.randint(jax.random.key(0), (3, 5), 0, 7), {}
        places = [[n] for n in range(5)]
    found = measure(model, [batch], each_layer(attention_maps, **options))
    seen = jax.jit(lambda batch: watch(model, batch)[1]["attention"])(batch)
    rows = np.ones((3, len(places)), bool)
    want = np.stack([by_hand(weights, rows, places) for weights in seen], axis=2)  # 3, B, L, H
    for name, values in zip(("sink_mass", "entropy", "distance"), want, strict=True):
        np.testing.assert_allclose(found[name].mean, values.mean(0), rtol=1e-5)
        np.testing.assert_allclose(found[name].std, values.std(0), rtol=1e-3, atol=1e-6)
    assert found["rows"].count == 3
