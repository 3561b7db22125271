"""Phantom attention beside plain attention, of which it is a widening."""

import jax.numpy as jnp
import numpy as np
from flax import nnx

from attnlab.attention.dense.softmax_attention import SoftmaxAttention
from attnlab.interop.phantom import OFFICIAL
from tests.accuracy import relative_rms

CONFIG = {"hidden_size": 12, "num_attention_heads": 3, "num_key_value_heads": 1, "rope_theta": 100.0}
X = np.random.default_rng(0).normal(size=(2, 6, 12)).astype(np.float32)


def test_without_eta_it_is_plain_attention_for_any_gates_and_so_it_is_switched_off():
    whole, plain = OFFICIAL[0], OFFICIAL[1]
    phantom = whole.build(CONFIG | {"eta": 0.0}, rngs=nnx.Rngs(1))
    for gate in (phantom.core.gate1, phantom.core.gate2):
        gate.bias[...] = gate.bias[...] + 1.5
    off = plain.build(CONFIG | {"turn_on_phantom": False})
    assert isinstance(off, SoftmaxAttention) and plain.suits({"turn_on_phantom": False}) and not plain.suits(CONFIG)
    plain.load(off, whole.dump(phantom))
    assert relative_rms(phantom(X), off(X)) < 1e-6


def test_another_phantom_token_gives_another_result():
    phantom = OFFICIAL[0].build(CONFIG | {"eta": 1.0}, rngs=nnx.Rngs(1))
    first = jnp.zeros((2, 6), bool).at[:, 0].set(True)
    assert relative_rms(phantom.attend(X, first), phantom(X)) < 1e-6
    assert relative_rms(phantom.attend(X, jnp.roll(first, 2, axis=1)), phantom(X)) > 1e-3
