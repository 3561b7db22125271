"""Peers that need PyTorch, gated and timed in a process of their own, so that attnlab never imports it.

The parent sends one request a line, as JSON, and gets one answer a line. Run by hand it does nothing of use.
"""

import contextlib
import dataclasses
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from attnlab.bench.gate import PEER_TOLERANCE, Gate
from attnlab.bench.problem import Problem, Shape
from attnlab.bench.timing import median_seconds

CHUNK = 64  # on two cores faster than 128
MARK = "@answer "  # libraries print to the same stream


class TorchPeers:
    """A child process that times PyTorch's contenders.

    Args:
      python: interpreter that has PyTorch and attnlab; that of this process when None.
    """

    def __init__(self, python: str | None = None):
        self._command = [python or sys.executable, "-m", "attnlab.bench.torch_peers"]

    def __enter__(self) -> "TorchPeers":
        # The child's own JAX draws nothing and must not take the accelerator's memory.
        environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
        with contextlib.ExitStack() as stack:
            self._log = stack.enter_context(tempfile.TemporaryFile("w+"))
            self._child = stack.enter_context(
                subprocess.Popen(
                    self._command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=self._log,
                    text=True,
                    env=environment,
                )
            )
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: Any) -> None:
        with contextlib.suppress(BrokenPipeError):  # of a child that is dead
            self._child.stdin.close()  # on which a living one ends
        self._stack.close()

    def measure(self, problem: Problem, gates: dict[str, Gate], budget: float) -> dict[str, dict[str, Any]]:
        """Answers by contender's name: {"seconds", "error"}, or {"reason"} why there is none.

        Args:
          problem: what is timed.
          gates: what must be reproduced: "linear", and "softmax" where there is one.
          budget: seconds of timing for each contender.

        Raises:
          RuntimeError: if the child died.
        """
        with tempfile.TemporaryDirectory() as folder:
            paths = {name: str(Path(folder) / f"{name}.npz") for name in gates}
            for name, gate in gates.items():
                gate.save(Path(paths[name]))
            request = {"problem": dataclasses.asdict(problem), "gates": paths, "budget": budget}
            try:
                self._child.stdin.write(json.dumps(request) + "\n")
                self._child.stdin.flush()
                for line in self._child.stdout:
                    if line.startswith(MARK):
                        return json.loads(line.removeprefix(MARK))
            except BrokenPipeError:
                pass
            self._log.seek(0)
            raise RuntimeError(f"the process of the PyTorch peers died:\n{self._log.read()[-2000:]}")


# ---- the child


def main() -> None:
    """Answers requests until the parent closes the pipe."""
    if importlib.util.find_spec("torch") is not None:
        import torch

        torch.set_flush_denormal(True)  # as XLA does: products of strong decays are that small
    for line in sys.stdin:
        request = json.loads(line)
        settings = request["problem"]
        problem = Problem(**{**settings, "shape": Shape(**settings["shape"])})
        gates = {name: Gate.load(Path(path)) for name, path in request["gates"].items()}
        print(MARK + json.dumps(dict(answers(problem, gates, request["budget"]))), flush=True)


def answers(problem: Problem, gates: dict[str, Gate], budget: float) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, answer) of each contender."""
    if importlib.util.find_spec("torch") is None:
        yield "torch", {"reason": "PyTorch is not installed"}
        return
    for name, kind, build in _contenders(problem):
        if kind not in gates:
            continue
        try:
            yield name, _measure(problem, build, gates[kind], budget)
        except Exception as error:  # a peer's failure is a line of the table, whatever it was
            text = str(error).strip().splitlines() or [""]
            yield name, {"reason": f"{type(error).__name__}: {text[0][:200]}"}


def _contenders(problem: Problem) -> Iterator[tuple[str, str, Callable[..., Any]]]:
    """(name, kind of gate, function of the arguments by name) of every contender for a problem."""
    import torch

    constant = problem.decay == "head"
    if problem.mode != "decode":
        if problem.op == "linear_attention" and problem.decay != "channel":
            yield "torch chunked loop", "linear", _chunked

        def softmax(q: Any, k: Any, v: Any, **_: Any) -> Any:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0).transpose(1, 2)

        yield "torch softmax attention (SDPA)", "softmax", softmax
    if not torch.cuda.is_available() or importlib.util.find_spec("fla") is None:
        return

    def fla(module: str, name: str, **fixed: Any) -> Callable[..., Any]:
        function = getattr(importlib.import_module(f"fla.ops.{module}"), name)

        def run(q: Any, k: Any, v: Any, log_decay: Any = None, state: Any = None, **rest: Any) -> Any:
            options = {**fixed, **rest, "scale": 1.0}
            if log_decay is not None and "layer_idx" not in fixed:
                options["g_gamma" if constant else "g"] = log_decay
            if state is None:
                return function(q, k, v, **options)[0]
            return function(q, k, v, **options, initial_state=state, output_final_state=True)

        return run

    def gated_delta(module: str, name: str) -> Callable[..., Any]:
        run = fla(module, name)

        def expand(q: Any, k: Any, v: Any, log_decay: Any, **rest: Any) -> Any:
            return run(q, k, v, g=log_decay.expand(*q.shape[:3]) if constant else log_decay, **rest)

        return expand

    delta, decode = problem.op == "delta_rule_attention", problem.mode == "decode"
    way = "fused_recurrent" if decode else "chunk"
    if delta and problem.decay == "none":
        yield f"fla {way}_delta_rule", "linear", fla("delta_rule", f"{way}_delta_rule")
    elif delta:
        yield f"fla {way}_gated_delta_rule", "linear", gated_delta("gated_delta_rule", f"{way}_gated_delta_rule")
    elif problem.decay == "channel":
        run = fla("gla", f"{way}_gla")
        key = "gk" if decode else "g"
        yield f"fla {way}_gla", "linear", lambda log_decay, **rest: run(**rest, **{key: log_decay})
    elif problem.decay == "none":
        yield f"fla {way}_linear_attn", "linear", fla("linear_attn", f"{way}_linear_attn", normalize=False)
    else:
        yield f"fla {way}_simple_gla", "linear", fla("simple_gla", f"{way}_simple_gla")
        if constant:
            # Layer 0 decays as the benchmark's heads do.
            lightning = fla("lightning_attn", f"{way}_lightning_attn", layer_idx=0, num_layers=1)
            yield f"fla {way}_lightning_attn", "linear", lightning


def _chunked(q: Any, k: Any, v: Any, log_decay: Any = None) -> Any:
    """Chunked causal linear attention as a loop of PyTorch operations, the usual form of authors' code."""
    import torch

    dtype, length = q.dtype, q.shape[1]
    q, k, v = (x.transpose(1, 2).float() for x in (q, k, v))
    state = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1])
    if log_decay is None:
        log_decay = q.new_zeros(q.shape[1])
    constant = log_decay.ndim == 1
    g = log_decay[None, :, None].expand(1, -1, length) if constant else log_decay.transpose(1, 2)
    outputs, total = [], None
    # Not a slice in every step: the gradient of each would be an array of all tokens.
    for a, b, c, d in zip(*(x.split(CHUNK, dim=2) for x in (q, k, v, g)), strict=True):
        if not constant or total is None or d.shape[-1] < CHUNK:  # the same in every whole chunk
            total = d.cumsum(-1)
            weights = (total[..., :, None] - total[..., None, :]).clamp(max=0).exp().tril()
            since_start, until_end = total.exp()[..., None], (total[..., -1:] - total).exp()[..., None]
        outputs.append((a @ b.transpose(-1, -2) * weights) @ c + since_start * (a @ state))
        state = since_start[..., -1:, :] * state + (until_end * b).transpose(-1, -2) @ c
    return torch.cat(outputs, dim=2).transpose(1, 2).to(dtype)


