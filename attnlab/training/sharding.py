"""Where arrays live: one mesh, and rules from logical axis names to its axes.

Models are built without a mesh. Their parameters carry the metadata `logical_axes`, a name or None per array axis (see
`attnlab.nn.linear`); rules turn names into mesh axes. The same code runs on one CPU device and on a pod:

    data     copies of the model; the batch is cut over them
    fsdp     the batch is cut over them too, and so are the parameters (fully sharded data parallelism)
    tensor   heads, hidden channels and vocabulary are cut over them

An axis stays whole where the metadata has no name or no array axis for it, where no rule knows the name, where the
size does not divide, or where an earlier axis of the same array has taken the mesh axis.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from attnlab.suggest import suggestion

MESH_AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")
Rules = Mapping[str, str | None]
RULES: Rules = {"embed": "fsdp", "heads": "tensor", "mlp": "tensor", "vocab": "tensor"}


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; one of them may be -1, for all devices that the others leave.

    Attributes:
      data: devices along the axis of copies of the model.
      fsdp: devices over which batch and parameters are cut.
      tensor: devices over which heads, hidden channels and vocabulary are cut.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


def mesh_from(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with the axes data, fsdp and tensor over all devices.

    Args:
      config: sizes of the axes.
      devices: all of JAX's, those of other processes included, when None.

    Raises:
      ValueError: if the sizes do not make the number of devices, or `tensor` would reach across processes.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = [getattr(config, axis) for axis in MESH_AXES]
    known = math.prod(size for size in sizes if size != -1)
    if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
        raise ValueError(f"mesh sizes must be at least 1, and one of them may be -1, got {config}")
    if len(devices) % known or (-1 not in sizes and known != len(devices)):
        raise ValueError(f"{config} does not fit {len(devices)} devices")
    sizes = [len(devices) // known if size == -1 else size for size in sizes]
    local = jax.local_device_count()
    if jax.process_count() > 1 and local % sizes[-1]:
        # Each process supplies its own examples, so two processes cannot share a row of the batch.
        raise ValueError(f"tensor={sizes[-1]} must divide the {local} devices of a process")
    return jax.make_mesh(tuple(sizes), MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def spec(shape: Sequence[int], logical_axes: Sequence[str | None], mesh: Mesh, rules: Rules = RULES) -> P:
    """The partition of one array; see the module docstring for the axes that stay whole.

    An array with more axes than names, such as the stacked parameters of a scan over layers, has the names of its last
    axes; one with fewer, such as a factored second moment, is replicated.

    Raises:
      ValueError: if a rule names an axis that the mesh lacks.
    """
    taken: list[str | None] = []
    for size, name in zip(shape, (None,) * (len(shape) - len(logical_axes)) + tuple(logical_axes), strict=False):
        axis = rules.get(name) if name is not None else None
        if axis is not None and axis not in mesh.shape:
            hint = suggestion(axis, mesh.axis_names)
            raise ValueError(f"the rule for {name!r} names the mesh axis {axis!r}: {hint}")
        free = axis is not None and axis not in taken and size % mesh.shape[axis] == 0
        taken.append(axis if free else None)
    return P(*taken) if len(shape) >= len(logical_axes) else P()


def shardings(tree: Any, mesh: Mesh, rules: Rules = RULES) -> Any:
    """The sharding of every array of a tree, of the same structure.

    Inside `nnx.Variable`s the metadata decides; arrays outside of them are replicated. Optimizer states and averages
    that were made by mapping over parameters hold the same metadata and so follow their parameters.

    Args:
      tree: arrays or `jax.ShapeDtypeStruct`s, possibly in `nnx.Variable`s.
      mesh: see `mesh_from`.
      rules: mesh axis by logical axis name.
    """

    def of(node: Any) -> Any:
        axes = node.get_metadata().get("logical_axes", ()) if isinstance(node, nnx.Variable) else ()
        return jax.tree.map(lambda leaf: NamedSharding(mesh, spec(leaf.shape, axes, mesh, rules)), node)

    return jax.tree.map(of, tree, is_leaf=lambda node: isinstance(node, nnx.Variable))


def with_shardings(tree: Any, sharding: Any) -> Any:
    """`jax.ShapeDtypeStruct`s of a tree that say where its arrays shall live."""
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), tree, sharding)


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """The batch of all processes, cut over data and fsdp, from the rows `(B / processes, ...)` of this one."""
    sharding = NamedSharding(mesh, P(BATCH_AXES))
    return {name: jax.make_array_from_process_local_data(sharding, np.asarray(a)) for name, a in batch.items()}


def check_batch_size(name: str, size: int, mesh: Mesh) -> None:
    """Refuses a number of examples that cannot be cut over the mesh.

    Raises:
      ValueError: unless `size` is a multiple of data times fsdp.
    """
    parts = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    if size % parts:
        raise ValueError(f"{name} of {size} examples cannot be cut over data x fsdp = {parts} devices")
