"""Multi-variate parallel attention against its equations in float64, and its model and loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab.attention.dense.mvpa import MultiVariateParallelAttention
from attnlab.interop.mvpa import OFFICIAL
from attnlab.interop.official import choose
from attnlab.models.mvpformer import MVPFormer
from attnlab.nn.lora import adapter_parameters
from attnlab.objectives.contrastive import contrastive_loss, sample_negatives
from tests.accuracy import relative_rms
from tests.attnlab.attention.sparse_cost import check_growth, temporaries

T, C, E, H, G = 5, 3, 8, 4, 2
D = E // H


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def kernel(layer):
    return np.asarray(layer.kernel[...], np.float64)


def by_equations(mixer, x, time, channel, mask, *, window, content, scale):
    """The docstring's equations, token by token."""
    q, k, v = (np.einsum("btce,ehd->btchd", x, kernel(part)) for part in (mixer.query, mixer.key, mixer.value))
    p, r = (np.einsum("te,ehd->thd", a, kernel(b)) for a, b in ((time, mixer.time_key), (channel, mixer.channel_key)))
    u, w, z = np.asarray(mixer.biases[...], np.float64)
    y = np.zeros((*q.shape[:4], D))
    for b, t, c, h in np.ndindex(*q.shape[:4]):
        g, own, scores, values = h // (H // G), q[b, t, c, h], [], []
        for s, d in np.ndindex(t + 1, C):
            if not mask[b, s, d]:
                continue
            score = (own + w[g]) @ p[T - 1 - (t - s), g] + (own + z[g]) @ r[C - 1 - abs(c - d), g]
            if content and (t - s <= window or t == T - 1):
                score += (own + u[g]) @ k[b, s, d, g]
            scores.append(scale * score)
            values.append(v[b, s, d, g])
        if scores:
            weights = np.exp(np.array(scores) - max(scores))
            y[b, t, c, h] = weights @ np.array(values) / weights.sum()
    return np.einsum("btchd,hde->btce", y, kernel(mixer.out))


@pytest.mark.parametrize(
    ("options", "scale"),
    [({"window": 1}, D**-0.5), ({"content": False, "scaled": False, "scale_by_layer": True, "layer": 2}, 1 / 3)],
)
def test_it_is_its_equations(options, scale):
    mixer = MultiVariateParallelAttention(E, num_heads=H, num_kv_heads=G, **options, rngs=nnx.Rngs(0))
    mixer.biases[...] = draw(3, G, D)
    x, time, channel = draw(2, T, C, E), draw(T, E, seed=1), draw(C, E, seed=2)
    mask = np.random.default_rng(3).random((2, T, C)) < 0.7
    mask[1, 0] = False
    want = by_equations(
        mixer,
        x,
        time,
        channel,
        mask,
        window=options.get("window", 10),
        content=options.get("content", True),
        scale=scale,
    )
    assert relative_rms(mixer(x, time, channel, mask=mask), want) < 1e-6
    y, weights = mixer.with_weights(x, time[None], channel[None], mask=mask)
    assert relative_rms(y, want) < 1e-6
    np.testing.assert_allclose(weights.sum(-1).min(), 0)
    assert not np.any(want[1, 0])


def test_refusals():
    mixer = MultiVariateParallelAttention(E, num_heads=H, rngs=nnx.Rngs(0))
    x, time, channel = draw(2, T, C, E), draw(T, E), draw(C, E)
    with pytest.raises(ValueError, match=r"time must be \(1, 5, 8\)"):
        mixer(x, time[:-1], channel)
    with pytest.raises(ValueError, match="mask must be boolean"):
        mixer(x, time, channel, mask=np.ones((2, T, C)))
    with pytest.raises(ValueError, match="window must be"):
        MultiVariateParallelAttention(E, num_heads=H, window=-1, rngs=nnx.Rngs(0))
    model = MVPFormer(features=E, depth=1, num_heads=H, hidden_features=8, max_times=4, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="x has 5 times"):
        model(x)


