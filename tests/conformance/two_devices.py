"""What a mixer's compiled programs send between two devices when its heads are cut over them.

The number of CPU devices is fixed when JAX starts, so that this is done in a child process that has two. For a look:

    JAX_PLATFORMS=cpu python -m tests.conformance.two_devices tnl window_attention
"""

import atexit
import concurrent.futures
import functools
import multiprocessing
import os
import re
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

import attnlab
from attnlab.contract import constructor_parameters
from attnlab.training.sharding import MeshConfig, mesh_from, shardings, with_shardings
from tests.conformance.subjects import Subject, named, subjects_of

HEADS = 4  # enough that a mixer with half as many has one for each device
COLLECTIVE = re.compile(
    r"= .*? (all-gather|all-reduce|all-to-all|collective-permute|collective-broadcast|reduce-scatter)(?:-start)?\("
)


class Traffic(NamedTuple):
    """Kinds of collectives in a mixer's compiled programs under tensor parallelism.

    Attributes:
      cut: paths of the parameters that are cut over the devices.
      gradient: of the program of the call and its gradient with respect to parameters and arguments.
      call: of the call alone.
    """

    cut: frozenset[str]
    gradient: frozenset[str]
    call: frozenset[str]


def traffic(subject: Subject) -> Traffic:
    """`Traffic` of the subject over two devices, measured in the child process, which the first call starts."""
    return _child().submit(_measure, subject).result()


@functools.cache
def _child() -> concurrent.futures.ProcessPoolExecutor:
    executor = concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=2".strip()
    try:
        # A child inherits the environment as it is when its first task comes.
        executor.submit(os.getpid).result()
    finally:
        os.environ["XLA_FLAGS"] = flags
    atexit.register(executor.shutdown)
    return executor


def has_heads(subject: Subject) -> bool:
    """Whether the mixer has heads, which are what is cut over devices."""
    return "num_heads" in constructor_parameters(attnlab.get(subject.name).cls)


def _measure(subject: Subject) -> Traffic:
    mesh = mesh_from(MeshConfig(data=1, tensor=2))
    graph, state = nnx.split(subject.abstract(**({"num_heads": HEADS} if has_heads(subject) else {})))
    where = shardings(state, mesh)
    whole = NamedSharding(mesh, PartitionSpec())
    arguments = tuple(
        jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=whole) for a in subject.arguments(subject.tokens())
    )

    def call(state, arguments):
        return nnx.merge(graph, state)(*arguments)

    def gradient(state, arguments):
        params, rest = nnx.split_state(state, nnx.Param, ...)

        def loss(params, arguments):
            return jnp.sum(jnp.sin(call(nnx.merge_state(params, rest), arguments)))

        return jax.value_and_grad(loss, (0, 1))(params, arguments)

    def kinds(program, out):
        lowered = jax.jit(program, out_shardings=out).lower(with_shardings(state, where), arguments)
        return frozenset(COLLECTIVE.findall(lowered.compile().as_text()))

    of_params = nnx.split_state(where, nnx.Param, ...)[0]
    cut = {path for path, sharding in named(of_params).items() if "tensor" in sharding.spec}
    return Traffic(frozenset(cut), kinds(gradient, (whole, (of_params, whole))), kinds(call, whole))


def main() -> None:
    """Prints the traffic of the mixers that are named, in all their patterns and layouts."""
    for name in sys.argv[1:] or attnlab.names(kind=attnlab.Kind.MIXER):
        for subject in subjects_of(name):
            found = traffic(subject)
            call, gradient = (", ".join(sorted(kinds)) for kinds in (found.call, found.gradient))
            print(f"{subject!s:60} call: {call}; gradient: {gradient}")


if __name__ == "__main__":
    main()
