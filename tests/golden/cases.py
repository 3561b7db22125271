"""Golden cases: where they are, and how one is compared with what its adapter computes.

`tests/golden/README.md` says what the files hold. The measure is the relative root mean square per array.
"""

import functools
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Run = Callable[[dict[str, Any], dict[str, jax.Array], dict[str, jax.Array]], Mapping[str, jax.Array]]

HERE = Path(__file__).parent
DATA = HERE / "data"
SHARED = HERE.parents[2] / "shared" / "golden"
OUTPUT_TOLERANCE, GRADIENT_TOLERANCE = 2e-5, 1e-4
SMALLEST_SCALE = 1e-6
GRADIENT_FLOOR = 1e-2  # of the file's largest gradient: those that are zero by symmetry hold noise alone


def adapters(folder: Path = HERE / "adapters") -> list[str]:
    """The slugs that have an adapter: its modules but for those that begin with an underscore."""
    return sorted(path.stem for path in folder.glob("*.py") if not path.stem.startswith("_"))


def find_cases(slugs: Iterable[str], folders: Iterable[Path] = (DATA, SHARED)) -> list[Path]:
    """The cases of these slugs, those of one name once: the first folder that has it counts."""
    found: dict[tuple[str, str], Path] = {}
    for folder in folders:
        for slug in slugs:
            for path in (folder / slug).glob("*.npz"):
                found.setdefault((slug, path.stem), path)
    return [found[case] for case in sorted(found)]


def read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What a file says of itself, and its arrays."""
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    return json.loads(str(arrays.pop("meta"))), arrays


def group(arrays: Mapping[str, np.ndarray], group: str) -> dict[str, np.ndarray]:
    """The arrays of one group of a file, by their names in it."""
    return {name.removeprefix(f"{group}/"): array for name, array in arrays.items() if name.startswith(f"{group}/")}


def rms(array: Any) -> float:
    """Root mean square of the finite entries."""
    array = np.asarray(array, np.float64)
    finite = array[np.isfinite(array)]
    return float(np.sqrt(np.mean(finite**2))) if finite.size else 0.0


def fault(got: Any, want: np.ndarray, tolerance: float, floor: float = SMALLEST_SCALE) -> str | None:
    """What is wrong with `got`, or None: floating point within `tolerance`, all else exactly."""
    got = np.asarray(got)
    if got.shape != want.shape:
        return f"has shape {got.shape} for {want.shape}"
    if not np.issubdtype(want.dtype, np.floating):
        return None if np.array_equal(got, want) else f"differs in {np.sum(got != want)} of {want.size} entries"
    got, want = got.astype(np.float64), want.astype(np.float64)
    finite = np.isfinite(want)
    if not np.array_equal(np.isfinite(got), finite) or not np.array_equal(got[~finite], want[~finite], equal_nan=True):
        return "differs in entries that are not finite"
    error = rms(got[finite] - want[finite]) / max(rms(want), floor)
    return None if error <= tolerance else f"has the relative error {error:.1e}, allowed is {tolerance:.0e}"


def faults(path: Path, run: Run) -> list[str]:
    """All that differs between a case's numbers and those of the adapter's function `run`; [] if it passes."""
    meta, arrays = read(path)
    param, inputs = ({k: jnp.asarray(v) for k, v in group(arrays, kind).items()} for kind in ("param", "in"))
    want = {"in": group(arrays, "grad_in"), "param": group(arrays, "grad_param")}
    cotangents = group(arrays, "cot")
    if cotangents and any(want.values()):
        chosen = {"in": {k: inputs[k] for k in want["in"]}, "param": {k: param[k] for k in want["param"]}}
        outputs, grads = _outputs_and_gradients(lambda p, i: run(meta, param | p, inputs | i), chosen, cotangents)
    else:
        outputs, grads = _outputs(functools.partial(run, meta), param, inputs), None

    found = []
    for name, reference in group(arrays, "out").items():
        if name in meta.get("not_compared", ()):
            continue
        wrong = fault(outputs[name], reference, OUTPUT_TOLERANCE) if name in outputs else "is missing"
        found += [f"out/{name} {wrong}"] if wrong else []
    if grads is None:
        return found
    if missing := sorted(cotangents.keys() - outputs.keys()):
        return [*found, f"no gradients without the outputs {', '.join(missing)}"]
    floor = max(SMALLEST_SCALE, GRADIENT_FLOOR * max(rms(g) for gradients in want.values() for g in gradients.values()))
    for kind, references in want.items():
        for name, reference in references.items():
            wrong = fault(grads[kind][name], reference, GRADIENT_TOLERANCE, floor)
            found += [f"grad_{kind}/{name} {wrong}"] if wrong else []
    return found


def _outputs(call: Callable[..., Mapping[str, jax.Array]], *arrays: Any) -> Mapping[str, jax.Array]:
    """The outputs by one compiled program, or, where an adapter works on values with NumPy, as it runs."""
    try:
        return jax.jit(call)(*arrays)
    except jax.errors.TracerArrayConversionError:
        return call(*arrays)


def _outputs_and_gradients(
    call: Callable[..., Mapping[str, jax.Array]], chosen: dict[str, Any], cotangents: Mapping[str, np.ndarray]
) -> tuple[Mapping[str, jax.Array], dict[str, Any]]:
    """The outputs, computed without differentiation (a custom VJP runs other code then), and the gradients.

    All in one compiled program, which takes a third of the time of running operation by operation. What is not
    differentiated stays concrete: adapters need not be traceable for it.
    """
    call = jax.jit(call)  # traced once for both

    def scalar(chosen: dict[str, Any]) -> jax.Array:
        outputs = call(chosen["param"], chosen["in"])
        terms = (jnp.vdot(outputs[k].astype(jnp.float32), cot) for k, cot in cotangents.items() if k in outputs)
        return sum(terms, start=jnp.float32(0))

    def both(chosen: dict[str, Any]) -> tuple[Mapping[str, jax.Array], dict[str, Any]]:
        return call(chosen["param"], chosen["in"]), jax.grad(scalar)(chosen)

    return jax.jit(both)(chosen)
