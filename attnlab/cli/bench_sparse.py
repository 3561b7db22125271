"""`attnlab bench block_sparse_attention` and `neighborhood_attention`: sparse attention against dense attention."""

import contextlib
import dataclasses
import json
import os
import shlex
from pathlib import Path

import tyro

from attnlab.suggest import suggestion


@dataclasses.dataclass(frozen=True)
class BenchSparseOptions:
    """Time sparse attention: every implementation that runs here, dense attention, and JAX's own under the mask.

    With --torch-python also PyTorch's masked attention and its FlexAttention, on a CPU, in turns with `xla`.
    A wrong result is not timed. Writes results.json and drawings of the times to --out-dir.

    Attributes:
      cases: names of the op's cases; all that benchmarks time when None.
      dtypes: of q, k and v: bfloat16, float16, float32; bfloat16, or float32 on a CPU, when None.
      modes: forward, gradient (forward and backward).
      peers: also time what is not attnlab's.
      torch_python: an interpreter with PyTorch, to time it too.
      seconds: of timing for each line.
      out_dir: directory of the results; runs/bench_OP when None.
    """

    cases: tuple[str, ...] | None = None
    dtypes: tuple[str, ...] | None = None
    modes: tuple[str, ...] = ("forward", "gradient")
    peers: bool = True
    torch_python: str | None = None
    seconds: float = 0.5
    out_dir: str | None = None


def run(op: str, arguments: list[str]) -> int:
    """Runs the command; see `attnlab bench OP --help`.

    Raises:
      ValueError: for a case, dtype or mode that is unknown.
    """
    options = tyro.cli(BenchSparseOptions, args=arguments, prog=f"attnlab bench {op}")
    from rich.console import Console
    from rich.progress import Progress

    from attnlab.bench import runner, sparse
    from attnlab.bench.cpu import Peer
    from attnlab.bench.timing import measure_machine
    from pallas_kernels import dispatch

    known = sparse.names(op)
    for name in options.cases or ():
        if name not in known:
            raise ValueError(f"no case of {op} is called {name!r}: {suggestion(name, known)}")
    dtypes = options.dtypes or (("float32",) if dispatch.current_platform() == "cpu" else ("bfloat16",))
    problems = [
        sparse.Problem(op, name, dtype, mode)
        for mode in options.modes
        for name in options.cases or known
        for dtype in dtypes
    ]
    directory, command = Path(options.out_dir or f"runs/bench_{op}"), shlex.join(["attnlab", "bench", op, *arguments])
    console = Console(markup=False, emoji=False, highlight=False)
    if not console.is_terminal:
        console = Console(markup=False, emoji=False, highlight=False, width=120)
    results: list[sparse.Result] = []
    torch = None
    with contextlib.ExitStack() as stack, Progress(console=console, transient=True) as progress:
        if options.torch_python is not None:
            torch = Peer(options.torch_python, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1)
            stack.callback(torch.close)
        task = progress.add_task("", total=len(problems))
        for problem in problems:
            progress.update(task, description=str(problem))
            found = list(sparse.solve(problem, options.seconds, options.peers, torch))
            results += found
            console.print(*sparse.tables(found), sep="\n")
            progress.advance(task)
            rows = [
                dataclasses.asdict(result)
                | {"share": result.problem.share, "operations": result.problem.operations()}
                | {"machine": dataclasses.asdict(measure_machine(result.problem.dtype, 2**20))}
                for result in results
            ]
            runner.write(json.loads(json.dumps(rows)), directory / "results.json", command)
    drawn = sparse.draw(results, directory)
    print("\n".join(f"written: {path}" for path in (directory / "results.json", *drawn.values())))
    return int(any(result.failed for result in results))
