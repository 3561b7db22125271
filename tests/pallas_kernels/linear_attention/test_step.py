"""Decoding steps: several tokens at once, the state in place, and the TPU kernel."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import NormalizedState, dispatch, linear_attention, linear_attention_step
from pallas_kernels.linear_attention import api
from pallas_kernels.linear_attention.cases import Case
from pallas_kernels.linear_attention.tpu import step as tpu_step
from tests.pallas_kernels.quick import joined, quick
from tests.pallas_kernels.tpu_compile import TOPOLOGIES, compile_for, kernels_of, needs_tpu_compiler, shape

FORMS = {
    "plain": {},
    "head": {"decay": "head"},
    "token": {"decay": "token"},
    "channel": {"decay": "channel"},
    "grouped": {"decay": "token", "heads": 4, "kv_heads": 2, "value_size": 24},
    "normalized": {"decay": "head", "normalize": True},
    "normalized_channel": {"decay": "channel", "normalize": True},
}


def tokens_of(name, length, dtype=jnp.float32, **sizes):
    """Arrays of a call of the whole op and of the step, and `normalize`; tokens without the axis T for length None."""
    case = Case(f"step_{name}", 2, length or 1, initial_state=True, **(FORMS[name] | sizes))
    whole, options = case.arguments(dtype)
    whole["scale"] = jnp.float32(0.3)
    step = {{"initial_state": "state", "q": "q_t", "k": "k_t", "v": "v_t"}.get(key, key): x for key, x in whole.items()}
    if length is None:
        for key in ("q_t", "k_t", "v_t", "log_decay"):
            if key in step and step[key].ndim > 1:
                step[key] = step[key][:, 0]
    return whole, step, options["normalize"]


def close(got, want, tolerance=1e-5):
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(np.asarray(g, np.float64), np.asarray(w, np.float64), rtol=tolerance, atol=tolerance)


@pytest.fixture
def interpreted(capfd):
    """Runs a step by the TPU kernel: uninitialised memory is NaN, reads out of bounds raise, and so do races here."""

    def run(f, *arrays):
        params = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)
        with dispatch.target("tpu", qualified_only=False), pltpu.force_tpu_interpret_mode(params):
            outputs = jax.block_until_ready(jax.jit(lambda *arrays: f(*arrays))(*arrays))
        assert "RACE" not in capfd.readouterr().out
        return outputs

    return run


QUICK_STEPS = ("head-None", "normalized-None", "channel-5", "grouped-5")


@pytest.mark.parametrize(("name", "length"), quick(itertools.product(FORMS, (None, 5)), QUICK_STEPS, joined))
def test_steps_are_the_whole(name, length):
    whole, step, normalize = tokens_of(name, length)
    y, state = linear_attention_step(**step, normalize=normalize)
    want, want_state = linear_attention(**whole, normalize=normalize, return_state=True, implementation="reference")
    close((y, state), (want if length else want[:, 0], want_state))
    assert isinstance(state, NormalizedState) == normalize


RUNS = [("normalized", None), *((name, 3) for name in FORMS)]


@pytest.mark.parametrize(("name", "length"), quick(RUNS, ("grouped-3", "normalized_channel-3"), joined))
def test_the_tpu_kernel_is_the_specification(name, length, interpreted):
    whole, step, normalize = tokens_of(name, length)
    got = interpreted(lambda step: linear_attention_step(**step, normalize=normalize, implementation="tpu"), step)
    y, state = linear_attention(**whole, normalize=normalize, return_state=True, implementation="reference")
    close(got, (y if length else y[:, 0], state), 2e-6)


def test_a_state_that_is_held_transposed(interpreted):
    assert tpu_step.held_transposed(128, 16) and not tpu_step.held_transposed(64, 128)
    whole, step, _ = tokens_of("normalized_channel", 2, key_size=128, value_size=16)
    got = interpreted(lambda step: linear_attention_step(**step, normalize=True, implementation="tpu"), step)
    want = linear_attention(**whole, normalize=True, return_state=True, implementation="reference")
    close(got, want, 1e-5)


def test_the_tpu_kernel_goes_through_blocks_of_heads(interpreted):
    assert tpu_step.block_heads(16) == 8 and tpu_step.block_heads(12) == 12
    whole, step, _ = tokens_of("token", 2, heads=16, key_size=8)
    got = interpreted(lambda step: linear_attention_step(**step, implementation="tpu"), step)
    close(got, linear_attention(**whole, return_state=True, implementation="reference"), 2e-6)


@pytest.mark.parametrize("dtype", quick(["bfloat16", "float16"], ("bfloat16",)))
def test_half_precision(dtype, interpreted):
    whole, step, _ = tokens_of("head", 4, jnp.dtype(dtype), key_size=32)
    y, state = interpreted(lambda step: linear_attention_step(**step, implementation="tpu"), step)
    assert y.dtype == dtype and state.dtype == jnp.float32
    whole = jax.tree.map(lambda x: x.astype(jnp.float32), whole)
    want, want_state = linear_attention(**whole, return_state=True, implementation="reference")
    assert np.sqrt(np.mean((np.float64(y) - want) ** 2) / np.mean(np.float64(want) ** 2)) < 4e-3
    close(state, want_state, 2e-6)


def test_empty_rows_are_zero(interpreted):
    """A normalised row with nothing to read."""
    q = jnp.ones((1, 2, 1, 8))
    state = api.init_state(1, 1, 8, 8, normalize=True)

    def step(q, k, state):
        return linear_attention_step(q, k, q, state, normalize=True, implementation="tpu")[0]

    y = interpreted(step, q, q.at[:, 0].set(0), state)
    np.testing.assert_allclose(y[0, :, 0], [[0.0] * 8, [1.0] * 8], rtol=1e-6)


def test_the_tpu_kernel_has_the_gradient_of_the_xla_step(interpreted):
    _, step, _ = tokens_of("token", 2, key_size=8)

    def grad(implementation):
        def loss(step):
            return sum(jnp.sum(x**2) for x in linear_attention_step(**step, implementation=implementation))

        return jax.grad(loss)

    close(interpreted(grad("tpu"), step), grad("xla")(step), 1e-4)


@pytest.mark.slow
def test_vmap_of_the_tpu_kernel(interpreted):
    _, step, _ = tokens_of("head", 2, key_size=8)
    axes = {key: None if key in ("log_decay", "scale") else 0 for key in step}
    stacked = {key: x if axes[key] is None else jnp.stack([x, 2 * x]) for key, x in step.items()}
    got = interpreted(jax.vmap(lambda step: linear_attention_step(**step, implementation="tpu"), (axes,)), stacked)
    for i in range(2):
        one = {key: x if axes[key] is None else x[i] for key, x in stacked.items()}
        close([x[i] for x in got], linear_attention_step(**one), 1e-5)


@pytest.mark.parametrize("length", [None, 4])
def test_a_donated_state_is_overwritten(length):
    _, step, _ = tokens_of("head", length)
    state = step.pop("state")
    jitted = jax.jit(lambda state, step: linear_attention_step(**step, state=state), donate_argnums=0)
    text = jitted.lower(state, step).compile().as_text()
    assert "input_output_alias={ {1}: (0, {}" in text
    state = state + 0  # one that nobody else holds
    at = state.unsafe_buffer_pointer()
    new = jitted(state, step)[1]
    assert state.is_deleted() and new.unsafe_buffer_pointer() == at


def shapes(heads, d, e, tokens, dtype, decay, normalize):
    state = shape((2, heads, d, e), jnp.float32)
    decays = {None: None, "head": (heads,), "token": (2, tokens, heads), "channel": (2, tokens, heads, d)}
    return (
        NormalizedState(state, shape((2, heads, d), jnp.float32)) if normalize else state,
        shape((2, tokens, heads, d), dtype),
        shape((2, tokens, heads, e), dtype),
        None if decay is None else shape(decays[decay], jnp.float32),
    )


COMPILED = {
    "one token": (8, 128, 128, 1, "bfloat16", "head", False),
    "many heads": (96, 128, 128, 1, "bfloat16", "head", False),
    "four tokens": (8, 64, 64, 4, "bfloat16", None, True),
    "large": (12, 256, 256, 2, "float32", "token", False),
    "half": (4, 16, 24, 3, "float16", "channel", True),
    "narrow values": (8, 256, 64, 2, "bfloat16", "channel", False),
    "narrow keys": (8, 64, 256, 2, "bfloat16", "token", False),
    "most tokens": (16, 128, 64, tpu_step.MAX_TOKENS, "bfloat16", "token", True),
}


QUICK = ("one token-v5e", "four tokens-v6e", "half-v5p", "most tokens-TPU7x")


@needs_tpu_compiler
@pytest.mark.parametrize(("name", "topology"), quick(itertools.product(COMPILED, TOPOLOGIES), QUICK, joined))
def test_the_tpu_compiler_takes_it_and_keeps_the_state_in_place(name, topology):
    """The kernel writes where it reads, and the state is copied nowhere, unless it is not given away."""
    *_, normalize = COMPILED[name]
    state, q, v, g = shapes(*COMPILED[name])

    def step(state, q, k, v, g):
        return linear_attention_step(q, k, v, state, log_decay=g, normalize=normalize)

    def copies(text):
        sizes = ",".join(map(str, jax.tree.leaves(state)[0].shape))
        return re.findall(rf"= f32\[{sizes}\]\S* (?:copy|copy-start|fusion)\(", text)

    compiled = compile_for(topology, step, state, q, q, v, g, donate_argnums=(0,))
    text = compiled.as_text()
    assert kernels_of(compiled) == 1
    assert not copies(text)
    assert "output_to_operand_aliasing={{1}:" in text
    assert "input_output_alias={ {1}: (0, {}" in text
    if name == "one token":
        assert copies(compile_for(topology, step, state, q, q, v, g).as_text())


def test_block_memory_and_bytes():
    assert (
        tpu_step.vmem_bytes(1, 8, 128, 128, jnp.bfloat16)
        == 2 * (2 * 2**19 + 6 * 2**12 + 2**13) + 3 * 2**19 + 12 * 2**17
    )
    args = api.normal_form(*(jnp.ones((2, 1, 8, 128), jnp.bfloat16),) * 3, initial_state=api.init_state(2, 8, 128, 128))
    assert tpu_step.bytes_moved(args) == 2 * 8 * (2 * 4 * 128 * 128 + 2 * 4 * 128)


def test_refusals():
    state, x = api.init_state(2, 4, 8, 8), jnp.ones((2, 3, 4, 8))
    with pytest.raises(ValueError, match=r"k_t must be \(B, T, G, D\), got shape \(2, 4, 8\)"):
        linear_attention_step(x, x[:, 0], x, state)
    with pytest.raises(ValueError, match=r"q_t must be \(B, H, D\) or \(B, T, H, D\), got shape \(4, 8\)"):
        linear_attention_step(x[0, 0], x, x, state)
    with pytest.raises(ValueError, match=r"log_decay of a step must be \(H,\), \(B, T, H\) or .* got shape \(2, 4\)"):
        linear_attention_step(x, x, x, state, log_decay=jnp.zeros((2, 4)))
    with pytest.raises(dispatch.UnsupportedError, match="implementation='tpu' refuses: needs tpu"):
        linear_attention_step(x, x, x, state, implementation="tpu")
    with pytest.raises(
        ValueError, match="implementation='tpus' of linear_attention_step is unknown, did you mean 'tpu'"
    ):
        linear_attention_step(x, x, x, state, implementation="tpus")
    refuse = functools.partial(dispatch.choose, "linear_attention_step", implementation="tpu", platform="tpu")
    with pytest.raises(dispatch.UnsupportedError, match="at most 32 tokens at once, got 33"):
        long = jnp.ones((2, 33, 4, 8))
        refuse(api.normal_form(long, long, long, initial_state=state))
    with pytest.raises(dispatch.UnsupportedError, match=r"12 states of 1024 x 512 need \d+ bytes on chip"):
        wide, values = jnp.ones((1, 1, 12, 1024)), jnp.ones((1, 1, 12, 512))
        refuse(api.normal_form(wide, wide, values, initial_state=api.init_state(1, 12, 1024, 512)))
