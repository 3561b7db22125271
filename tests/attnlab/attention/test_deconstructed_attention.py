"""What is left of attention: the prefix softmax by its definition, no mixing, foreign queries and keys, plans."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab.attention.linear.deconstructed_attention import NoMixing, PrefixSoftmaxAttention, TaylorAttention
from attnlab.contract import UnsupportedArgument
from attnlab.interop.official import decode
from attnlab.models.deconstructed import ForeignLanguageModel, layer_plan, standard_layers, without_layers
from attnlab.models.language_model import LanguageModel
from tests.accuracy import relative_rms


def draw(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def test_the_prefix_softmax_is_its_definition():
    mixer, x = PrefixSoftmaxAttention(8, num_heads=2, qk_norm=True, rngs=nnx.Rngs(0)), 3 * draw(2, 6, 8)
    graph, state = nnx.split(mixer)

    @jax.jit
    def run(state, x):
        mixer = nnx.merge(graph, state)
        y, recorded = nnx.capture(mixer, nnx.Intermediate)(x)
        q, k = mixer.query_norm(jax.nn.silu(mixer.query(x))), mixer.key_norm(mixer.key(x))
        return y, decode(mixer, x, 3)[0], recorded["attention"][0], q, k, mixer.value(x)

    y, decoded, weights, q, k, v = run(state, x)
    z = np.sum(np.float64(q) * np.float64(k), -1) / 2
    want = np.where(np.tri(6, dtype=bool)[None, None], np.exp(z).swapaxes(1, 2)[:, :, None], 0)
    want = want / want.sum(-1, keepdims=True)
    assert relative_rms(weights, want) < 1e-5
    assert relative_rms(y, mixer.out(np.einsum("bhnm,bmhe->bnhe", want, v).astype(np.float32))) < 1e-5
    assert relative_rms(decoded, y) < 1e-5


def test_the_polynomial_of_the_mixer_and_no_mixing():
    x = draw(1, 5, 8)
    mixer = TaylorAttention(8, num_heads=2, causal=False, rngs=nnx.Rngs(0))
    q, k, v = (np.asarray(part(x), np.float64) for part in (mixer.query, mixer.key, mixer.value))
    s = np.einsum("bnhd,bmhd->bhnm", q, k) / 2
    weights = 1 + s + s**2 / 2
    y = np.einsum("bhnm,bmhe->bnhe", weights / weights.sum(-1, keepdims=True), v)
    assert relative_rms(mixer(x), mixer.out(y.astype(np.float32))) < 1e-5
    none = NoMixing(9, rngs=nnx.Rngs(0))
    count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(none, nnx.Param)))
    assert count == 4 * 9 * 9, "as many parameters as attention"


SIZES = {"features": 8, "depth": 2, "num_heads": 2}


@pytest.mark.parametrize(
    "options",
    [
        {"source": "random", "max_source": 7, "plan": "hybrid"},
        pytest.param({"source": "fixed", "sequence": (1, 4, 1, 5, 9, 2)}, marks=pytest.mark.slow),
        {"source": "static"},
    ],
    ids=lambda options: options["source"],
)
def test_foreign_queries_and_keys(options):
    model = ForeignLanguageModel(11, **options, **SIZES, rngs=nnx.Rngs(0))
    graph, state = nnx.split(model)

    @jax.jit
    def run(state, ids):
        model = nnx.merge(graph, state)
        logits, recorded = nnx.capture(model, nnx.Intermediate)(ids)
        prompt, after = model.prefill(ids[:, :4], model.init_state(len(ids), 6))
        last, after = model.step(ids[:, 4], after)
        final, _ = model.step(ids[:, 5], after)
        first = recorded["blocks"]["blocks"][0]["mixer"]["attention"][0]
        masked = model(ids, mask=jnp.arange(6)[None] < jnp.asarray([[6], [4]]))
        packed = model(ids, segment_ids=jnp.asarray([[3] * 6, [5, 5, 6, 6, 6, 6]]))
        return logits, jnp.concatenate([prompt, last[:, None], final[:, None]], 1), first, masked, packed

    ids = np.random.default_rng(0).integers(0, 11, (2, 6))
    logits, decoded, weights, masked, packed = run(state, ids)
    assert logits.shape == (2, 6, 11)
    assert relative_rms(decoded, logits) < 1e-5
    assert relative_rms(masked[:, :4], logits[:, :4]) < 1e-5
    assert relative_rms(packed[0], logits[0]) < 1e-5
    assert relative_rms(packed[1, 2:], logits[1, 2:]) > 1e-3
    count = 2 if options["source"] == "static" else 1
    assert weights.shape[0] == count + 2 if count == 1 else 4
    same = relative_rms(weights[-1], weights[-2]) < 1e-6
    assert same == (options["source"] != "static"), "weights do not know the input, but for its own embeddings"


def test_the_second_stream_has_gradients_and_an_end():
    model = ForeignLanguageModel(11, source="fixed", sequence=(7, 7, 7), **SIZES, rngs=nnx.Rngs(0))
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    @jax.jit
    def gradient(params):
        return jax.grad(lambda p: nnx.merge(graph, p, rest)(jnp.asarray([[1, 2, 3]]))[0, :, 1].sum())(params)

    rows = gradient(params)["embedding"][...]
    assert np.any(np.abs(rows[7]) > 10 * np.abs(rows[8])), "token 7 stands in the second stream alone"
    for call, error, match in (
        (lambda: model(np.zeros((1, 4), int)), ValueError, "more than the 3"),
        (lambda: model.prefill(np.zeros((1, 2), int), None, mask=np.ones((1, 2), bool)), UnsupportedArgument, "mask"),
        (lambda: ForeignLanguageModel(11, source="fixed", **SIZES, rngs=nnx.Rngs(0)), ValueError, "sequence"),
        (lambda: ForeignLanguageModel(11, source="dreamt", **SIZES, rngs=nnx.Rngs(0)), ValueError, "source"),
        (lambda: standard_layers("some", 4), ValueError, "plan"),
    ):
        with pytest.raises(error, match=match):
            call()


def test_plans_and_skipped_layers():
    paper = {
        "odd": range(1, 25, 2),
        "hybrid": range(2, 25, 2),
        "top": range(1, 13),
        "middle": [*range(1, 7), *range(19, 25)],
        "bottom": range(13, 25),
        "quarter": range(4, 25, 4),
        "bilateral": (1, 24),
        "uniform": (),
    }
    for plan, layers in paper.items():
        assert standard_layers(plan, 24) == {layer - 1 for layer in layers}, plan
    names = layer_plan("deconstructed_attention.mlp", 4, "hybrid")
    assert names == ("deconstructed_attention.mlp", "softmax_attention") * 2
    model = nnx.eval_shape(lambda: LanguageModel(11, mixer=names, **(SIZES | {"depth": 4}), rngs=nnx.Rngs(0)))
    skipped = without_layers(model, [0, 2])
    assert len(skipped.blocks.blocks) == 2 and len(model.blocks.blocks) == 4
    with pytest.raises(ValueError, match=r"layers must be among 0\.\.3"):
        without_layers(model, [4])
