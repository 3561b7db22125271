"""Decoding: prefill and steps agree with the call over the whole sequence."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from attnlab import Layout, Pattern, UnsupportedArgument
from tests.conformance.subjects import BATCH, Subject, close, mixers

DECODERS = [s for s in mixers() if s.pattern is Pattern.CAUSAL_SELF and s.layout is Layout.SEQUENCE]
every_decoder = pytest.mark.parametrize("subject", DECODERS, ids=str)


@every_decoder
def test_prefill_then_steps(subject: Subject):
    mixer, x = subject.build(), subject.tokens()
    whole = mixer(x)
    state = mixer.init_state(BATCH, x.shape[1])
    first, state = mixer.prefill(x[:, :4], state)
    second, state = mixer.prefill(x[:, 4:7], state)
    close(jnp.concatenate([first, second], axis=1), whole[:, :7])
    step = nnx.jit(lambda mixer, x_t, state: mixer.step(x_t, state))
    for i in range(7, x.shape[1]):
        y, state = step(mixer, x[:, i], state)
        close(y, whole[:, i])


@every_decoder
def test_steps_alone_in_a_scan(subject: Subject):
    mixer, x = subject.build(), subject.tokens()
    graph, weights = nnx.split(mixer)

    def step(state, x_t):
        y, state = nnx.merge(graph, weights).step(x_t, state)
        return state, y

    _, y = jax.lax.scan(step, mixer.init_state(BATCH, x.shape[1]), x.swapaxes(0, 1))
    close(y.swapaxes(0, 1), mixer(x))


@every_decoder
def test_prompts_padded_on_the_left(subject: Subject):
    mixer, x = subject.build(), subject.tokens(batch=1)
    short = x[:, 3:]
    mask = (jnp.arange(x.shape[1] - 1) >= 3)[None]
    state = mixer.init_state(1, x.shape[1])
    padded, state = mixer.prefill(x[:, :-1], state, mask=mask)
    whole = mixer(short)
    close(padded[:, 3:], whole[:, :-1])
    y, _ = mixer.step(x[:, -1], state)
    close(y, whole[:, -1])


@every_decoder
def test_bfloat16_decoding(subject: Subject):
    mixer, x = subject.build(), subject.tokens().astype(jnp.bfloat16)
    y, state = mixer.prefill(x[:, :-1], mixer.init_state(BATCH, x.shape[1], dtype=jnp.bfloat16))
    last, _ = mixer.step(x[:, -1], state)
    assert y.dtype == last.dtype == jnp.bfloat16
    close(jnp.concatenate([y, last[:, None]], axis=1), mixer(x), 3e-2)


@pytest.mark.parametrize("subject", sorted(set(mixers()) - set(DECODERS), key=str), ids=str)
def test_others_refuse(subject: Subject):
    mixer, x = subject.build(), subject.tokens()
    with pytest.raises(UnsupportedArgument, match="decode"):
        mixer.init_state(BATCH, 8)
    with pytest.raises(UnsupportedArgument, match="decode"):
        mixer.prefill(x, None)
    with pytest.raises(UnsupportedArgument, match="decode"):
        mixer.step(x[:, 0], None)
