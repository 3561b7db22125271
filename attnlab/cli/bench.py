"""`attnlab bench`: kernels against their peers and against the machine; `attnlab bench mixer`: see `bench_mixer`."""

import dataclasses
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import tyro

from attnlab.bench.problem import OPS, Problem, Shape
from attnlab.suggest import suggestion

SPARSE = ("block_sparse_attention", "neighborhood_attention")
SCANS = ("selective_scan",)

EXPLANATION = f"""\
usage: attnlab bench OP [OPTIONS]
       attnlab bench mixer --mixers NAME NAME ... [OPTIONS]
       attnlab bench cpu [OPTIONS]

Times every implementation of an op that runs on this machine, and every peer that is installed: JAX's softmax
attention, PyTorch's, and those of flash-linear-attention (in a process of their own). A result that is wrong is not
timed. Prints milliseconds, bytes and operations per second, the share of this machine's bound, and the time over that
of the first line; writes results.json and drawings of tokens per second against length to --out-dir.
Ops of sparse attention are held against dense attention, and JAX's own under a mask: --help tells their options.
`mixer` times registered mixers instead, of any names, forward and with the gradient, in one run.
`cpu` times attention and whole models on the CPU against PyTorch and timm, in turns.

Ops: {", ".join((*OPS, *SPARSE, *SCANS))}
`attnlab bench OP --help` (or mixer, or cpu) prints every option."""

# The shapes of flash-linear-attention's own benchmark, and one layer for a CPU.
SHAPES = {
    "cpu": ("1x4096x8x64",),
    "accelerator": (
        "1x8192x96x128",
        "2x16384x16x128",
        "4x2048x16x128",
        "4x4096x64x128",
        "8x2048x32x256",
        "8x1024x8x64",
    ),
}
LENGTHS = {"cpu": tuple(2**i for i in range(10, 15)), "accelerator": tuple(2**i for i in range(10, 21, 2))}
HEADS, SIZE = {"cpu": 8, "accelerator": 16}, {"cpu": 64, "accelerator": 128}
DECODE_BATCH = 64


@dataclasses.dataclass(frozen=True)
class BenchOptions:
    """Benchmark an op.

    Attributes:
      shapes: BxNxHxD or BxNxHxDxE; those of flash-linear-attention's benchmark, or one layer on a CPU, when None.
      dtypes: of q, k and v: bfloat16, float16, float32; bfloat16, or float32 on a CPU, when None.
      decays: none, head (one constant for each head), token (B, N, H), channel (B, N, H, D).
      modes: forward, gradient (forward and backward), decode (one token; the batch is `decode_batch`).
      lengths: at which tokens per second are drawn, at one number of tokens; none for no drawing.
      decode_batch: sequences that are decoded at a time.
      peers: also time what is not attnlab's.
      torch_python: an interpreter with PyTorch and attnlab, if it is not this one.
      seconds: of timing for each line.
      out_dir: directory of the results; runs/bench_OP when None.
    """

    shapes: tuple[str, ...] | None = None
    dtypes: tuple[str, ...] | None = None
    decays: tuple[str, ...] = ("head", "token")
    modes: tuple[str, ...] = ("forward", "gradient", "decode")
    lengths: Annotated[tuple[int, ...] | None, tyro.conf.arg(help_behavior_hint="(default: up to 16k or 1M)")] = None
    decode_batch: int = DECODE_BATCH
    peers: bool = True
    torch_python: str | None = None
    seconds: float = 0.5
    out_dir: str | None = None


def run(arguments: list[str]) -> int:
    """Runs the command; see `attnlab bench --help`."""
    if not arguments or arguments[0].startswith("-"):
        asked = bool(arguments) and arguments[0] in ("-h", "--help")
        print(EXPLANATION, file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    op, *rest = arguments
    if op == "mixer":
        from attnlab.cli import bench_mixer

        return bench_mixer.run(rest)
    if op == "cpu":
        from attnlab.cli import bench_cpu

        return bench_cpu.run(rest)
    if op in SPARSE:
        from attnlab.cli import bench_sparse

        return bench_sparse.run(op, rest)
    if op in SCANS:
        from attnlab.cli import bench_scan

        return bench_scan.run(op, rest)
    if op not in OPS:
        raise ValueError(f"no benchmark is called {op!r}: {suggestion(op, [*OPS, *SPARSE, *SCANS, 'mixer', 'cpu'])}")
    options = tyro.cli(BenchOptions, args=rest, prog=f"attnlab bench {op}")
    # Peers in another process need memory too.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    from rich.console import Console
    from rich.progress import Progress

    from attnlab.bench import report, runner
    from pallas_kernels import dispatch

    kind = "cpu" if dispatch.current_platform() == "cpu" else "accelerator"
    fixed, series = problems_of(op, options, kind)
    settings = runner.Settings(options.seconds, options.peers, options.torch_python)
    directory = Path(options.out_dir or f"runs/bench_{op}")
    command = shlex.join(["attnlab", "bench", *arguments])
    problems = list(dict.fromkeys(fixed + series))
    console = Console(markup=False, emoji=False, highlight=False)
    if not console.is_terminal:
        console = Console(markup=False, emoji=False, highlight=False, width=120)
    results: list[runner.Result] = []
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("", total=len(problems))
        for found in runner.run(problems, settings, lambda text: progress.update(task, description=text)):
            results += found
            # At once, so that a run that is stopped has written what it measured.
            console.print(*report.tables(found), sep="\n")
            runner.save(results, directory / "results.json", command)
            progress.advance(task)
    if (counted := report.tpu_bytes(fixed)) is not None:
        console.print(counted)
    drawn = report.draw([result for result in results if result.problem in series], directory)
    print("\n".join(f"written: {path}" for path in (directory / "results.json", *drawn.values())))
    return int(any(result.failed for result in results))


def problems_of(op: str, options: BenchOptions, kind: str) -> tuple[list[Problem], list[Problem]]:
    """What to time, and what to time for the drawing; `kind` is "cpu" or "accelerator".

    Raises:
      ValueError: for a shape, dtype, decay or mode that is unknown.
    """
    shapes = [Shape.parse(text) for text in options.shapes or SHAPES[kind]]
    dtypes = options.dtypes or (("float32",) if kind == "cpu" else ("bfloat16",))
    fixed = []
    for mode in options.modes:
        for shape in shapes:
            if mode == "decode":
                shape = dataclasses.replace(shape, batch=options.decode_batch)
            fixed += [Problem(op, shape, decay, dtype, mode) for decay in options.decays for dtype in dtypes]
    lengths = LENGTHS[kind] if options.lengths is None else options.lengths
    if any(length < 1 for length in lengths):
        raise ValueError(f"--lengths must be positive, got {lengths}")
    tokens = max(lengths, default=0)
    series = [
        Problem(op, Shape(tokens // length, length, HEADS[kind], SIZE[kind], SIZE[kind]), decay, dtypes[0], mode)
        for mode in options.modes
        if mode != "decode"
        for decay in options.decays[:1]
        for length in lengths
    ]
    return list(dict.fromkeys(fixed)), series
