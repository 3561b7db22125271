import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab.attention.dense.softmax_attention import SoftmaxAttention
from attnlab.nn.heads import FromHeads, ToHeads
from attnlab.nn.linear import Linear
from attnlab.nn.lora import (
    Adapted,
    adapter_names,
    adapter_parameters,
    merge_adapters,
    use_adapters,
    with_adapter,
)
from tests.accuracy import relative_rms

X = np.random.default_rng(0).standard_normal((2, 5, 12)).astype(np.float32)


def mixer(**options):
    return SoftmaxAttention(12, num_heads=3, **options, rngs=nnx.Rngs(0))


def moved(model, *names):
    """The model with adapters that change something."""
    state = nnx.state(model, adapter_parameters(*names))
    keys = iter(jax.random.split(jax.random.key(1), 100))
    nnx.update(model, jax.tree.map(lambda a: a + jax.random.normal(next(keys), a.shape), state))
    return model


class Holder(nnx.Module):
    def __init__(self, part):
        self.part = part

    def __call__(self, x):
        return self.part(x)


@pytest.mark.parametrize(
    ("part", "shape", "axes"),
    [
        (Linear(12, 7, axes=("embed", "mlp"), rngs=nnx.Rngs(0)), (12,), ("embed", "mlp")),
        (ToHeads(12, 3, 4, rngs=nnx.Rngs(0)), (12,), ("embed", "heads", None)),
        (FromHeads(3, 4, 7, rngs=nnx.Rngs(0)), (3, 4), ("heads", None, "embed")),
    ],
)
def test_the_change_is_that_of_the_paper(part, shape, axes):
    """y = W x + b + (α / r) B A x, in float64."""
    x = np.random.default_rng(1).standard_normal((2, 5, *shape))
    model = moved(with_adapter(Holder(part), "a", rank=2, alpha=3.0, where=("part",), rngs=nnx.Rngs(1)))
    adapter = model.part.adapters["a"]
    down, up, kernel, bias = (
        np.asarray(p[...], np.float64) for p in (adapter.down, adapter.up, part.kernel, part.bias)
    )
    ins = len(shape)
    want = np.tensordot(x, kernel, ins) + bias + 1.5 * np.tensordot(np.tensordot(x, down, ins), up, 1)
    got = model(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(merge_adapters(model)(jnp.asarray(x, jnp.float32)), want, rtol=2e-5, atol=2e-5)
    assert model(jnp.asarray(x, jnp.bfloat16)).dtype == jnp.bfloat16
    assert adapter.down.get_metadata()["logical_axes"] == (*axes[:ins], None)
    assert adapter.up.get_metadata()["logical_axes"] == (None, *axes[ins:])


def test_adapters_have_names_and_are_used_one_by_one():
    plain = mixer()
    y = plain(X)
    one = with_adapter(plain, "one", rank=2, rngs=nnx.Rngs(1))
    np.testing.assert_array_equal(one(X), y)  # nothing is changed at the start
    one = moved(one)
    of_one = one(X)
    both = with_adapter(one, "two", rank=1, where=("value",), rngs=nnx.Rngs(2))
    both = moved(both, "two")
    assert adapter_names(both) == ("one", "two") and adapter_names(one) == ("one",)
    assert not np.allclose(both(X), of_one)
    np.testing.assert_array_equal(use_adapters(both, ["one"])(X), of_one)
    np.testing.assert_array_equal(use_adapters(both, ())(X), y)
    assert relative_rms(merge_adapters(both)(X), both(X)) < 2e-5
    assert relative_rms(merge_adapters(both, ["one"])(X), of_one) < 2e-5
    merged = merge_adapters(both)
    assert nnx.graphdef(merged) == nnx.graphdef(plain)
    np.testing.assert_array_equal(plain(X), y)  # and the first structure is what it was
    assert isinstance(both.value, Adapted) and both.value.kernel.shape == plain.value.kernel.shape


def test_parameters_of_adapters_alone_are_chosen():
    model = with_adapter(with_adapter(mixer(), "a", rank=2, rngs=nnx.Rngs(1)), "b", rank=3, rngs=nnx.Rngs(2))
    sizes = {
        names: sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, adapter_parameters(*names))))
        for names in ((), ("a",), ("b",))
    }
    assert sizes == {("a",): 4 * 2 * 24, ("b",): 4 * 3 * 24, (): 4 * 5 * 24}
    graph, chosen, rest = nnx.split(model, adapter_parameters("a"), ...)

    def loss(chosen):
        return jnp.sum(nnx.merge(graph, chosen, rest)(X) ** 2)

    gradient = jax.grad(loss)(chosen)
    assert np.any(gradient["query"]["adapters"]["a"]["up"][...])
    assert not np.any(gradient["query"]["adapters"]["a"]["down"][...])  # behind B = 0


def test_maps_are_chosen_by_a_function_of_their_path():
    model = with_adapter(Holder(mixer()), "a", rank=1, where=lambda path: path == ("part", "out"), rngs=nnx.Rngs(0))
    assert isinstance(model.part.out, Adapted) and isinstance(model.part.query, ToHeads)


def test_mistakes_are_named():
    model = with_adapter(mixer(), "style", rank=1, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="has an adapter 'style' already"):
        with_adapter(model, "style", rank=1, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="they are called: key, out, query, value"):
        with_adapter(mixer(), "a", rank=1, where=("qkv",), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        with_adapter(mixer(), "a", rank=0, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="no adapter is called 'stile': did you mean style"):
        use_adapters(model, ["stile"])
    with pytest.raises(ValueError, match="no adapter is called 'a': there is none"):
        merge_adapters(mixer(), ["a"])
