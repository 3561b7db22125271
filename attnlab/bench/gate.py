"""A result is compared with float64 before its time counts.

The reference is a recurrence in float64, too slow for whole problems: it runs on the first tokens of two rows, a row
being a batch and a head. Causal outputs there depend on nothing else; so do the gradients there, when the cotangent is
zero everywhere else.
"""

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from attnlab.bench.problem import Problem, rows_of

PREFIX = {"forward": 4096, "gradient": 512, "decode": 1}
TOLERANCE = {"float32": 1e-6, "bfloat16": 4e-3, "float16": 4e-3}
PEER_TOLERANCE = 2e-2  # of others: far from any mistake, whatever their rounding


@dataclasses.dataclass(frozen=True)
class Gate:
    """Numbers that a contender must reproduce.

    Attributes:
      rows: pairs (batch, head), the first and the last.
      prefix: number of tokens.
      inputs: arguments of those rows, see `rows_of`, and "dy" for a gradient, in float64.
      expected: "y", and "state" or the gradients by argument, in float64.
    """

    rows: tuple[tuple[int, int], ...]
    prefix: int
    inputs: dict[str, np.ndarray]
    expected: dict[str, np.ndarray]

    def error(self, got: Mapping[str, np.ndarray], but: Collection[str] = ()) -> float:
        """Largest relative RMS error over the expected arrays; infinite where a number is not finite.

        Args:
          got: arrays by name, like the expected ones.
          but: names of arrays that are not compared.
        """
        worst = 0.0
        for name, want in self.expected.items():
            if name in but:
                continue
            off = np.sqrt(np.mean((got[name] - want) ** 2)) / (np.sqrt(np.mean(want**2)) or 1.0)
            worst = max(worst, float(off) if np.isfinite(off) else np.inf)
        return worst

    def save(self, path: Path) -> None:
        """Writes the gate where another process finds it."""
        inputs = {f"inputs.{name}": array for name, array in self.inputs.items()}
        expected = {f"expected.{name}": array for name, array in self.expected.items()}
        np.savez(path, rows=np.array(self.rows), prefix=self.prefix, **inputs, **expected)

    @classmethod
    def load(cls, path: Path) -> "Gate":
        """Reads what `save` wrote."""
        with np.load(path) as data:
            parts = {
                part: {name.removeprefix(part): data[name] for name in data if name.startswith(part)}
                for part in ("inputs.", "expected.")
            }
            rows = tuple((int(b), int(h)) for b, h in data["rows"])
            return cls(rows, int(data["prefix"]), parts["inputs."], parts["expected."])


def tolerance(problem: Problem) -> float:
    """Largest relative RMS error that our implementations may have: that of the dtype, twice that for gradients."""
    return TOLERANCE[problem.dtype] * (2 if problem.mode == "gradient" else 1)


def make(problem: Problem, arrays: Mapping[str, jax.Array], *, softmax: bool = False) -> Gate:
    """The gate of a problem with these arguments.

    Args:
      problem: what is timed.
      arrays: its arguments.
      softmax: of causal softmax attention on the same q, k, v instead, with logits q·k.
    """
    shape = problem.shape
    rows = tuple(dict.fromkeys([(0, 0), (shape.batch - 1, shape.heads - 1)]))
    prefix = min(PREFIX[problem.mode] // (4 if softmax else 1) or 1, shape.length)
    names = ("q", "k", "v") if softmax else tuple(arrays)
    inputs = {name: rows_of(arrays[name], name, problem.decay, rows, prefix) for name in names}
    if problem.mode == "decode":
        return Gate(rows, prefix, inputs, _step(inputs))
    if problem.mode == "gradient":
        dy = np.random.default_rng(0).standard_normal((len(rows), prefix, 1, shape.value_size))
        inputs["dy"] = dy.astype(jnp.dtype(problem.dtype)).astype(np.float64)
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        function = (
            _softmax if softmax else dataclasses.replace(problem, decay=_row_decay(problem)).function("reference")
        )
        y, pullback = jax.vjp(function, {name: jnp.asarray(inputs[name]) for name in names})
        expected = {"y": y}
        if problem.mode == "gradient":
            gradients = pullback(jnp.asarray(inputs["dy"]))[0]
            expected |= {name: gradients[name] for name in (names if softmax else problem.differentiated)}
        return Gate(rows, prefix, inputs, {name: np.asarray(array, np.float64) for name, array in expected.items()})


def _step(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """y and the state after one token, for rows (R, 1, 1, ...) and states (R, 1, D, E)."""
    q, k, v = (inputs[name][:, 0, :, :] for name in "qkv")
    decay = np.exp(inputs["log_decay"][:, 0]) if "log_decay" in inputs else np.ones(q.shape[:2])
    state = inputs["state"] * decay.reshape(*decay.shape, *(1,) * (4 - decay.ndim))
    if "beta" in inputs:
        v = inputs["beta"][:, 0, :, None] * (v - np.einsum("rhd,rhde->rhe", k, state))
    state = state + k[..., :, None] * v[..., None, :]
    return {"y": np.einsum("rhd,rhde->rhe", q, state)[:, None], "state": state}


def _row_decay(problem: Problem) -> str:
    """Rows come from different heads: a decay per head is one per token there."""
    return "token" if problem.decay == "head" else problem.decay


def _softmax(arrays: Mapping[str, jax.Array]) -> jax.Array:
    q, k, v = (arrays[name] for name in "qkv")
    logits = jnp.einsum("bihd,bjhd->bhij", q, k)
    logits = jnp.where(jnp.tril(jnp.ones(logits.shape[-2:], bool)), logits, -jnp.inf)
    return jnp.einsum("bhij,bjhe->bihe", jax.nn.softmax(logits, axis=-1), v)
