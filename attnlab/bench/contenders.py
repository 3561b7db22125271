"""What is timed in this process: our implementations, and JAX's softmax attention."""

import dataclasses
import functools
import importlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnlab.bench.gate import Gate
from attnlab.bench.problem import Problem, rows_of
from attnlab.bench.timing import median_seconds
from pallas_kernels import dispatch

QUADRATIC_BYTES = 2**31  # of the N×N weights, beyond which a quadratic form is not tried


@dataclasses.dataclass(frozen=True)
class Contender:
    """Something that solves a problem.

    Attributes:
      name: in tables.
      function: from the arguments to y, or to y and the state when decoding.
      own: whether it is ours, and must pass the gate.
      softmax: whether it computes softmax attention of q, k and v instead.
    """

    name: str
    function: Callable[[dict[str, jax.Array]], Any]
    own: bool = False
    softmax: bool = False


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What was measured of a contender.

    Attributes:
      error: largest relative RMS error, see `Gate.error`.
      seconds: of a call; None if the error was too large.
      memory: bytes of arguments, results and temporaries; None where that is not known.
    """

    error: float
    seconds: float | None = None
    memory: int | None = None


def contenders(problem: Problem, arrays: Mapping[str, jax.Array]) -> tuple[list[Contender], dict[str, str]]:
    """What can solve a problem here, the best of our implementations first, and why others cannot, by name."""
    found, refused = [], {}
    if problem.mode == "decode" and f"{problem.op}_step" not in dispatch.ops():
        return [Contender("attnlab", problem.function(None), own=True)], refused
    for choice in _explain(problem, arrays):
        name = f"attnlab {choice.name}"
        if choice.name == "reference":  # a loop over tokens, and what the gate compares with
            continue
        if choice.ok:
            found.append(Contender(name, problem.function(choice.name), own=True))
        else:
            refused[name] = choice.reason
    if not found:
        raise dispatch.UnsupportedError(f"{problem.op}: nothing takes {problem}: {refused}")
    if problem.mode == "decode":
        return found, refused
    for peer in _peers(problem):
        reason = _refusal(peer, problem)
        if reason is None:
            found.append(peer)
        else:
            refused[peer.name] = reason
    return found, refused


def measure(
    contender: Contender, problem: Problem, arrays: dict[str, jax.Array], gate: Gate, tolerance: float, budget: float
) -> Measurement:
    """Gates a contender, then times the very function that passed.

    Args:
      contender: what to measure.
      problem: what it solves.
      arrays: its arguments, which stay as they are.
      gate: what it must reproduce.
      tolerance: largest error with which it is timed.
      budget: seconds of timing.
    """
    function = contender.function
    if contender.softmax:
        arrays = {name: arrays[name] for name in "qkv"}
    if problem.mode == "gradient":
        names = tuple("qkv") if contender.softmax else problem.differentiated

        def run(arrays: dict[str, jax.Array], dy: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
            wanted = {name: arrays[name] for name in names}
            y, pullback = jax.vjp(lambda wanted: function(arrays | wanted), wanted)
            return y, pullback(dy)[0]

        dense = jax.random.normal(jax.random.key(1), problem.output_shape, problem.dtype)
        masked = _scatter(jnp.zeros_like(dense), gate)
        compiled = jax.jit(run).lower(arrays, dense).compile()
        y, gradients = compiled(arrays, masked)
        got = {"y": y} | gradients
        call = functools.partial(compiled, arrays, dense)
    elif problem.mode == "decode":
        # The state is given away and comes back, as in a loop that generates.
        state = jnp.copy(arrays["state"])
        tokens = {name: array for name, array in arrays.items() if name != "state"}
        step = jax.jit(lambda state, tokens: function({**tokens, "state": state}), donate_argnums=0)
        compiled = step.lower(state, tokens).compile()
        y, state = compiled(state, tokens)
        got = {"y": y[:, None], "state": state}
        holder = [jnp.copy(state)]

        def call() -> jax.Array:
            y, holder[0] = compiled(holder[0], tokens)
            return y
    else:
        compiled = jax.jit(function).lower(arrays).compile()
        got = {"y": compiled(arrays)}
        call = functools.partial(compiled, arrays)
    rows = {name: rows_of(array, name, "token", gate.rows, gate.prefix) for name, array in got.items()}
    error = gate.error({name: rows[name] for name in gate.expected})
    if error > tolerance:
        return Measurement(error)
    analysis = compiled.memory_analysis()
    memory = None
    if analysis is not None:
        memory = analysis.argument_size_in_bytes + analysis.output_size_in_bytes + analysis.temp_size_in_bytes
        memory -= analysis.alias_size_in_bytes
    return Measurement(error, median_seconds(call, budget), memory)


def _explain(problem: Problem, arrays: Mapping[str, jax.Array]) -> list[dispatch.Choice]:
    here = dispatch.current_platform(), dispatch.current_device_kind()
    with dispatch.target(*here, qualified_only=False):  # the benchmark names what it times, and has a gate of its own
        return _explain_here(problem, arrays)


def _explain_here(problem: Problem, arrays: Mapping[str, jax.Array]) -> list[dispatch.Choice]:
    if problem.mode == "decode":
        return dispatch.explain(f"{problem.op}_step")
    # The package: as an attribute of `pallas_kernels` its name is that of the function.
    return importlib.import_module(f"pallas_kernels.{problem.op}").explain(**arrays)


def _peers(problem: Problem) -> list[Contender]:
    peers = []
    if problem.op == "linear_attention" and problem.decay != "channel":
        from pallas_kernels.linear_attention import api, reference

        def quadratic(arrays: dict[str, jax.Array]) -> jax.Array:
            return reference.quadratic(api.normal_form(**arrays))[0]

        peers.append(Contender("attnlab quadratic form", quadratic))

    def softmax(arrays: dict[str, jax.Array], implementation: str) -> jax.Array:
        return jax.nn.dot_product_attention(**_qkv(arrays), is_causal=True, scale=1.0, implementation=implementation)

    xla = functools.partial(softmax, implementation="xla")
    peers.append(Contender("jax softmax attention", xla, softmax=True))
    if dispatch.current_platform() == "gpu" and problem.dtype != "float32":
        cudnn = functools.partial(softmax, implementation="cudnn")
        peers.append(Contender("jax softmax attention, cuDNN", cudnn, softmax=True))
    return peers


def _qkv(arrays: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    return dict(zip(("query", "key", "value"), (arrays[name] for name in "qkv"), strict=True))


def _refusal(peer: Contender, problem: Problem) -> str | None:
    shape = problem.shape
    if peer.softmax and shape.key_size != shape.value_size:
        return f"it needs D = E, got D = {shape.key_size} and E = {shape.value_size}"
    needed = 4 * shape.batch * shape.heads * shape.length**2
    if needed > QUADRATIC_BYTES and "cuDNN" not in peer.name:
        return f"its weights would take {needed / 2**30:.0f} GiB"
    return None


def _scatter(zeros: jax.Array, gate: Gate) -> jax.Array:
    for (b, h), dy in zip(gate.rows, gate.inputs["dy"], strict=True):
        zeros = zeros.at[b, : gate.prefix, h : h + 1].set(jnp.asarray(dy.astype(np.float32), zeros.dtype))
    return zeros
