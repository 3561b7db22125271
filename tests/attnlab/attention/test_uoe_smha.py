"""Selective heads and the union of experts: lists and masks agree, and what they are when nothing is left out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import UnsupportedArgument
from attnlab.attention.sparse.uoe_smha import SelectiveHeadAttention
from attnlab.models.language_model import LanguageModel
from attnlab.nn.softmax import softmax_attention
from attnlab.nn.union_of_experts import UnionOfExpertsMLP
from tests.accuracy import relative_rms

X = np.random.default_rng(0).standard_normal((2, 9, 8)).astype(np.float32)
IDS = np.repeat([0, 1], (4, 5))[None].repeat(2, 0)


def test_lists_that_hold_all_agree_with_the_mask():
    masked = SelectiveHeadAttention(8, num_heads=4, rngs=nnx.Rngs(0))
    listed = SelectiveHeadAttention(8, num_heads=4, capacity=1.0, rngs=nnx.Rngs(0))
    keys = np.arange(9) % 4 != 2
    given = {"segment_ids": IDS, "mask": np.broadcast_to(keys, (2, 9))}
    want, got = (jax.jit(lambda x, mixer=mixer: mixer(x, **given))(X) for mixer in (masked, listed))
    assert relative_rms(got[:, keys], want[:, keys]) < 1e-6
    with pytest.raises(UnsupportedArgument, match=r"capacity=1\.0"):
        listed.init_state(1, 4)


def test_all_tokens_in_all_lists_is_plain_attention():
    mixer = SelectiveHeadAttention(8, num_heads=4, rotary=None, rngs=nnx.Rngs(0))
    y = mixer.attend(X, np.broadcast_to(np.arange(9), (2, 4, 9)))
    heads = softmax_attention(mixer.query(X), mixer.key(X), mixer.value(X), causal=True)
    assert relative_rms(y, mixer.out(heads, jnp.ones((2, 9, 4)))) < 1e-6
    full = SelectiveHeadAttention(8, num_heads=4, rotary=None, capacity=1.0, fillers=True, rngs=nnx.Rngs(0))
    assert relative_rms(full(X), y) < 1e-6, "fillers complete every list"


def test_capacity_keeps_the_likeliest_tokens():
    mlp = UnionOfExpertsMLP(8, 8, num_experts=4, capacity=0.25, rngs=nnx.Rngs(0))
    routing = mlp.router(X)
    taken = np.zeros((2, 9, 4), bool)
    for b, e in np.ndindex(2, 4):
        likely = np.argsort(np.where(routing.chosen[b, :, e], -routing.probabilities[b, :, e], 0))[:2]
        taken[b, likely, e] = routing.chosen[b, likely, e]
    want = mlp.fc2(jnp.where(taken[..., None], mlp.activation(mlp.fc1(X)), 0), taken)
    assert relative_rms(mlp(X), want) < 1e-6
    whole = UnionOfExpertsMLP(8, 8, num_experts=4, k=4, rngs=nnx.Rngs(0))
    assert relative_rms(whole(X), whole.fc2(whole.activation(whole.fc1(X)), jnp.ones((2, 9, 4)))) < 1e-6


@pytest.mark.slow
def test_a_language_model_of_both_decodes():
    options = {"features": 8, "depth": 2, "num_heads": 4, "mixer": "uoe_smha", "mlp": "uome", "mlp_features": 16}
    model = LanguageModel(7, **options, rngs=nnx.Rngs(0))
    ids = np.array([[1, 2, 3, 4, 5, 6], [3, 1, 0, 2, 2, 5]])

    @jax.jit
    def both(ids):
        logits, state = model.prefill(ids[:, :4], model.init_state(2, 6))
        return model(ids), logits, model.step(ids[:, 4], state)[0]

    want, logits, last = both(ids)
    np.testing.assert_allclose(logits, want[:, :4], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(last, want[:, 4], rtol=1e-4, atol=1e-5)


def test_sizes_that_do_not_fit():
    with pytest.raises(ValueError, match="fillers"):
        SelectiveHeadAttention(8, num_heads=4, fillers=True, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="capacity"):
        UnionOfExpertsMLP(8, capacity=1.5, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="num_experts"):
        UnionOfExpertsMLP(8, 10, num_experts=4, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="token_ids"):
        SelectiveHeadAttention(8, num_heads=4, rngs=nnx.Rngs(0)).attend(X, np.zeros((4, 2, 3), int))
