"""The claims of the paper's mechanism on a tiny language model with a planted sink."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab.interventions.var import VisualRedistribution, image_centric_heads, redistribute, sink_tokens
from attnlab.measure import watch
from attnlab.models.generate import generate
from attnlab.models.language_model import LanguageModel
from attnlab.points import attach

SINK, DIM, HEADS, LENGTH = 3, 5, 2, 9
IMAGE = np.asarray([[0, 0, 1, 1, 1, 1, 0, 0]], bool)
# The first token is a sink among the text, the fourth one in the image. What follows at 6 is the question.
IDS = jnp.asarray([[SINK, 1, 2, SINK, 4, 5, 6, 7, 8], [1, SINK, 2, 4, SINK, 5, 8, 7, 6]])


def language_model() -> LanguageModel:
    model = LanguageModel(
        11, features=16, depth=2, num_heads=HEADS, mlp_ratio=1, tie_embeddings=False, rngs=nnx.Rngs(0)
    )
    table = model.embedding[...] * 0.5
    model.embedding[...] = table.at[SINK, DIM].set(20.0)
    return model


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return language_model()


def edit(**options) -> VisualRedistribution:
    options = {"dims": (DIM,), "tau": 3.0, "rho": 0.2, "summ": 0.05} | options
    return VisualRedistribution(jnp.asarray(IMAGE), **options)


def test_selected_rows_gain_on_the_image_what_sinks_lose(model):
    def seen(model, ids):
        return watch(model, ids)[1]["attention"]

    with_edit = attach(model, edit())
    (before, _), (after, _), logits, edited = jax.jit(
        lambda ids: (seen(model, ids), seen(with_edit, ids), model(ids), with_edit(ids))
    )(IDS)
    image = np.pad(IMAGE, ((0, 0), (0, 1))).repeat(2, 0)
    sinks = np.asarray(IDS == SINK)
    rows = np.asarray(image_centric_heads(before, image, sinks, rho=0.2, summ=0.05)) & (np.arange(LENGTH) > 5)
    assert 0 < rows.sum() < rows[..., 6:].size
    before, after = np.asarray(before), np.asarray(after)
    rest = (image & ~sinks)[:, None, None]
    budget = 0.4 * (before * sinks[:, None, None]).sum(-1)
    np.testing.assert_allclose(((after - before) * rest).sum(-1), np.where(rows, budget, 0), atol=1e-6)
    np.testing.assert_allclose(after.sum(-1), before.sum(-1), atol=1e-6)
    np.testing.assert_allclose(after[~rows], before[~rows], atol=1e-7)
    assert not np.allclose(edited[:, 6:], logits[:, 6:], atol=1e-4)
    np.testing.assert_allclose(edited[:, :6], logits[:, :6], atol=1e-5)


def test_prefill_and_steps_equal_the_call(model):
    edited = attach(model, edit())

    @jax.jit
    def decode(ids):
        padded = jnp.pad(ids[:, :7], ((0, 0), (2, 0)))
        runs = []
        for prompt, mask in ((ids[:, :7], None), (padded, jnp.arange(9)[None].repeat(2, 0) >= 2)):
            logits, state = edited.prefill(prompt, edited.init_state(2, LENGTH), mask=mask)
            rows = [logits[:, -7:]]
            for index in (7, 8):
                logits, state = edited.step(ids[:, index], state)
                rows.append(logits[:, None])
            runs.append(jnp.concatenate(rows, axis=1))
        return edited(ids), runs, state.memories

    whole, runs, memories = decode(IDS)
    for run in runs:
        np.testing.assert_allclose(run, whole, atol=1e-5)
    np.testing.assert_array_equal(memories[0][0], (IDS == SINK) & (jnp.arange(LENGTH) < 7))
    assert generate(edited, IDS[:, :7], max_new_tokens=2, temperature=0).tokens.shape == (2, 2)


@pytest.mark.slow
def test_tokens_that_are_generated_are_never_sinks(model):
    edited = attach(model, edit())
    _, state = edited.prefill(IDS, edited.init_state(2, LENGTH + 1))
    _, after = edited.step(jnp.full(2, SINK), state)
    np.testing.assert_array_equal(after.memories[0][0], state.memories[0][0])
    assert not after.memories[0][0][:, -1].any()


def test_another_image_compiles_nothing_anew(model):
    graph, _ = nnx.split(attach(model, edit()))
    other = VisualRedistribution(jnp.asarray(~IMAGE), dims=(DIM,), tau=3.0, rho=0.2, summ=0.05)
    assert nnx.split(attach(model, other))[0] == graph


def test_rows_without_attention_on_the_image_stay_finite():
    weights, none = jnp.zeros((1, 1, 2, 4)), jnp.zeros((1, 4), bool)
    image = jnp.asarray([[False, True, True, False]])
    selected = image_centric_heads(weights, image, image, rho=1.0, summ=0.0)
    assert selected.all() and not image_centric_heads(weights, none, none, rho=1.0, summ=0.0).any()

    def total(weights):
        return redistribute(weights, image, image, selected, p=0.0).sum()

    assert jnp.isfinite(jax.grad(total)(weights)).all()
    assert not sink_tokens(jnp.zeros((1, 4, 3)), (1,), 0.5).any()


def test_refuses_what_is_no_image_mask():
    with pytest.raises(ValueError, match=r"image must be boolean \(B, L\), got int32\[1, 3\]"):
        VisualRedistribution(jnp.ones((1, 3), jnp.int32), dims=(0,))
    with pytest.raises(ValueError, match="dims must name at least one"):
        VisualRedistribution(jnp.ones((1, 3), bool), dims=())
