"""The learning rules beyond Hebb's: in the mixer, with segments, and what they promise of a memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab.attention.linear.pavlovian import AssociativeMemory, linear_memory
from attnlab.interop.official import decode
from tests.accuracy import relative_rms

RULES = ("decay", "delta", "oja", "gated")


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("rule", RULES)
def test_mixers_of_every_rule_decode_take_segments_and_record_their_weights(rule):
    options = {"forget": True} if rule == "delta" else {}
    mixer = AssociativeMemory(8, num_heads=4, num_kv_heads=2, rule=rule, **options, rngs=nnx.Rngs(0))
    graph, state = nnx.split(mixer)
    ids = jnp.asarray([[3, 3, 3, 1, 1, 1, 1]] * 2)

    @jax.jit
    def run(state, x):
        mixer = nnx.merge(graph, state)
        y, recorded = nnx.capture(mixer, nnx.Intermediate)(x)
        values = jnp.repeat(mixer.value(x), 2, axis=2)
        packed, alone = mixer(x, segment_ids=ids), mixer(x[:, 3:])
        padded = mixer(x, mask=jnp.arange(7)[None] >= 3)
        read = jnp.einsum("bhnm,bmhe->bnhe", recorded["attention"][0], values)
        return y, decode(mixer, x, 4)[0], packed[:, 3:], padded[:, 3:], alone, mixer.merge(read, x)

    y, decoded, packed, padded, alone, read = run(state, draw(2, 7, 8))
    assert relative_rms(decoded, y) < 1e-5
    assert relative_rms(packed, alone) < 1e-5
    assert relative_rms(padded, alone) < 1e-5
    if rule != "oja":  # whose weights differ from value channel to channel: their mean is recorded
        assert relative_rms(read, y) < 1e-5


def test_oja_is_its_equation_and_bounded():
    q, k, v = draw(1, 9, 1, 4), draw(1, 9, 1, 4, seed=1), draw(1, 9, 1, 3, seed=2)
    beta = np.full((1, 9, 1), 0.1, np.float32)
    state, want = np.zeros((4, 3)), []
    for t in range(9):
        key, value = k[0, t, 0], v[0, t, 0]
        state = state + 0.1 * value * (key[:, None] - value * state)
        want.append(q[0, t, 0] @ state / 2)
    y, after = linear_memory(q, k, v, rule="oja", beta=beta)
    assert relative_rms(y[0, :, 0], np.stack(want)) < 1e-6
    assert relative_rms(after[0, 0], state) < 1e-6
    large, gradient = jax.value_and_grad(lambda v: linear_memory(q, k, v, rule="oja")[0].sum())(1e4 * v)
    assert np.isfinite(large) and np.isfinite(gradient).all()


def test_repeated_presentation_teaches_the_delta_rule_and_not_hebb():
    """M = D / 2 items, learned in several passes: the delta rule reads them to within a tenth of Hebb's error."""
    k, v = draw(1, 16, 1, 32), draw(1, 16, 1, 8, seed=1)
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    hebb, _ = linear_memory(k, k, v, causal=False, scale=1.0)
    memory = None
    for _ in range(20):
        _, memory = linear_memory(k, k, v, rule="delta", initial_state=memory)
    delta = jnp.einsum("bnhd,bhde->bnhe", k, memory)
    assert relative_rms(delta, v) < min(1e-2, relative_rms(hebb, v) / 10)


def test_an_argument_of_another_rule_is_refused():
    q = draw(1, 4, 1, 2)
    for given, match in (
        ({"rule": "hebb", "beta": q[..., 0]}, "beta is no part of the rule 'hebb'"),
        ({"rule": "decay"}, "log_decay is missing"),
        ({"rule": "gated"}, "gate is missing"),
        ({"rule": "delta", "causal": False}, "causal"),
        ({"rule": "oja", "normalize": True}, "normalize"),
        ({"rule": "bcm"}, "rule must be one of"),
    ):
        with pytest.raises(ValueError, match=match):
            linear_memory(q, q, q, **given)
    with pytest.raises(ValueError, match="forget"):
        AssociativeMemory(8, num_heads=2, rule="hebb", forget=True, rngs=nnx.Rngs(0))
