"""How long the schedules are that the TPU compiler makes of the kernels, found without a TPU.

    python -m tests.pallas_kernels.tpu_schedule linear_attention --chips v5p v6e --sizes 64 128 --decays head token

prints the bundles per token and head: of the forward pass that keeps states, of the backward pass with the gradients of
q, k, v (and beta), and of that which differentiates the decay, too. A core issues a bundle of instructions per cycle:
where the kernel waits for nothing else, that is its time in cycles. Time that copies take beyond the work is not in it.
Both sides of every branch count, so what runs in the first block of a sequence alone counts in all of them.

libtpu writes schedules where `LIBTPU_INIT_ARGS` tells it, and reads that once: every case has a process of its own.
"""

import argparse
import itertools
import math
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp

from pallas_kernels import delta_rule_attention, linear_attention
from pallas_kernels.tpu.chips import chip_of
from tests.pallas_kernels.tpu_compile import TOPOLOGIES, compile_for, device_kind, shape

LENGTH, HEADS = 8192, 8
BUNDLE = re.compile(r"\s*(?:0x[0-9a-f]+|0) *(LB)?[A-Z]* *: *>* *\{")
EXIT = re.compile(r"%(\w+) = scmp\.ge\.s32\.totalorder %(\w+), (\d+) /\* loop exit test")
STEP = re.compile(r"%(\w+) = sadd\.s32 (\d+), %")
BACK = re.compile(r"sbr\.rel \(!%(\w+)\)")
FILL = 2  # turns of the outermost loop that fill and drain its pipeline of copies, and compute nothing


def bundles_of(text: str) -> int:
    """Bundles that a kernel issues: those of its listing, each as often as the loops around it turn."""
    steps = {register: int(step) for register, step in STEP.findall(text)}
    exits = {predicate: math.ceil(int(bound) / steps[register]) for predicate, register, bound in EXIT.findall(text)}
    total = [0]  # of what is outside of loops, and of one turn of each loop that is open
    for line in text.splitlines():
        if not (found := BUNDLE.match(line)):
            continue
        if found[1]:
            total.append(0)
        total[-1] += 1
        for predicate in BACK.findall(line):
            if predicate in exits:
                body = total.pop()
                total[-1] += body * (exits[predicate] - FILL * (len(total) == 1))
    if len(total) > 1 or not exits:
        raise ValueError("the listing has a loop whose end was not found: libtpu writes another form than this reads")
    return total[0]


def compile_case(op: str, chip: str, size: int, decay: str, dtype: str, gradient: str) -> None:
    """Compiles the gradient of one call, whose schedules libtpu writes, and prints the kind of the device.

    `gradient` is "tokens", or "decay" for that of the decay, too.
    """
    tokens = shape((1, LENGTH, HEADS, size), dtype)
    arguments, constants = {"q": tokens, "k": tokens, "v": tokens}, {}
    if op == "delta_rule_attention":
        arguments["beta"] = shape((1, LENGTH, HEADS), jnp.float32)
    if decay != "none":
        sizes = {"head": (HEADS,), "token": (1, LENGTH, HEADS), "channel": (1, LENGTH, HEADS, size)}
        (arguments if gradient == "decay" else constants)["log_decay"] = shape(sizes[decay], jnp.float32)
    run = {"linear_attention": linear_attention, "delta_rule_attention": delta_rule_attention}[op]

    def gradients(arguments, constants):
        return jax.grad(lambda x: jnp.sum(run(**x, **constants, implementation="tpu").astype(jnp.float32)))(arguments)

    compile_for(chip, gradients, arguments, constants)
    print(device_kind(chip))


def measure(op: str, chip: str, size: int, decay: str, dtype: str, gradient: str) -> tuple[float, float]:
    """Bundles per token and head of the forward and of the backward pass; arguments are those of `compile_case`."""
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        case = [op, "--case", chip, str(size), decay, dtype, gradient]
        process = subprocess.run(
            [sys.executable, "-m", "tests.pallas_kernels.tpu_schedule", *case],
            env=os.environ | {"LIBTPU_INIT_ARGS": flags, "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_SKIP_MDS_QUERY": "1"},
            capture_output=True,
            text=True,
        )
        if process.returncode:
            raise RuntimeError(f"{' '.join(case)} does not compile:\n{process.stderr}")
        cores = chip_of(process.stdout.strip()).cores  # a schedule is that of one of them

        def per_token(kind):
            listings = Path(folder).glob(f"*{op}_{kind}*-final_bundles.txt")
            (listing,) = (path for path in listings if "schedule-analysis" not in path.name)
            return bundles_of(listing.read_text()) * cores / (LENGTH * HEADS)

        return per_token("keep"), per_token("backward")


def main() -> None:
    """Prints a line per case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("op", choices=("linear_attention", "delta_rule_attention"))
    parser.add_argument("--chips", nargs="+", choices=TOPOLOGIES, default=list(TOPOLOGIES))
    parser.add_argument("--sizes", nargs="+", type=int, default=[64, 128, 256], help="D = E")
    parser.add_argument("--decays", nargs="+", choices=("none", "head", "token", "channel"), default=["none"])
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--case", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        chip, size, *rest = options.case
        compile_case(options.op, chip, int(size), *rest)
        return
    print("chip   D    decay    forward  backward  with the decay's gradient   (bundles per token and head)")
    for chip, size, decay in itertools.product(options.chips, options.sizes, options.decays):
        forward, backward = measure(options.op, chip, size, decay, options.dtype, "tokens")
        line = f"{chip:6} {size:<4} {decay:8} {forward:7.2f} {backward:9.2f}"
        if decay != "none":
            line += f" {measure(options.op, chip, size, decay, options.dtype, 'decay')[1]:26.2f}"
        print(line, flush=True)


if __name__ == "__main__":
    main()
