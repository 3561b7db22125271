"""The sweep over chunks, on a small op whose recurrence a plain scan over tokens computes too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.chunks import Plan, sweep

STATE = 3


def token(shared, tokens, state):
    """A state (B, 3) that remembers what the tokens say of it."""
    state = jnp.tanh(shared["mix"] * state + tokens["x"])
    return jnp.sum(tokens["w"] * state, axis=-1, keepdims=True), state


def chunk(shared, tokens, state):
    outputs = []
    for i in range(tokens["x"].shape[1]):
        y, state = token(shared, {name: x[:, i] for name, x in tokens.items()}, state)
        outputs.append(y)
    return jnp.stack(outputs, axis=1), state


def by_token(shared, tokens, state):
    def step(state, tokens):
        y, state = token(shared, tokens, state)
        return state, y

    state, y = jax.lax.scan(step, state, jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), tokens))
    return jnp.swapaxes(y, 0, 1), state


def empty(tokens):
    return jnp.zeros_like(tokens["x"][..., :1])


PLAN = Plan(2, chunk, empty)


def arguments(length: int):
    keys = jax.random.split(jax.random.key(0), 4)
    tokens = {name: jax.random.normal(key, (2, length, STATE)) for name, key in zip("xw", keys, strict=False)}
    shared = {"mix": jax.random.normal(keys[2], (STATE,)), "absent": None}
    return shared, tokens, jax.random.normal(keys[3], (2, STATE))


@pytest.fixture(params=[1, 2, 3, 100])
def every(request, monkeypatch) -> int:
    """Chunks between kept states: as many as leave no more memory to these than there is."""
    state, chunk = STATE, PLAN.size * 2 * (2 * STATE + 1)
    monkeypatch.setattr("pallas_kernels.chunks.KEPT", state / chunk / (request.param - 0.5))
    return request.param


@pytest.mark.parametrize("length", [2, 14, 20])
def test_outputs_and_gradients_are_those_of_the_recurrence(length, every):
    shared, tokens, state = arguments(length)
    assert PLAN.every(tokens, state) == min(every, length // PLAN.size)

    def loss(run):
        def of(*arguments):
            y, last = run(*arguments)
            return jnp.sum(jnp.sin(y)) + jnp.sum(last**2)

        return jax.jit(jax.value_and_grad(of, argnums=(0, 1, 2)))

    got = loss(lambda *a: sweep(PLAN, *a))(shared, tokens, state)
    want = loss(by_token)(shared, tokens, state)
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=2e-5, atol=1e-6), got, want)


@pytest.mark.parametrize("output", [0, 1], ids=["outputs alone", "last state alone"])
def test_an_output_without_a_cotangent(output):
    values = arguments(14)
    got, want = (
        jax.grad(lambda s, run=run: jnp.sum(run(*values[:2], s)[output]))(values[2])
        for run in (lambda *a: sweep(PLAN, *a), by_token)
    )
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-6)


@jax.custom_jvp
def undifferentiated(x):
    return x


@undifferentiated.defjvp
def _(primals, tangents):
    raise AssertionError("a gradient that nobody asked for")


@pytest.mark.parametrize("names", [("w",), ("mix",), ("w", "mix")], ids=str)
@pytest.mark.parametrize("every", [1, 3], indirect=True)
def test_only_the_gradients_that_are_asked_for_are_computed(names, every):
    shared, tokens, state = arguments(14)

    def strict(shared, tokens, state):
        hide = lambda tree: {n: x if n in names or x is None else undifferentiated(x) for n, x in tree.items()}  # noqa: E731
        return chunk(hide(shared), hide(tokens), state)

    def loss(run):
        def of(wanted):
            y, _ = run(
                {n: wanted.get(n, x) for n, x in shared.items()}, tokens | {"w": wanted.get("w", tokens["w"])}, state
            )
            return jnp.sum(jnp.sin(y))

        return of

    wanted = {n: x for n, x in (shared | tokens).items() if n in names}
    got = jax.jit(jax.grad(loss(lambda *a: sweep(Plan(2, strict, empty), *a))))(wanted)
    jax.tree.map(
        lambda g, w: np.testing.assert_allclose(g, w, rtol=2e-5, atol=1e-6), got, jax.grad(loss(by_token))(wanted)
    )
    with pytest.raises(AssertionError, match="nobody asked"):  # so the test can fail
        jax.grad(lambda x: loss(lambda s, t, i: sweep(Plan(2, strict, empty), s, t | {"x": x}, i))(wanted))(tokens["x"])
