"""Runs a few tests that stand for all, on versions that are not the default: `python -m tests.subset`.

Of each family of mixers and poolings one mechanism with its golden numbers, drawn by its name, and the kernels for
accelerators, interpreted, lowered and compiled.
"""

import pathlib
import subprocess
import sys
import zlib

from attnlab import registry
from attnlab.registry import Kind

ROOT = pathlib.Path(__file__).parents[1]
PLATFORMS = ("tpu", "mosaic_gpu", "triton")


def mechanisms() -> list[str]:
    """A slug of each family of mixers and poolings."""
    families: dict[str, set[str]] = {}
    for kind in (Kind.MIXER, Kind.POOLING):
        for variant in registry.variants(kind=kind):
            families.setdefault(variant.family, set()).add(variant.slug)
    drawn = (min(slugs, key=lambda slug: zlib.crc32(slug.encode())) for _, slugs in sorted(families.items()))
    return list(dict.fromkeys(drawn))


def kernels() -> list[str]:
    """The folders with tests of kernels, below the root."""
    found = (path for platform in PLATFORMS for path in (ROOT / "tests/pallas_kernels").glob(f"*/{platform}"))
    return sorted(path.relative_to(ROOT).as_posix() for path in found)


def main() -> int:
    """Runs them; the exit status is that of the first run that fails."""
    for arguments in (["tests/conformance", "tests/golden", "-k", " or ".join(mechanisms())], kernels()):
        command = [sys.executable, "-m", "pytest", "-n", "auto", "--dist", "worksteal"]
        command += ["-m", "not slow and not goldens", *arguments]
        print(" ".join(command), flush=True)
        if status := subprocess.run(command, cwd=ROOT).returncode:
            return status
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
