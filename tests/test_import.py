"""Importing the packages is light: heavy and optional dependencies wait until they are needed."""

import subprocess
import sys

import pytest

HEAVY = ("torch", "triton", "jax_triton", "orbax.checkpoint", "grain", "sklearn", "matplotlib", "PIL", "tensorboardX")


@pytest.mark.parametrize(
    ("package", "base", "foreign"),
    [("attnlab", "jax, flax.nnx", HEAVY), ("pallas_kernels", "jax", (*HEAVY, "flax", "attnlab", "optax"))],
)
def test_import_adds_nothing_heavy(package, base, foreign):
    program = (
        f"import sys, {base}; before = set(sys.modules); import {package}; "
        f"print(*[name for name in {foreign!r} if name in set(sys.modules) - before])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_asking_the_registry_loads_the_mechanisms_not_before():
    program = (
        "import sys, attnlab; before = any(name.startswith('attnlab.attention') for name in sys.modules); "
        "names = attnlab.names(); print(before, 'softmax_attention' in names)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]
