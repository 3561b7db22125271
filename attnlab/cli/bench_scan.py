"""`attnlab bench selective_scan`: the selective scan against the machine's bound."""

import dataclasses
import json
import shlex
from pathlib import Path

import tyro

from attnlab.suggest import suggestion


@dataclasses.dataclass(frozen=True)
class BenchScanOptions:
    """Time the selective scan: every implementation that runs here, and a loop over tokens.

    A wrong result is not timed. Prints milliseconds, tokens per second, the share of this machine's bound, and the time
    over that of the first line; writes results.json to --out-dir.

    Attributes:
      cases: names of the op's cases; all that benchmarks time when None.
      dtypes: of what belongs to tokens: bfloat16, float16, float32; bfloat16, or float32 on a CPU, when None.
      modes: forward, gradient (forward and backward), decode (one token).
      peers: also time a loop over tokens.
      seconds: of timing for each line.
      out_dir: directory of the results; runs/bench_selective_scan when None.
    """

    cases: tuple[str, ...] | None = None
    dtypes: tuple[str, ...] | None = None
    modes: tuple[str, ...] = ("forward", "gradient", "decode")
    peers: bool = True
    seconds: float = 0.5
    out_dir: str | None = None


def run(op: str, arguments: list[str]) -> int:
    """Runs the command; see `attnlab bench selective_scan --help`.

    Raises:
      ValueError: for a case, dtype or mode that is unknown.
    """
    options = tyro.cli(BenchScanOptions, args=arguments, prog=f"attnlab bench {op}")
    from rich.console import Console
    from rich.progress import Progress

    from attnlab.bench import runner, scan
    from attnlab.bench.timing import measure_machine
    from pallas_kernels import dispatch

    known = scan.names()
    for name in options.cases or ():
        if name not in known:
            raise ValueError(f"no case of {op} is called {name!r}: {suggestion(name, known)}")
    dtypes = options.dtypes or (("float32",) if dispatch.current_platform() == "cpu" else ("bfloat16",))
    problems = [
        scan.Problem(name, dtype, mode) for mode in options.modes for name in options.cases or known for dtype in dtypes
    ]
    directory, command = Path(options.out_dir or f"runs/bench_{op}"), shlex.join(["attnlab", "bench", op, *arguments])
    console = Console(markup=False, emoji=False, highlight=False)
    if not console.is_terminal:
        console = Console(markup=False, emoji=False, highlight=False, width=120)
    results: list[scan.Result] = []
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("", total=len(problems))
        for problem in problems:
            progress.update(task, description=str(problem))
            found = list(scan.solve(problem, options.seconds, options.peers))
            results += found
            console.print(*scan.tables(found), sep="\n")
            progress.advance(task)
            rows = [
                dataclasses.asdict(result)
                | {"minimum_bytes": result.problem.minimum_bytes(), "operations": result.problem.operations()}
                | {"machine": dataclasses.asdict(measure_machine(result.problem.dtype, result.problem.minimum_bytes()))}
                for result in results
            ]
            runner.write(json.loads(json.dumps(rows)), directory / "results.json", command)
    print(f"written: {directory / 'results.json'}")
    return int(any(result.failed for result in results))
