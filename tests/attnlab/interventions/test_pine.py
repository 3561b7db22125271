"""Documents without an order: the suffix does not see how they were permuted; and what the core refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import UnsupportedArgument
from attnlab.attention.dense.softmax_attention import SoftmaxAttention
from attnlab.interventions.pine import PositionInvariantCore, document_labels
from attnlab.models.language_model import LanguageModel
from attnlab.nn.dense_mixer import with_core
from tests.accuracy import relative_rms
from tests.attnlab.attention.sparse_cost import check_growth, temporaries

PREFIX, DOCUMENTS, SUFFIX = 2, (3, 4, 2), 3


def language_model():
    model = LanguageModel(11, features=16, depth=2, num_heads=2, rotary_base=100.0, rngs=nnx.Rngs(0))
    # Far from uniform attention.
    nnx.update(model, jax.tree.map(lambda x: 3 * x if x.ndim > 1 else x, nnx.state(model, nnx.Param)))
    return model


def prompts(order):
    """The same documents in another order, and where each token of the first prompt is in it."""
    rng = np.random.default_rng(3)
    parts = np.split(np.arange(PREFIX, PREFIX + sum(DOCUMENTS)), np.cumsum(DOCUMENTS)[:-1])
    tail = np.arange(SUFFIX) + PREFIX + sum(DOCUMENTS)
    place = np.concatenate([np.arange(PREFIX), *(parts[i] for i in order), tail])
    return rng.integers(0, 11, (1, len(place)))[:, place], [DOCUMENTS[i] for i in order], place


@pytest.mark.slow
def test_the_order_of_documents_is_not_seen():
    """The paper's claim, on a model of two layers; in decoding too, and with padding in front."""
    model, plain, invariant = language_model(), [], []

    @jax.jit
    def run(labels, ids):
        edited = with_core(model, lambda core: PositionInvariantCore.of(core, labels, num_documents=3))
        padded = jnp.pad(ids[:, :-1], ((0, 0), (2, 0)))
        real = jnp.arange(padded.shape[1])[None] >= 2
        logits, cache = edited.prefill(padded, edited.init_state(1, ids.shape[1]), mask=real)
        return model(ids), edited(ids), logits[:, 2:], edited.step(ids[:, -1], cache)[0]

    for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
        ids, lengths, place = prompts(order)
        causal, whole, logits, last = run(document_labels(PREFIX, lengths), ids)
        assert relative_rms(logits, whole[:, :-1]) < 1e-5
        assert relative_rms(last, whole[:, -1]) < 1e-5
        back = np.argsort(place)
        plain.append(causal[:, -SUFFIX:])
        invariant.append(whole[:, back])
    for other, moved in zip(plain[1:], invariant[1:], strict=True):
        assert np.abs(moved - invariant[0]).max() < 1e-5
        assert np.abs(other - plain[0]).max() > 1e-2


def test_recorded_weights_give_the_result():
    core = PositionInvariantCore(document_labels(1, (2, 2, 1)), num_documents=3, rotary=50.0)
    mixer = with_core(SoftmaxAttention(8, num_heads=2, causal=True, rngs=nnx.Rngs(0)), core)
    x = np.random.default_rng(0).standard_normal((1, 8, 8)).astype(np.float32)

    @jax.jit
    def both(x):
        y, seen = nnx.capture(nnx.merge(*nnx.split(mixer)), nnx.Intermediate)(x)
        return y, jnp.einsum("bhnm,bmhe->bnhe", seen["attention"][0], mixer.value(x))

    y, heads = both(x)
    assert relative_rms(mixer.out(heads), y) < 1e-5


def test_what_it_does_not_take():
    model = language_model()
    labels = document_labels(1, (2,))
    edited = with_core(model, lambda core: PositionInvariantCore.of(core, labels, num_documents=1))
    ids = np.zeros((1, 5), int)
    with pytest.raises(UnsupportedArgument, match="segment_ids"):
        edited(ids, segment_ids=np.zeros((1, 5), int))
    with pytest.raises(ValueError, match="labels must be integers"):
        PositionInvariantCore(labels[0], num_documents=1)
    capped = LanguageModel(
        11, features=8, depth=1, num_heads=2, mixer_options={"softmax_attention": {"softcap": 5.0}}, rngs=nnx.Rngs(0)
    )
    with pytest.raises(ValueError, match="without softcap"):
        with_core(capped, lambda core: PositionInvariantCore.of(core, labels, num_documents=1))


@pytest.mark.slow
def test_memory_grows_with_the_tokens():
    lengths, memory = (1024, 2048), []
    for length in lengths:
        core = PositionInvariantCore(document_labels(0, (length // 4,) * 3), num_documents=3, rotary=50.0)
        mixer = with_core(SoftmaxAttention(8, num_heads=2, causal=True, rngs=nnx.Rngs(0)), core)
        memory.append(temporaries(mixer, jax.ShapeDtypeStruct((1, length, 8), jnp.float32)))
    check_growth(tuple(memory), lengths)
