"""Decoding: prefill and steps agree with the call over the whole sequence."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import UnsupportedArgument
from tests.conformance.programs import MixerPrograms, programs, rounded
from tests.conformance.subjects import BATCH, OFTEN, Subject, close, decodes, those

RUN = 4  # tokens of one prefill, and steps of one scan: a third of the sequence


every_decoder = those(decodes)


class Decoder:
    """Programs of decoding `RUN` tokens, compiled once."""

    def __init__(self, its: MixerPrograms):
        self.its = its
        self.x = its.arguments[0]
        self.prefill = jax.jit(
            lambda weights, x, state, **given: nnx.merge(its.graph, weights).prefill(x, state, **given)
        )
        self.steps = jax.jit(self._steps)

    def _steps(self, weights: Any, x: Any, state: Any) -> tuple[jax.Array, Any]:
        def step(state, x_t):
            y, state = nnx.merge(self.its.graph, weights).step(x_t, state)
            return state, y

        state, y = jax.lax.scan(step, state, x.swapaxes(0, 1))
        return y.swapaxes(0, 1), state

    def start(self, dtype: Any = jnp.float32) -> Any:
        options = {"context": self.its.arguments[1].astype(dtype)} if self.its.subject.cross else {}
        return self.its.module.init_state(BATCH, self.x.shape[1], dtype=dtype, **options)

    def run(self, *programs: Any, x: np.ndarray | None = None, state: Any = None) -> np.ndarray:
        """The results of programs that each take the next `RUN` tokens."""
        x = self.x if x is None else x
        state = self.start() if state is None else state
        results = []
        for i, program in enumerate(programs):
            y, state = program(self.its.state, x[:, RUN * i : RUN * (i + 1)], state)
            results.append(np.asarray(y))
        return np.concatenate(results, axis=1)


@functools.lru_cache(maxsize=2)
def decoder(subject: Subject) -> Decoder:
    return Decoder(programs(subject))


@every_decoder
def test_prefill_then_steps(subject: Subject):
    its = decoder(subject)
    close(its.run(its.prefill, its.prefill, its.steps), its.its.plain.y)


@every_decoder
def test_steps_alone_in_a_scan(subject: Subject):
    its = decoder(subject)
    close(its.run(its.steps, its.steps, its.steps), its.its.plain.y)


@every_decoder
def test_prompts_padded_on_the_left(subject: Subject):
    """Prompts of 5 and 3 tokens share prefills of 8: the first prefill of the second example holds nothing of it."""
    its = decoder(subject)
    padding = (3, 5)
    real = np.arange(its.x.shape[1]) >= np.array(padding)[:, None]
    y = its.run(
        functools.partial(its.prefill, mask=real[:, :RUN]),
        functools.partial(its.prefill, mask=real[:, RUN : 2 * RUN]),
        its.steps,
    )
    moved = np.stack([np.roll(example, -n, axis=0) for example, n in zip(its.x, padding, strict=True)])
    want = its.its.pull((moved, *its.its.arguments[1:])).y
    for example, n in enumerate(padding):
        close(y[example, n:], want[example, : len(real[0]) - n], what=f"{n} tokens of padding")


@every_decoder
def test_padding_inside_a_run(subject: Subject):
    """Wherever padding stands in a prefill, its tokens are as if they were not there."""
    its = decoder(subject)
    real = np.array([[1, 0, 1, 1], [1, 1, 0, 0]], bool)
    y = its.run(functools.partial(its.prefill, mask=real), its.steps, x=its.x[:, : 2 * RUN])
    full = np.concatenate([real, np.ones_like(real)], axis=1)
    for example, keep in enumerate(map(np.flatnonzero, full)):
        moved = np.zeros_like(its.x)
        moved[example, : len(keep)] = its.x[example, keep]
        want = its.its.pull((moved, *its.its.arguments[1:])).y
        close(y[example, keep], want[example, : len(keep)], what=f"example {example}")


@every_decoder
def test_prefill_refuses_what_means_something_else(subject: Subject):
    """An additive mask, which would mean the opposite of a boolean one; places that are no integers."""
    its = decoder(subject)
    mixer, x, state = its.its.module, its.x[:, :RUN], its.start()
    with pytest.raises(ValueError, match="mask must be boolean"):
        mixer.prefill(x, state, mask=np.zeros(x.shape[:2], np.float32))
    with pytest.raises(ValueError, match="mask must be"):
        mixer.prefill(x, state, mask=np.ones((BATCH, 1, RUN, RUN), bool))
    if "positions" in mixer.accepts:
        with pytest.raises((TypeError, ValueError), match="positions must be integers"):
            mixer.prefill(x, state, positions=np.zeros(x.shape[:2], np.float32))
        with pytest.raises((TypeError, ValueError), match="positions must be integers"):
            mixer.step(x[:, 0], state, positions=np.zeros(BATCH, np.float32))


@those(decodes, often=lambda subject: subject.name in OFTEN)
def test_bfloat16_decoding(subject: Subject):
    its = decoder(subject)
    y = its.run(its.prefill, its.prefill, its.steps, x=rounded((its.x,))[0], state=its.start(jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    close(y, its.its.half.y, 3e-2)


@every_decoder
def test_in_64_bits_too_the_state_stays_as_it_is(subject: Subject):
    """Traced alone, which costs no compilation: integers and floats of several widths do not meet in a step."""
    its = programs(subject)
    with jax.enable_x64(True):
        x, *context = (a.astype(np.float64) for a in its.arguments)
        options = {"context": context[0]} if context else {}
        state = its.module.init_state(BATCH, x.shape[1], dtype=np.float64, **options)

        def decode(weights, x, state):
            mixer = nnx.merge(its.graph, weights)
            _, state = mixer.prefill(x[:, :RUN], state)
            return jax.lax.scan(lambda state, x_t: mixer.step(x_t, state)[::-1], state, x.swapaxes(0, 1)[RUN:])

        after, y = jax.eval_shape(decode, its.state, x, state)
    assert y.dtype == np.float64
    assert jax.tree.map(lambda a: a.dtype, after) == jax.tree.map(lambda a: a.dtype, state)


@those(lambda subject: not decodes(subject))
def test_others_refuse(subject: Subject):
    mixer, x = programs(subject).module, subject.tokens()
    with pytest.raises(UnsupportedArgument, match="decode"):
        mixer.init_state(BATCH, 8)
    with pytest.raises(UnsupportedArgument, match="decode"):
        mixer.prefill(x, None)
    with pytest.raises(UnsupportedArgument, match="decode"):
        mixer.step(x[:, 0], None)
