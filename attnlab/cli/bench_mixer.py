"""`attnlab bench mixer`: registered mixers against each other."""

import dataclasses
import shlex
from pathlib import Path
from typing import Annotated, Any

import tyro

from attnlab.experiment import Options

SHAPES = {"cpu": "1x1024x256", "accelerator": "4x8192x1024"}
LENGTHS = {"cpu": tuple(2**i for i in range(8, 13)), "accelerator": tuple(2**i for i in range(10, 17, 2))}
DTYPE = {"cpu": "float32", "accelerator": "bfloat16"}
HEAD_SIZE = 64


@dataclasses.dataclass(frozen=True)
class BenchMixerOptions:
    """Time mixers, forward and with the gradient of tokens and parameters.

    A mixer that does not compute what it computes in float64 is not timed. Writes results.json and drawings of the
    time per token against length to --out-dir.

    Attributes:
      mixers: names of registered mixers.
      shape: of the tokens: BxNxC of a sequence, BxHxWxC of images, BxTxHxWxC of videos; 1x1024x256 on a CPU when None.
      heads: of each mixer that has heads; one for 64 channels when None.
      causal: whether token i sees tokens up to i only; of a sequence, if all mixers have such a form, when None.
      dtype: of tokens and computation: bfloat16, float16, float32; bfloat16, or float32 on a CPU, when None.
      lengths: numbers of tokens for the drawing, with the batch that keeps their sum; none for no drawing.
      options: of constructors by mixer name, over their defaults, such as '{"hedgehog": {"feature_dim": 32}}'.
      seconds: of timing for each mixer, shape and mode.
      out_dir: directory of the results.
    """

    mixers: tuple[str, ...]
    shape: str | None = None
    heads: int | None = None
    causal: bool | None = None
    dtype: str | None = None
    lengths: Annotated[tuple[int, ...] | None, tyro.conf.arg(help_behavior_hint="(default: up to 4k or 64k)")] = None
    options: Options = dataclasses.field(default_factory=dict)
    seconds: float = 0.5
    out_dir: str = "runs/bench_mixer"


def run(arguments: list[str]) -> int:
    """Runs the command; see `attnlab bench mixer --help`."""
    from attnlab.bench import mixer_report, mixers
    from pallas_kernels import dispatch

    options = tyro.cli(BenchMixerOptions, args=arguments, prog="attnlab bench mixer")
    from rich.console import Console
    from rich.progress import Progress

    mixers.check(options.mixers, options.options)
    kind = "cpu" if dispatch.current_platform() == "cpu" else "accelerator"
    problems, series = problems_of(options, kind)
    directory, command = Path(options.out_dir), shlex.join(["attnlab", "bench", "mixer", *arguments])
    console = Console(markup=False, emoji=False, highlight=False)
    if not console.is_terminal:
        console = Console(markup=False, emoji=False, highlight=False, width=120)
    results: list[mixers.MixerResult] = []
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("", total=len(problems))
        note = lambda text: progress.update(task, description=text)  # noqa: E731
        for found in mixers.run(problems, options.mixers, options.options, options.seconds, note):
            results += found
            # At once, so that a run that is stopped has written what it measured.
            console.print(*mixer_report.table(found), sep="\n")
            mixer_report.save(results, directory / "results.json", command)
            progress.advance(task)
    drawn = mixer_report.draw([result for result in results if result.problem in series], directory)
    print("\n".join(f"written: {path}" for path in (directory / "results.json", *drawn.values())))
    return int(any(result.failed for result in results))


def problems_of(options: BenchMixerOptions, kind: str) -> tuple[list[Any], list[Any]]:
    """What to time, each once, and what of it is drawn; `kind` is "cpu" or "accelerator".

    Raises:
      ValueError: for a shape, heads, dtype or lengths that there are not.
    """
    from attnlab.bench.mixers import MixerProblem, causal_forms

    shape = options.shape or SHAPES[kind]
    features = int(shape.rpartition("x")[2]) if shape.rpartition("x")[2].isdigit() else 0
    heads = max(1, features // HEAD_SIZE) if options.heads is None else options.heads
    problem = MixerProblem.parse(shape, heads=heads, dtype=options.dtype or DTYPE[kind])
    causal = options.causal
    if causal is None:
        causal = len(problem.grid) == 1 and causal_forms(options.mixers)
    problem = dataclasses.replace(problem, causal=causal)
    lengths = LENGTHS[kind] if options.lengths is None else options.lengths
    if any(length < 1 for length in lengths):
        raise ValueError(f"--lengths must be positive, got {lengths}")
    series = [problem.with_tokens(length, max(lengths) // length) for length in lengths]
    return list(dict.fromkeys([problem, *series])), series
