import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab.interventions.head_scaling import HeadScaling
from attnlab.measure import measure, watch
from attnlab.models.language_model import LanguageModel
from attnlab.points import attach


@pytest.fixture(scope="module")
def model():
    mixer = ("lightning_attention_2", "softmax_attention")
    return LanguageModel(7, features=8, depth=2, num_heads=2, mixer=mixer, rngs=nnx.Rngs(0))


def ids(batch, length=5, seed=0):
    return jax.random.randint(jax.random.key(seed), (batch, length), 0, 7)


def test_statistics_are_those_of_all_examples_at_once(model):
    data = np.asarray(ids(7))
    batches = [{"inputs": data[i : i + 3], "real": data[i : i + 3, 0] != data[0, 0]} for i in (0, 3, 6)]
    seen = []

    def fn(seen_, batch):
        seen.append(1)
        stream = jnp.stack(seen_["stream"], axis=1)  # (B, L, N, C)
        large = 1e4 + stream.mean((2, 3))
        unknown = jnp.where(batch["real"][:, None], large, jnp.nan)
        return {"stream": stream.mean(2), "large": large, "some": (unknown, batch["real"]), "none": (large, large < 0)}

    found = measure(model, batches, fn)
    assert len(seen) == 2, "compiled once for each size of a batch"
    values = np.asarray(jnp.stack(jax.jit(lambda x: watch(model, x)[1]["stream"])(data), axis=1), np.float64)
    np.testing.assert_allclose(found["stream"].mean, values.mean((0, 2)), atol=1e-6)
    np.testing.assert_allclose(found["stream"].std, values.mean(2).std(0), rtol=1e-5)
    np.testing.assert_allclose(found["large"].std, values.mean((2, 3)).std(0), rtol=5e-3)
    real = data[:, 0] != data[0, 0]
    assert 0 < real.sum() < 7
    np.testing.assert_allclose(found["some"].mean, 1e4 + values[real].mean((0, 2, 3)), rtol=1e-6)
    assert found["some"].count.tolist() == [real.sum()] * 2 and found["stream"].count == 7
    assert np.isnan(found["none"].mean).all() and np.isnan(found["none"].std).all()


def test_points_that_are_not_read_cost_nothing(model):
    graph, state = nnx.split(model)

    def flops(read):
        def run(state, ids):
            result, seen = watch(nnx.merge(graph, state), ids)
            return read(result, seen)

        return jax.jit(run).lower(state, ids(2)).compile().cost_analysis()["flops"]

    plain = jax.jit(lambda state, ids: nnx.merge(graph, state)(ids)).lower(state, ids(2)).compile()
    assert flops(lambda result, seen: result) == plain.cost_analysis()["flops"]
    assert flops(lambda result, seen: seen["stream"][0]) < 0.2 * plain.cost_analysis()["flops"]


def test_layers_methods_and_interventions(model):
    logits, seen = watch(model, ids(2), layers=[1])
    assert len(seen["attention"]) == 1 and seen["attention"][0].shape == (2, 2, 5, 5)
    np.testing.assert_array_equal(seen["logits"], logits)
    assert set(seen) >= {"stream", "normed", "qkv", "attention", "heads", "mixed", "middle", "mlp", "logits"}
    with pytest.raises(KeyError, match=r"'scores' was not recorded in the layers \[0\]"):
        watch(model, ids(2))[1]["scores"]
    with pytest.raises(KeyError, match="'score' was not recorded; there are"):
        seen["score"]
    _, seen = watch(model, ids(2), model.init_state(2, 8), method="prefill", layers=[1])
    assert seen["attention"][0].shape == (2, 2, 5, 8)
    _, seen = watch(attach(model, HeadScaling(jnp.zeros(2))), ids(2))
    assert not seen["heads"][0].any() and not seen["heads"][1].any()
    assert not hasattr(model, "__captures__")


def test_refuses_what_it_cannot_measure(model):
    with pytest.raises(ValueError, match=r"layers must be among the 2 of the model, got \[2\]"):
        measure(model, [ids(2)], lambda seen, batch: {}, layers=[2])
    with pytest.raises(ValueError, match="batches are empty"):
        measure(model, [], lambda seen, batch: {})
    with pytest.raises(ValueError, match=r"x must have a value for each of the 2 examples, got shape \(\)"):
        measure(model, [ids(2)], lambda seen, batch: {"x": seen["logits"].mean()})
