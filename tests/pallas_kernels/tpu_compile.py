"""Ahead-of-time compilation by the real TPU compiler (libtpu), on a machine without a TPU.

    compiled = compile_for("v5e", lambda q, k: kernel(q, k), shape((1, 256, 4, 64)), shape((1, 256, 4, 64)))

`conftest.py` sets the environment variables that libtpu needs before it is loaded.
"""

import functools
import importlib.util
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import dispatch

# The smallest slice of each generation that kernels are compiled for.
TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "TPU7x": "tpu7x:2x2x1"}

needs_tpu_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="the TPU compiler, package libtpu, is not installed"
)


def shape(sizes: tuple[int, ...], dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
    """An argument that has a shape and a dtype, but no values."""
    return jax.ShapeDtypeStruct(sizes, jnp.dtype(dtype))


@functools.cache
def devices(topology: str) -> tuple[jax.Device, ...]:
    """Devices of a key of `TOPOLOGIES`, or of a slice as libtpu names it, such as "v5p:4x4x4"."""
    name = TOPOLOGIES.get(topology, topology)
    return tuple(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)


def device_kind(topology: str) -> str:
    """Device kind of a topology as JAX names it, such as "TPU v5 lite"."""
    return devices(topology)[0].device_kind


def mesh(topology: str, **axes: int) -> jax.sharding.Mesh:
    """A mesh with these axes over the first devices of a topology."""
    chosen = devices(topology)[: math.prod(axes.values())]
    return jax.make_mesh(tuple(axes.values()), tuple(axes), (jax.sharding.AxisType.Auto,) * len(axes), devices=chosen)


def compile_for(
    topology: str,
    f: Callable[..., Any],
    *arguments: Any,
    mesh: jax.sharding.Mesh | None = None,
    donate_argnums: tuple[int, ...] = (),
):
    """Compiles `f` for a TPU as `jax.jit` would there, with `dispatch` choosing implementations for it.

    Args:
      topology: see `devices`.
      f: a function of arrays, or of pytrees of them.
      *arguments: pytrees of `shape(...)` or of arrays, of which only shapes and dtypes are read. Those without a
        sharding stand on the first device, or whole on every device of `mesh`.
      mesh: a mesh over devices of the topology, when there is one.
      donate_argnums: as in `jax.jit`.

    Returns:
      The compiled executable: `as_text()`, `memory_analysis()`, `cost_analysis()`.

    Raises:
      Exception: whatever the compiler says; a kernel that does not fit VMEM ends here.
    """
    whole = SingleDeviceSharding(devices(topology)[0]) if mesh is None else NamedSharding(mesh, P())

    def place(x):
        sharding = getattr(x, "sharding", None)
        on_topology = isinstance(sharding, NamedSharding)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding if on_topology else whole)

    placed = jax.tree.map(place, arguments)
    # A function of its own: JAX caches traces by function, and one that was chosen for another platform must not serve.
    fresh = jax.jit(lambda *arguments: f(*arguments), donate_argnums=donate_argnums)
    with dispatch.target("tpu", device_kind(topology), qualified_only=False):
        return fresh.trace(*placed).lower(lowering_platforms=("tpu",)).compile()


def kernels_of(compiled: Any) -> int:
    """How many Pallas kernels an executable calls."""
    return compiled.as_text().count('custom_call_target="tpu_custom_call"')