def _measure(problem: Problem, function: Callable[..., Any], gate: Gate, budget: float) -> dict[str, Any]:
    """Gates a contender, then times it."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    tensors = {}
    for name, (size, dtype) in problem.inputs().items():
        if name not in gate.inputs:
            continue
        tensor = torch.randn(size, generator=generator, device=device)
        tensor = tensor * problem.shape.key_size**-0.5 if name in "qk" else tensor
        if name == "beta":
            tensor = tensor.sigmoid()
        elif name == "log_decay":
            tensor = -tensor.abs()
            if problem.decay == "head":
                tensor = -8 / problem.shape.heads * torch.arange(problem.shape.heads, device=device)
        _overwrite(tensor, gate.inputs[name], name, problem.decay, gate)
        tensors[name] = tensor.to(getattr(torch, dtype.name))
    gradient = problem.mode == "gradient"
    wanted = {name: tensors[name].requires_grad_() for name in problem.differentiated if gradient and name in tensors}
    if gradient:
        dense = torch.randn(problem.output_shape, generator=generator, device=device)
        masked = torch.zeros_like(dense)
        _overwrite(masked, gate.inputs["dy"], "dy", problem.decay, gate)
        dense, masked = dense.to(tensors["v"].dtype), masked.to(tensors["v"].dtype)

    def run(dy: Any = None) -> Any:
        y = function(**tensors)
        return (y, *torch.autograd.grad(y, list(wanted.values()), dy)) if gradient else y

    result = run(masked) if gradient else run()
    names = {"gradient": ("y", *wanted), "decode": ("y", "state"), "forward": ("y",)}[problem.mode]
    got = dict(zip(names, result if isinstance(result, tuple) else (result,), strict=True))
    # Others take the gradient of a decay as a difference of sums: with strong decays it is no measure of the rest.
    error = gate.error({name: _rows(tensor, name, gate) for name, tensor in got.items()}, but=("log_decay",))
    if error > PEER_TOLERANCE:
        return {"reason": f"its relative error is {error:.1e}, too large to be timed", "error": error}

    def wait(_: Any) -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    call = (lambda: run(dense)) if gradient else run
    with torch.set_grad_enabled(gradient):
        seconds = median_seconds(call, budget, wait)
    return {"seconds": seconds, "error": error}


def _overwrite(tensor: Any, rows: np.ndarray, name: str, decay: str, gate: Gate) -> None:
    """Puts the gate's numbers into a tensor; a decay per head is the same everywhere already."""
    import torch

    if name == "log_decay" and decay == "head":
        return
    for (b, h), row in zip(gate.rows, rows, strict=True):
        row = torch.from_numpy(row).to(tensor)
        if name == "state":
            tensor[b, h : h + 1] = row
        else:
            tensor[b, : gate.prefix, h : h + 1] = row


def _rows(tensor: Any, name: str, gate: Gate) -> np.ndarray:
    tensor = tensor.detach().double()
    if name == "state":
        return np.stack([tensor[b, h : h + 1].cpu().numpy() for b, h in gate.rows])
    return np.stack([tensor[b, : gate.prefix, h : h + 1].cpu().numpy() for b, h in gate.rows])


if __name__ == "__main__":
    main()