def test_official_adapters_are_loaded_and_dumped():
    config = {"hidden_size": E, "num_attention_heads": H, "n_head_kv": G, "n_layer": 1, "n_inner": 8, "lora_rank": 2}
    config |= {"n_positions": T, "n_channels": C, "lora": True}
    official = choose(OFFICIAL, "MVPFormerModel", config, ())
    model = official.build(config)
    names = official.rules(model).names()
    assert {f"h.0.attn.{part}_attn.lora_{side}" for part in "qc" for side in "AB"} < set(names)
    arrays = {name: draw(*array.shape, seed=i) for i, (name, array) in enumerate(official.dump(model).items())}
    assert arrays["h.0.attn.c_attn.weight"].shape == (2 * G * D, E)
    assert arrays["h.0.attn.c_attn.lora_B"].shape == (G * D, 2)
    official.load(model, arrays)
    for name, array in official.dump(model).items():
        np.testing.assert_array_equal(array, arrays[name])
    assert len(jax.tree.leaves(nnx.state(model, adapter_parameters("lora")))) == 4
    value = model.blocks[0].attention.value
    change = arrays["h.0.attn.c_attn.lora_B"] @ arrays["h.0.attn.c_attn.lora_A"] * 16 / 2
    want = (arrays["h.0.attn.c_attn.weight"][G * D :] + change) @ draw(E, seed=9)
    np.testing.assert_allclose(value(draw(E, seed=9)).ravel(), want, rtol=1e-4, atol=1e-4)


def test_the_small_model_of_the_paper_has_its_parameters():
    sizes = {"num_kv_heads": 4, "hidden_features": 1728}
    shapes = nnx.eval_shape(lambda: nnx.state(MVPFormer(**sizes, rngs=nnx.Rngs(0)), nnx.Param))
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    block = 2 * 768**2 + 4 * 256 * 768 + 3 * 256 + 3 * 768 * 1728 + 768
    assert count == 12 * block + 768 + (100 + 128) * 768


def test_contrastive_loss_is_cross_entropy_of_cosines():
    p, e = draw(2, 4, 3, 6), draw(2, 4, 3, 6, seed=1)
    n = np.array(sample_negatives(e, jax.random.key(0), 5))
    n[0, 2, 1, 0] = e[0, 2, 1]  # the positive itself

    def cosine(a, b):
        return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)

    scores = np.stack([cosine(p[:, :-1], e[:, 1:]), *(cosine(p[:, :-1], n[:, 1:, :, i]) for i in range(5))], -1) / 0.1
    scores[0, 1, 1, 1] = -np.inf
    for b, t, c, i in np.ndindex(2, 3, 3, 5):
        if np.allclose(n[b, t + 1, c, i], e[b, t + 1, c]):
            scores[b, t, c, 1 + i] = -np.inf
    want = (np.log(np.exp(scores).sum(-1)) - scores[..., 0]).mean((1, 2))
    np.testing.assert_allclose(contrastive_loss(p, e, n), want, rtol=1e-5)
    alone = contrastive_loss(p, e, np.broadcast_to(e[..., None, :], n.shape))
    np.testing.assert_allclose(alone, 0, atol=1e-6)


def test_negatives_are_of_other_places():
    rows = jnp.arange(12.0).reshape(2, 3, 2, 1)
    drawn = np.asarray(sample_negatives(rows, jax.random.key(0), 200))
    for place in np.ndindex(2, 3, 2):
        assert set(drawn[place].ravel()) == set(range(12)) - {float(rows[place][0])}
    with pytest.raises(ValueError, match="two places"):
        sample_negatives(rows[:1, :1, :1], jax.random.key(0))


@pytest.mark.slow
def test_memory_grows_as_declared():
    """No map of all tokens on all: tables of times and of channels for each token."""
    mixer = MultiVariateParallelAttention(E, num_heads=H, rngs=nnx.Rngs(0))

    def bytes_at(times: int, channels: int) -> int:
        shapes = (1, times, channels, E), (times, E), (channels, E)
        return temporaries(mixer, *(jax.ShapeDtypeStruct(shape, np.float32) for shape in shapes))

    sizes = ((64, 16), (128, 16))
    check_growth(tuple(bytes_at(*size) for size in sizes), tuple(t * c * (t + c) for t, c in sizes))
