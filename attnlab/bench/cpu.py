"""On a CPU, against what a user would pick instead: PyTorch's fused attention and modules around it, timm's models.

Ours runs in this process, theirs in another (`cpu_torch`), in turns, so that what else the machine does meets both.
Ops and mixers compute the same numbers before they are timed; models have the same number of parameters.
"""

import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from attnlab.attention.dense.softmax_attention import SoftmaxAttention
from attnlab.bench.timing import median_seconds
from attnlab.models.gpt2 import GPT2
from attnlab.models.vit import ViT
from attnlab.nn.depthwise import depthwise_conv
from attnlab.nn.softmax import softmax_attention

VOCABULARY = 256
TOLERANCE = 1e-5
"""Of outputs and gradients, relative RMS, in float32."""


@dataclasses.dataclass(frozen=True)
class Case:
    """What both compute.

    Attributes:
      name: in the table.
      kind: "op" (q, k, v of `shape` B, N, H, D), "mixer" (tokens of B, N, C, H), "depthwise" (B, side, C and a 3×3
        kernel), "model" (batch of a model of 224×224 images: B, C, depth, H) or "language" (of GPT-2 with 256 tokens:
        B, N, C, depth, H).
      shape: see `kind`.
      causal: of attention.
      peer: the model's name in timm.
    """

    name: str
    kind: Literal["op", "mixer", "depthwise", "model", "language"]
    shape: tuple[int, ...]
    causal: bool = False
    peer: str = ""


CASES = (
    Case("softmax op, causal, 1×4096×8×64", "op", (1, 4096, 8, 64), causal=True),
    Case("softmax op, full, 1×4096×8×64", "op", (1, 4096, 8, 64)),
    Case("softmax op, 8×197×6×64", "op", (8, 197, 6, 64)),
    Case("SoftmaxAttention, causal, 8×512×512, 8 heads", "mixer", (8, 512, 512, 8), causal=True),
    Case("SoftmaxAttention, 8×197×384, 6 heads", "mixer", (8, 197, 384, 6)),
    Case("depthwise 3×3, 8×56×56×96", "depthwise", (8, 56, 96)),
    Case("DeiT-tiny, 4 images", "model", (4, 192, 12, 3), peer="deit_tiny_patch16_224"),
    Case("ViT-S, 4 images", "model", (4, 384, 12, 6), peer="vit_small_patch16_224"),
    Case("GPT-2 of 6 layers, 8×256×384", "language", (8, 256, 384, 6, 6), causal=True),
)


@dataclasses.dataclass(frozen=True)
class Line:
    """A case's medians in milliseconds; `step` is forward and backward, of models with AdamW; or why there are none."""

    case: str
    forward: tuple[float, float] | None = None
    step: tuple[float, float] | None = None
    reason: str = ""


def arrays_of(case: Case) -> dict[str, np.ndarray]:
    """What both are given: float32 arrays by name, of language token ids."""
    rng = np.random.default_rng(0)
    if case.kind == "op":
        shapes = dict.fromkeys(("q", "k", "v", "dy"), case.shape)
    elif case.kind == "mixer":
        b, n, c, _ = case.shape
        shapes = {"x": (b, n, c), "dy": (b, n, c)} | dict.fromkeys(("query", "key", "value", "out"), (c, c))
    elif case.kind == "depthwise":
        b, side, c = case.shape
        shapes = {"x": (b, side, side, c), "kernel": (3, 3, c), "dy": (b, side, side, c)}
    elif case.kind == "language":
        return {"x": rng.integers(VOCABULARY, size=case.shape[:2])}
    else:
        shapes = {"x": (case.shape[0], 224, 224, 3)}
    arrays = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    for name in ("query", "key", "value", "out"):
        if name in arrays:
            arrays[name] /= np.float32(arrays[name].shape[0] ** 0.5)
    return arrays


