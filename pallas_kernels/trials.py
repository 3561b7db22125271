"""Trials of kernels on the device at hand: whether they are right, and faster than `xla`.

An op names its trials when it registers its implementations (`dispatch.register(..., trials=...)`); they stand in its
`cases.py`. Each is run forward and backward and held against the op's `reference` in float64 on the CPU; those that are
timed, against `xla` on the device. `qualification` remembers what comes out.
"""

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import dispatch, qualification
from pallas_kernels.dtypes import at_least_float32
from pallas_kernels.qualification import Verdict, Verdicts

TOLERANCE = {"bfloat16": 4e-3, "float16": 4e-3, "float32": 1e-6}  # relative RMS of outputs; twice that of gradients
CALLS = 5  # of each function that is timed, the best of which counts


@dataclasses.dataclass(frozen=True)
class Trial:
    """One call of an op.

    Attributes:
      name: for messages.
      dtype: of the arguments that matter, which sets the tolerance.
      arguments: a tree of floating arrays, as NumPy's.
      call: (arguments, implementation) -> a tree of outputs.
      timed: whether it is for speed alone; otherwise it is for correctness alone.
      differentiable: whether the gradient is part of it.
    """

    name: str
    dtype: str
    arguments: Mapping[str, Any]
    call: Callable[[Mapping[str, Any], str], Any]
    timed: bool = False
    differentiable: bool = True


def qualify(*, force: bool = False, announce: Callable[[str], None] = lambda text: None) -> Verdicts:
    """Tries every kernel on the device where JAX puts arrays, and remembers which are right and faster than `xla`.

    It takes seconds to a minute. On the CPU there are no kernels, and nothing is to do.

    Args:
      force: try again what is remembered.
      announce: is told what happens, a line at a time.

    Returns:
      Verdicts by (op, implementation), also of earlier trials.

    Raises:
      RuntimeError: if JAX has no CPU beside the device, where the reference runs.
    """
    platform, kind = dispatch.current_platform(), dispatch.current_device_kind()
    if platform == "cpu" or kind is None:
        return {}
    known = qualification.recall(kind)
    if known is not None and not force:
        return known
    _cpu()
    verdicts: Verdicts = {}
    for op in dispatch.ops():
        kernels = [entry for entry in dispatch.implementations(op) if entry.is_kernel]
        kernels = [entry for entry in kernels if entry.refusal(None, platform) is None]
        trials = list(dispatch.trials(op)) if kernels else []
        exact = _Exact()
        for entry in kernels:
            announce(f"{op}: {entry.name} ...")
            verdicts[op, entry.name] = _judge(entry.name, trials, exact)
    qualification.remember(kind, verdicts)
    return verdicts


def qualify_new_device(announce: Callable[[str], None] = print) -> None:
    """`qualify` on a kind of device that was not tried yet, with one line; process 0 tries for all processes.

    Where nothing can be tried, the line says so, and `xla` runs.
    """
    platform, kind = dispatch.current_platform(), dispatch.current_device_kind()
    if platform == "cpu" or kind is None:
        return
    text = ""
    try:
        if jax.process_index() == 0:
            new = qualification.recall(kind) is None
            start, verdicts = time.perf_counter(), {}
            try:
                verdicts = qualify()
            except RuntimeError as error:
                announce(f"no kernels are tried on {kind}, so xla runs: {error}")
                new = False
            text = qualification.dumped(kind, verdicts)
            if new:
                chosen = ", ".join(f"{op} ({name})" for (op, name), verdict in verdicts.items() if verdict.qualified)
                took = f"{time.perf_counter() - start:.0f} s"
                announce(f"kernels tried on {kind} in {took}; qualified: {chosen or 'none, so xla runs'}")
    finally:  # the others wait for an answer, also where there is none
        if jax.process_count() > 1:
            text = _from_first(text)
    qualification.adopt(kind, qualification.loaded(text))


def _from_first(text: str) -> str:
    """The text that process 0 has, on all of them."""
    from jax.experimental import multihost_utils

    data = np.frombuffer(text.encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(data.size)))
    data = np.resize(data, size) if data.size else np.zeros(size, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(data)).tobytes().decode()


class Results(NamedTuple):
    """Outputs and gradients of a trial, in float64."""

    outputs: list[np.ndarray]
    gradients: list[np.ndarray]


