"""The base of linear mixers: decays, strengths and what is carried, padding, and attention to a context."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab.attention.linear.hedgehog import HedgehogAttention
from attnlab.attention.linear.lightning_attention_2 import LightningAttention
from attnlab.contract import Pattern
from attnlab.nn.heads import FromHeads, ToHeads
from attnlab.nn.linear_mixer import LinearMixer, Recurrence
from tests.accuracy import relative_rms


class Toy(LinearMixer):
    """Decays per token and channel, or the delta rule with decays per token; values add the token before them."""

    patterns = frozenset({Pattern.CAUSAL_SELF})
    causal = True

    def __init__(self, *, delta: bool):
        self.features, self.num_heads, self.key_size, self.value_size, self.delta = 8, 2, 4, 4, delta
        rngs = nnx.Rngs(0)
        self.query, self.key, self.value, self.decay = (ToHeads(8, 2, 4, rngs=rngs) for _ in range(4))
        self.out = FromHeads(2, 4, 8, rngs=rngs)

    def carry(self, batch_size):
        return jnp.zeros((batch_size, 1, 8))

    def project(self, x, source, at, carry):
        before = jnp.concatenate([carry.astype(x.dtype), x[:, :-1]], 1)
        decay = -jax.nn.softplus(self.decay(x).astype(jnp.float32))
        k, v = self.key(x), self.value(x + before)
        if not self.delta:
            return Recurrence(self.query(x), k, v, decay), x[:, -1:].astype(carry.dtype)
        k = k / jnp.linalg.norm(k, axis=-1, keepdims=True)
        beta = jax.nn.sigmoid(decay[..., 0])
        return Recurrence(self.query(x), k, v, decay[..., 1], beta), x[:, -1:].astype(carry.dtype)

    def merge(self, y, x):
        return self.out(y)


def tokens(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("delta", [False, True])
def test_decays_strengths_and_carry_decode(delta):
    mixer, x = Toy(delta=delta), tokens(0, 2, 7, 8)
    q, k, v, decay = (np.asarray(part(x), np.float64) for part in (mixer.query, mixer.key, mixer.value, mixer.decay))
    v = np.asarray(mixer.value(x + np.pad(x, ((0, 0), (1, 0), (0, 0)))[:, :-1]), np.float64)
    decay = -np.logaddexp(0, decay)
    state, want = np.zeros((2, 2, 4, 4)), np.zeros((2, 7, 2, 4))
    for n in range(7):
        if delta:
            key = k[:, n] / np.linalg.norm(k[:, n], axis=-1, keepdims=True)
            state = state * np.exp(decay[:, n, :, 1])[..., None, None]
            error = v[:, n] - np.einsum("bhd,bhde->bhe", key, state)
            beta = 1 / (1 + np.exp(-decay[:, n, :, 0]))
            state = state + beta[..., None, None] * key[..., None] * error[..., None, :]
        else:
            state = state * np.exp(decay[:, n])[..., None] + k[:, n, :, :, None] * v[:, n, :, None]
        want[:, n] = np.einsum("bhd,bhde->bhe", q[:, n], state)
    want = np.asarray(mixer.out(want.astype(np.float32)))
    y, seen = nnx.capture(mixer, nnx.Intermediate)(x)
    assert relative_rms(y, want) < 2e-6
    if not delta:
        drawn = np.einsum("bhnm,bmhe->bnhe", np.asarray(seen["attention"][0], np.float64), v)
        assert relative_rms(mixer.out(drawn.astype(np.float32)), want) < 2e-6
    first, state = mixer.prefill(x[:, :4], mixer.init_state(2))
    steps = []
    for n in range(4, 7):
        y, state = mixer.step(x[:, n], state)
        steps.append(y[:, None])
    assert relative_rms(np.concatenate([first, *steps], 1), want) < 2e-6


@pytest.mark.parametrize("causal", [True, False])
def test_padding_inside_a_run_is_as_if_it_were_not_there(causal):
    mixer = LightningAttention(8, num_heads=2, causal=causal, rngs=nnx.Rngs(0))
    x = tokens(1, 1, 6, 8)
    mask = np.array([[True, True, False, False, True, True]])
    alone = mixer(x[:, mask[0]])
    assert relative_rms(mixer(x, mask=mask)[:, mask[0]], alone) < 1e-6
    if causal:
        y, _ = mixer.prefill(x, mixer.init_state(1), mask=mask)
        assert relative_rms(y[:, mask[0]], alone) < 1e-6


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
def test_attention_to_a_context_decodes(causal, normalize):
    options = {"causal": causal, "context_features": 6, "normalize": normalize, "rotary": 100.0}
    mixer = HedgehogAttention(8, num_heads=2, **options, rngs=nnx.Rngs(0))
    x, context = tokens(2, 2, 6, 8), tokens(3, 2, 6, 6)
    mask = np.ones((2, 6), bool)
    mask[1, 4:] = False
    whole = mixer(x, context, mask=mask)
    state = mixer.init_state(2, context=context, context_mask=mask)
    first, state = mixer.prefill(x[:, :3], state)
    rest = []
    for n in range(3, 6):
        y, state = mixer.step(x[:, n], state)
        rest.append(y[:, None])
    assert relative_rms(np.concatenate([first, *rest], 1), whole) < 1e-5
    with pytest.raises(ValueError, match="give init_state the context"):
        mixer.init_state(2)
    with pytest.raises(ValueError, match="context is missing"):
        mixer(x)


def test_depth_is_an_array():
    layers = [LightningAttention(8, num_heads=2, layer=layer, num_layers=4, rngs=nnx.Rngs(layer)) for layer in range(3)]
    x = want = tokens(4, 1, 9, 8)
    for layer in layers:
        want = want + layer(want)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(nnx.state(layer) for layer in layers))
    graph = nnx.graphdef(layers[0])
    got, _ = jax.lax.scan(lambda x, state: (x + nnx.merge(graph, state)(x), None), jnp.asarray(x), stacked)
    assert relative_rms(got, want) < 1e-6