def ours(case: Case) -> tuple[Callable[[], Any], Callable[[], Any], dict[str, np.ndarray], int]:
    """Compiled calls, forward and step; the forward's result and gradients by name; and the number of parameters."""
    arrays = {name: jnp.asarray(array) for name, array in arrays_of(case).items()}
    if case.kind in ("model", "language"):
        return _our_model(case, arrays["x"])
    dy = arrays.pop("dy")
    if case.kind == "op":

        def function(a: dict[str, jax.Array]) -> jax.Array:
            return softmax_attention(a["q"], a["k"], a["v"], causal=case.causal)

    elif case.kind == "depthwise":

        def function(a: dict[str, jax.Array]) -> jax.Array:
            return depthwise_conv(a["x"], a["kernel"])

    else:
        _, _, c, h = case.shape
        options = {"num_heads": h, "causal": case.causal, "qkv_bias": False, "out_bias": False}
        graph, state = nnx.split(SoftmaxAttention(c, **options, rngs=nnx.Rngs(0)))

        def function(a: dict[str, jax.Array]) -> jax.Array:
            mixer = nnx.merge(graph, state, copy=True)
            for name in ("query", "key", "value"):
                getattr(mixer, name).kernel = nnx.Param(a[name].reshape(c, h, c // h))
            mixer.out.kernel = nnx.Param(a["out"].reshape(h, c // h, c))
            return mixer(a["x"])

    def step(a: dict[str, jax.Array], dy: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        y, pull = jax.vjp(function, a)
        return y, pull(dy)[0]

    forward = jax.jit(function).lower(arrays).compile()
    both = jax.jit(step).lower(arrays, dy).compile()
    y, gradients = both(arrays, dy)
    return lambda: forward(arrays), lambda: both(arrays, dy), jax.device_get({"y": y} | gradients), 0


def _our_model(case: Case, x: jax.Array) -> tuple[Callable[[], Any], Callable[[], Any], dict[str, np.ndarray], int]:
    features, depth, heads = case.shape[-3:]
    sizes = {"features": features, "depth": depth, "num_heads": heads, "rngs": nnx.Rngs(0)}
    if case.kind == "language":
        model, labels = GPT2(VOCABULARY, max_length=x.shape[1], **sizes), jnp.roll(x, -1, 1)
    else:
        model = ViT((224, 224), 1000, patch_size=16, pooling="cls", **sizes)
        labels = jnp.arange(x.shape[0])
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    optimizer = optax.adamw(1e-3)

    def logits(params: Any, x: jax.Array) -> jax.Array:
        return nnx.merge(graph, params, rest, copy=True)(x)

    def step(params: Any, state: Any, x: jax.Array) -> tuple[Any, Any]:
        def loss(params: Any) -> jax.Array:
            return optax.softmax_cross_entropy_with_integer_labels(logits(params, x), labels).mean()

        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    forward = jax.jit(logits).lower(params, x).compile()
    holder = [(jax.tree.map(jnp.copy, params), optimizer.init(params))]
    train = jax.jit(step, donate_argnums=(0, 1)).lower(*holder[0], x).compile()

    def run() -> Any:
        holder[0] = train(*holder[0], x)
        return jax.tree.leaves(holder[0][0])[0]

    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    return lambda: forward(params, x), run, {}, count


class Peer:
    """A process in which PyTorch computes the same.

    Args:
      python: an interpreter with PyTorch, and timm for models; this one when None.
      threads: of PyTorch.

    Raises:
      ValueError: if it has no PyTorch.
    """

    def __init__(self, python: str | None, threads: int):
        file = Path(__file__).with_name("cpu_torch.py")
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        self._process = subprocess.Popen(
            [python or sys.executable, "-I", str(file), str(threads)],  # without this folder among its modules
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment | {"OMP_WAIT_POLICY": "PASSIVE"},
        )
        self.versions = self.ask({"what": "versions"})
        if "torch" not in self.versions:
            self.close()
            raise ValueError(
                f"{python or sys.executable} has no PyTorch, which is what is compared with; name an interpreter that "
                "has it, and timm for the models: --torch-python PATH"
            )

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """What the process answers; raises `RuntimeError` if it died."""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError(f"the process of PyTorch ended with {self._process.wait()} at {request['what']}")

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def run(cases: list[Case], peer: Peer, *, rounds: int, seconds: float) -> Iterator[Line]:
    """Times every case in rounds, ours and theirs in turn; the medians of the rounds.

    Args:
      cases: what to time.
      peer: the other process.
      rounds: of each.
      seconds: of timing in each round, of each of both.
    """
    for case in cases:
        with tempfile.TemporaryDirectory() as folder:
            inputs, outputs = Path(folder) / "in.npz", Path(folder) / "out.npz"
            np.savez(inputs, **arrays_of(case))
            request = dataclasses.asdict(case) | {"what": "build", "vocabulary": VOCABULARY}
            request |= {"inputs": str(inputs), "outputs": str(outputs)}
            built = peer.ask(request)
            if "reason" in built:
                yield Line(case.name, reason=built["reason"])
                continue
            forward, step, mine, count = ours(case)
            with np.load(outputs) as theirs:
                error = max((_error(mine[name], theirs[name]) for name in mine), default=0.0)
        if error > TOLERANCE or count != built["parameters"]:
            reason = f"not the same: relative error {error:.1e}, {count} and {built['parameters']} parameters"
            yield Line(case.name, reason=reason)
            continue
        times: dict[str, list[tuple[float, float]]] = {"forward": [], "step": []}
        for _ in range(rounds):
            for mode, call in (("forward", forward), ("step", step)):
                own = median_seconds(call, seconds)
                other = peer.ask({"what": mode, "seconds": seconds})["seconds"]
                times[mode].append((1e3 * own, 1e3 * other))
        middle = {
            mode: (statistics.median(own for own, _ in found), statistics.median(other for _, other in found))
            for mode, found in times.items()
        }
        yield Line(case.name, forward=middle["forward"], step=middle["step"])


def _error(mine: np.ndarray, theirs: np.ndarray) -> float:
    difference = np.sqrt(np.mean((mine.astype(np.float64) - theirs) ** 2))
    return float(difference / np.sqrt(np.mean(theirs.astype(np.float64) ** 2)))


def markdown(lines: list[Line]) -> str:
    """The table as a README has it: ratio, ours over theirs, and milliseconds."""

    def cell(times: tuple[float, float] | None) -> str:
        return "–" if times is None else f"{times[0] / times[1]:.2f} ({times[0]:.3g} / {times[1]:.3g})"

    rows = ["| case | forward | forward + backward, or step |", "| --- | --- | --- |"]
    for line in lines:
        cells = (line.reason, "") if line.reason else (cell(line.forward), cell(line.step))
        rows.append(f"| {line.case} | {cells[0]} | {cells[1]} |")
    return "\n".join(rows)