class _Exact:
    """Results of the reference in float64, each computed once."""

    def __init__(self) -> None:
        self._found: dict[str, Results] = {}

    def __call__(self, trial: Trial) -> Results:
        key = f"{trial.name} {trial.dtype}"
        if key not in self._found:
            with jax.default_device(_cpu()), jax.enable_x64(True), dispatch.target("cpu"):
                wide = jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), dict(trial.arguments))
                self._found[key] = _results(trial, "reference", wide)
        return self._found[key]


def _cpu() -> jax.Device:
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError as error:
        raise RuntimeError("kernels are held against the CPU: add it, as in JAX_PLATFORMS=cuda,cpu") from error


def _judge(name: str, trials: Iterable[Trial], exact: _Exact) -> Verdict:
    worst, ran = 0.0, False
    own: list[float] = []
    xla: list[float] = []
    for trial in sorted(trials, key=lambda trial: trial.timed):
        arguments = jax.tree.map(jnp.asarray, dict(trial.arguments))
        try:
            if trial.timed:
                own.append(seconds_of(trial, name, arguments))
                xla.append(seconds_of(trial, "xla", arguments))
                continue
            got = _results(trial, name, arguments)
        except dispatch.UnsupportedError:
            continue
        except Exception as error:  # whatever a compiler says
            first = (str(error).strip().splitlines() or [""])[0][:200]
            return Verdict(False, f"{trial.name} ({trial.dtype}) failed with {type(error).__name__}: {first}")
        ran = True
        over = _over_tolerance(trial, got, exact(trial))
        worst = max(worst, over)
        if not over <= 1:  # NaN is wrong
            text = f"{trial.name} ({trial.dtype}) is wrong, with {over:.1f} times the error that is allowed"
            return Verdict(False, text, error=over)
    if not ran:
        return Verdict(False, "it takes none of the cases that are tried")
    if not own:
        return Verdict(True, "it takes none of the cases that are timed", worst)
    seconds, xla_seconds = sum(own), sum(xla)
    slower = f"{1e3 * seconds:.3g} ms against {1e3 * xla_seconds:.3g} ms of xla"
    return Verdict(True, "" if seconds < xla_seconds else slower, worst, seconds, xla_seconds)


def _over_tolerance(trial: Trial, got: Results, want: Results) -> float:
    """Largest relative RMS error over what is allowed; infinity where there is no number."""
    errors = [_relative_rms(*pair) for pair in zip(got.outputs, want.outputs, strict=True)]
    errors += [_relative_rms(*pair) / 2 for pair in zip(got.gradients, want.gradients, strict=True)]
    return max(error / TOLERANCE[trial.dtype] if np.isfinite(error) else float("inf") for error in errors)


def _relative_rms(got: np.ndarray, want: np.ndarray) -> float:
    error, size = (float(np.sqrt(np.mean(np.square(x)))) for x in (got - want, want))
    return error / max(size, 1e-30)


def _results(trial: Trial, name: str, arguments: Any) -> Results:
    found = jax.jit(_with_gradient(trial, name))(arguments)
    return Results(*([np.asarray(x, np.float64) for x in jax.tree.leaves(part)] for part in found))


def _with_gradient(trial: Trial, name: str) -> Callable[[Any], tuple[Any, Any]]:
    """The outputs of a trial, and the gradient of a random linear function of them."""

    def loss(arguments):
        outputs, rng = trial.call(arguments, name), np.random.default_rng(0)
        total = 0.0
        for x in jax.tree.leaves(outputs):
            wide = at_least_float32(x.dtype)
            # Exact in bfloat16: rounded on the way it would show as an error of gradients that nearly cancel.
            direction = jnp.asarray(rng.standard_normal(x.shape), jnp.bfloat16).astype(wide)
            total += jnp.vdot(x.astype(wide), direction)
        return total, outputs

    if not trial.differentiable:
        return lambda arguments: (trial.call(arguments, name), ())

    def both(arguments):
        (_, outputs), gradients = jax.value_and_grad(loss, has_aux=True)(arguments)
        return outputs, gradients

    return both


def seconds_of(trial: Trial, name: str, arguments: Any) -> float:
    """Best time of a call, forward and backward, after one that compiles."""
    run = jax.jit(_with_gradient(trial, name))
    jax.block_until_ready(run(arguments))
    times = []
    for _ in range(CALLS):
        start = time.perf_counter()
        jax.block_until_ready(run(arguments))
        times.append(time.perf_counter() - start)
    return min(times)
