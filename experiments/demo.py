"""What `make demo` runs: mixers compared on the digit images, and two language models on the standard library's text.

    make demo        (or: python -m experiments.demo [--out-dir runs/demo])

A vision transformer is trained on scikit-learn's digits once for each of `IMAGE_MIXERS`, and a byte-level language
model once for each of `TEXT_MIXERS`. Nothing is downloaded. Run again, or after Ctrl-C, it goes on from what is there.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from attnlab.cli.compare import print_table
from attnlab.cli.main import quiet
from attnlab.compare import report, runner
from attnlab.training import ConfigMismatch
from experiments import digits_vit, stdlib_language_model

IMAGE_MIXERS = (
    "softmax_attention",
    "agent_attention",
    "inline_attention",
    "neighborhood_attention",
    "biformer_bra",
    "lightning_attention_2",
    "hedgehog",
)
TEXT_MIXERS = ("softmax_attention", "lightning_attention_2")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs both comparisons, prints their tables, and writes one report of both; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m experiments.demo", description=__doc__.partition("\n")[0])
    parser.add_argument("--out-dir", type=Path, default=Path("runs/demo"), help="where everything is written")
    directory = parser.parse_args(argv).out_dir
    quiet()
    try:
        return demo(directory)
    except ConfigMismatch as error:
        print(f"{error}.\nThis is what an older demo left; remove {directory}, or pass --out-dir.", file=sys.stderr)
        return 2


def demo(directory: Path) -> int:
    """Trains and compares in `directory`; 0, or 1 if a mixer failed."""
    start = time.monotonic()
    print(f"Training {len(IMAGE_MIXERS)} vision transformers and {len(TEXT_MIXERS)} language models in {directory}.")
    print("Ctrl-C stops after the current step; the same command goes on from there.", flush=True)
    sections = [
        runner.compare(
            digits_vit.CONFIG,
            IMAGE_MIXERS,
            directory / "digits",
            title="Vision transformer on handwritten digits",
            options=runner.Options(lengths=(64, 256, 1024)),
        ),
        runner.compare(
            stdlib_language_model.CONFIG,
            TEXT_MIXERS,
            directory / "text",
            title="Byte-level language model on Python's standard library",
            options=runner.Options(lengths=(256, 512, 1024, 2048)),
        ),
    ]
    page = directory / "report.html"
    report.write_report(page, sections, title="attnlab demo: attention mechanisms compared")
    for section in sections:
        print()
        print_table(section.comparison)
    print(f"\nThe whole took {(time.monotonic() - start) / 60:.1f} minutes. Report: {page.resolve()}")
    return int(any(entry.status == "failed" for section in sections for entry in section.comparison.entries))


if __name__ == "__main__":
    sys.exit(main())
