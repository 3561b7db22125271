"""`attnlab bench cpu`: on a CPU against what a user would pick instead."""

import dataclasses
import json
import os
import platform
import shlex
from pathlib import Path

import tyro


@dataclasses.dataclass(frozen=True)
class BenchCpuOptions:
    """Time attention, a depthwise convolution and whole models on the CPU against PyTorch and timm.

    Prints a table of ratios, ours over theirs, with milliseconds; writes table.md and results.json to --out-dir.
    A case whose results or sizes differ is not timed.

    Attributes:
      cases: words, of which a case's name must hold one; all cases when None.
      threads: cores and threads of both; all that there are when None.
      rounds: in which ours and theirs take turns.
      seconds: of timing in each round, of each of both.
      torch_python: an interpreter with PyTorch, and timm for the models; this one when None.
      out_dir: directory of the results.
    """

    cases: tuple[str, ...] | None = None
    threads: int | None = None
    rounds: int = 5
    seconds: float = 0.5
    torch_python: str | None = None
    out_dir: str = "runs/bench_cpu"


def run(arguments: list[str]) -> int:
    """Runs the command; see `attnlab bench cpu --help`."""
    options = tyro.cli(BenchCpuOptions, args=arguments, prog="attnlab bench cpu")
    for name in ("threads", "rounds"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    here = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    threads = len(here) if options.threads is None else options.threads
    if threads > len(here):
        raise ValueError(f"threads must be at most the {len(here)} cores that there are, got {threads}")
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, here[:threads])  # before XLA makes its threads
    os.environ["JAX_PLATFORMS"] = "cpu"
    from attnlab.bench import cpu

    cases = [case for case in cpu.CASES if options.cases is None or any(word in case.name for word in options.cases)]
    if not cases:
        raise ValueError(f"cases: no name holds {options.cases}; they are: {'; '.join(c.name for c in cpu.CASES)}")
    import jax

    peer = cpu.Peer(options.torch_python, threads)
    versions = {"jax": jax.__version__, **peer.versions, "python": platform.python_version()}
    lines = []
    try:
        for line in cpu.run(cases, peer, rounds=options.rounds, seconds=options.seconds):
            lines.append(line)
            print(cpu.markdown([line]).splitlines()[-1], flush=True)
    finally:
        peer.close()
    directory = Path(options.out_dir)
    directory.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["attnlab", "bench", "cpu", *arguments])
    facts = {"command": command, "threads": threads, "versions": versions}
    found = [dataclasses.asdict(line) for line in lines]
    (directory / "results.json").write_text(json.dumps(facts | {"lines": found}, indent=1) + "\n")
    (directory / "table.md").write_text(cpu.markdown(lines) + "\n")
    words = ", ".join(f"{name} {version}" for name, version in versions.items())
    print(f"{threads} threads each, {words}\nwritten: {directory / 'table.md'}, {directory / 'results.json'}")
    return int(any(line.reason.startswith("not the same") for line in lines))
