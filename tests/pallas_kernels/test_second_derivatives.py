"""The gradient of a gradient, by every floating argument of every op, is that of the reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.nn.softmax import softmax_attention
from pallas_kernels import block_sparse_attention, delta_rule_attention, linear_attention, selective_scan
from pallas_kernels.masks import Causal
from pallas_kernels.neighborhood_attention import neighborhood_attention
from tests.accuracy import relative_rms
from tests.pallas_kernels.quick import quick

TOKENS = (1, 21, 2, 3)  # more than one chunk of 16, and odd
DECAYS = {"head": (2,), "token": TOKENS[:3], "channel": TOKENS}


def linear(decay):
    shapes = {**dict.fromkeys(("q", "k", "v"), TOKENS), "log_decay": DECAYS[decay], "scale": ()}
    return shapes | {
        "initial_state": (1, 2, 3, 3)
    }, lambda name: {"implementation": name} | ({"chunk_size": 16} if name == "xla" else {})


def delta(decay):
    shapes, options = linear(decay)
    return shapes | {"beta": TOKENS[:3]}, options


def neighborhood(_):
    shapes = dict.fromkeys(("q", "k", "v"), (1, 9, 2, 3)) | {"bias": (2, 5)}
    more = dict.fromkeys(("additional_keys", "additional_values"), (1, 2, 2, 3))
    return shapes | more, lambda name: {"implementation": name, "kernel_size": 3}


def block_sparse(_):
    shapes = dict.fromkeys(("q", "k", "v"), TOKENS) | {"bias": (1, 2, 21, 21), "scale": ()}
    return shapes, lambda name: {"implementation": name, "mask": Causal()}


def softmax(_):
    shapes = dict.fromkeys(("q", "k", "v"), TOKENS) | {"bias": (1, 2, 21, 21), "scale": ()}
    return shapes, lambda name: {"block_size": 8 if name == "xla" else None, "causal": True}


def scan(_):
    shapes = dict.fromkeys(("x", "delta", "gate"), (1, 21, 4)) | dict.fromkeys(("b", "c"), (1, 21, 2, 3))
    return shapes | {"a": (4, 3), "skip": (4,), "delta_bias": (4,)}, lambda name: {
        "implementation": name, "softplus": True, "chunk_size": 8 if name == "xla" else None
    }  # fmt: skip


CASES = {
    "linear-head": (linear_attention, linear),
    "linear-token": (linear_attention, linear),
    "linear-channel": (linear_attention, linear),
    "delta_rule-head": (delta_rule_attention, delta),
    "delta_rule-token": (delta_rule_attention, delta),
    "neighborhood": (neighborhood_attention, neighborhood),
    "block_sparse": (block_sparse_attention, block_sparse),
    "softmax_in_blocks": (softmax_attention, softmax),
    "selective_scan": (selective_scan, scan),
}


@pytest.mark.parametrize(
    "name",
    quick(list(CASES), ("linear-head", "delta_rule-head", "neighborhood", "block_sparse", "softmax_in_blocks"), str),
)
def test_second_derivatives(name):
    op, form = CASES[name]
    shapes, options = form(name.partition("-")[2])
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        arguments, direction = ({n: jnp.asarray(0.3 * rng.normal(size=s)) for n, s in shapes.items()} for _ in range(2))
        if "log_decay" in arguments:
            arguments["log_decay"] = -jnp.abs(arguments["log_decay"])
        if "a" in arguments:
            arguments["a"] = -jnp.abs(arguments["a"])

        def second(implementation):
            def loss(a):
                return (op(**a, **options(implementation)) ** 2).sum()

            def along(a):
                return sum(jnp.vdot(direction[n], g) for n, g in jax.grad(loss)(a).items())

            return jax.jit(jax.grad(along))(arguments)

        got, want = second("xla"), second("reference")
        for argument in shapes:
            assert relative_rms(got[argument], want[argument]) < 1e-9, argument
