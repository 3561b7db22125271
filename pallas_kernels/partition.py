"""Opaque kernel calls over several devices and under vmap.

To XLA a Pallas or Triton call is a black box: it would gather every operand onto every device before it, and `vmap`
would add a grid axis that the kernel was not written for. But attention falls apart into batch elements and heads, so a
kernel that says which axes those are can run on each device's part, and a vmapped axis can join the batch.
`batched_and_partitioned` does both:

| where it is called | what runs |
|---|---|
| one device, or inside `jax.shard_map` over all axes | the kernel alone |
| under a mesh with explicit axes | `shard_map` over the axes that the arrays' types name |
| under `jax.set_mesh` with automatic axes, inside `mesh_axes` | `shard_map` over the axes named there |
| other `jit` over several devices, GPU and CPU | the kernel with a partitioning rule, over what XLA chose |
| other `jit` over several devices, TPU | an error of JAX's: libtpu (0.0.52) takes no partitioning rules |
| inside `jax.shard_map` over some axes, others automatic and not named | GPU and CPU: whole operands; TPU: that error |

`refusal` tells beforehand of the last two where the mesh is known, so that another implementation can be chosen.

Key heads G are cut together with query heads H where the devices divide G. Where G divides the devices, each of them
reads its one key head from a whole copy, and gradients are summed over the devices that share a head. Otherwise heads
are not cut.
"""

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.custom_partitioning import ArrayMapping, SdyShardingRule, custom_partitioning
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import dispatch
from pallas_kernels.dtypes import at_least_float32

Names = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class _Named:
    batch: Names
    heads: Names


_named: contextvars.ContextVar[_Named | None] = contextvars.ContextVar("mesh_axes", default=None)


@contextlib.contextmanager
def mesh_axes(*, batch: str | Sequence[str] = (), heads: str | Sequence[str] = ()) -> Iterator[None]:
    """Inside, kernels cut the batch and the heads over these axes of the mesh that `jax.set_mesh` set.

    For meshes of automatic axes, whose arrays do not say while tracing how they are cut. What divides unevenly is not
    cut; arrays that are cut otherwise are moved. Names that the mesh lacks are passed over, so one setting serves
    several meshes. It must hold where gradients are traced too: put it around the call of a jitted function, not
    into the function that is differentiated. What is traced inside belongs to these names, and JAX caches it.

    Args:
      batch: mesh axes over which the batch is cut, such as ("data", "fsdp").
      heads: mesh axes over which the heads are cut, such as "tensor".

    Raises:
      ValueError: if an axis is named twice.
    """
    batch, heads = ((names,) if isinstance(names, str) else tuple(names) for names in (batch, heads))
    if len({*batch, *heads}) < len(batch + heads):
        raise ValueError(f"mesh_axes must name each axis once, got batch={batch} and heads={heads}")
    token = _named.set(_Named(batch, heads))
    try:
        yield
    finally:
        _named.reset(token)


def refusal() -> str | None:
    """Why a kernel cannot be cut over the mesh at hand on the current platform; None when it can or none is known."""
    free, manual = _free_axes(AxisType.Auto), _free_axes(AxisType.Manual)
    if not free or _named.get() is not None or not (manual or dispatch.current_platform() == "tpu"):
        return None
    where = "XLA inside jax.shard_map" if manual else "the TPU compiler"
    return (
        f"{where} does not cut kernels over automatic mesh axes {tuple(free)} by itself: name those of batch and heads"
        " with pallas_kernels.partition.mesh_axes(batch=..., heads=...), or use explicit axes or jax.shard_map over all"
    )


def same_manual_axes(tree: Any) -> Any:
    """The arrays of `tree`, each varying over the manual mesh axes over which any of them varies.

    Inside `jax.shard_map` a loop may then carry any of them. Called before a `jax.custom_vjp`, it makes JAX sum the
    gradient of an array that the shards have in common; a hand-written gradient could not.
    """
    return _all_varying(tree, _varying(jax.tree.leaves(tree)))


def struct(shape: Sequence[int], dtype: jnp.dtype, *like: jax.Array) -> jax.ShapeDtypeStruct:
    """The `out_shape` of a kernel whose output varies over the manual mesh axes over which any of `like` varies."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.sharding.ManualAxisType(varying=_varying(like)))


def batched_and_partitioned(
    fn: Callable[..., Sequence[jax.Array | None]],
    in_axes: Sequence[str],
    out_axes: Sequence[str | None],
) -> Callable[..., tuple[jax.Array | None, ...]]:
    """`fn` with its batch and heads cut over devices, and vmapped axes folded into its batch.

    It is not differentiable: use it inside the forward and backward functions of a `jax.custom_vjp`.

    Args:
      fn: arrays, or None for absent ones, to a tuple of the same. It reads sizes from its arguments: on several devices
        it gets parts of the batch and of the heads. All else that it needs is static, the platform included, as it may
        be traced again when XLA compiles.
      in_axes: the axes of each array, a letter each: B the batch, H the heads, G the key heads; other letters are free
        and are never cut. An array may lack B, as "H" and "" do.
      out_axes: those of each output, None where `fn` gives None. All have a B: a sum over the batch would be one over
        a part of it.

    Returns:
      A function like `fn`, of positional arguments.

    Raises:
      ValueError: if an output has no B, an array names B, H or G twice, or, when called, the arrays do not fit
        `in_axes`.
    """
    in_axes, out_axes = tuple(in_axes), tuple(out_axes)
    for axes in (*in_axes, *(axes for axes in out_axes if axes is not None)):
        if any(axes.count(letter) > 1 for letter in "BHG"):
            raise ValueError(f"an array must name each of B, H and G at most once, got {axes!r}")
    for axes in out_axes:
        if axes is not None and "B" not in axes:
            raise ValueError(f"every output must have a batch axis B, got {axes!r}")

    def call(*arrays: jax.Array | None) -> tuple[jax.Array | None, ...]:
        if len(arrays) != len(in_axes):
            raise ValueError(f"in_axes has {len(in_axes)} arrays, got {len(arrays)}")
        inputs = [i for i, x in enumerate(arrays) if x is not None]
        outputs = [i for i, axes in enumerate(out_axes) if axes is not None]

        def fn_of_present(*present: jax.Array) -> tuple[jax.Array, ...]:
            results = fn(*_spread(present, inputs, len(arrays)))
            given = [i for i, y in enumerate(results) if y is not None]
            if len(results) != len(out_axes) or given != outputs:
                raise ValueError(f"out_axes {out_axes} has arrays at {outputs}, {_name(fn)} gave them at {given}")
            return tuple(results[i] for i in outputs)

        op = _Op(fn_of_present, tuple(in_axes[i] for i in inputs), tuple(out_axes[i] for i in outputs))
        return _spread(_batched(op)(*(jnp.asarray(arrays[i]) for i in inputs)), outputs, len(out_axes))

    return call


@dataclasses.dataclass(frozen=True)
class _Op:
    """A kernel call without absent arrays."""

    fn: Callable[..., tuple[jax.Array, ...]]
    in_axes: tuple[str, ...]
    out_axes: tuple[str, ...]

    def sizes(self, arrays: Sequence[jax.Array]) -> dict[str, int]:
        """Sizes of B, H and G, whichever there are."""
        sizes: dict[str, int] = {}
        for axes, x in zip(self.in_axes, arrays, strict=True):
            if len(axes) != x.ndim:
                raise ValueError(f"in_axes names {axes!r} for an array of shape {x.shape}")
            for letter, size in zip(axes, x.shape, strict=True):
                if letter in "BHG" and sizes.setdefault(letter, size) != size:
                    raise ValueError(f"axis {letter} must have one size, got {sizes[letter]} and {size}")
        if sizes.get("H", 0) % sizes.get("G", 1):
            raise ValueError(f"H must be a multiple of G, got {sizes['H']} and {sizes['G']}")
        return sizes


# ---- vmap


def _batched(op: _Op) -> Callable[..., tuple[jax.Array, ...]]:
    """The call with a rule for vmap: the new axis joins the batch, or is walked along where an array has no batch."""

    @jax.custom_batching.custom_vmap
    def call(*arrays):
        varying = _varying(arrays)
        return _all_varying(_partitioned(op, _all_varying(arrays, varying)), varying)

    @call.def_vmap
    def rule(size, mapped, *arrays):
        every = [True] * len(op.out_axes)
        if any(new and "B" not in axes for new, axes in zip(mapped, op.in_axes, strict=True)):

            def one(some):
                some = iter(some)
                return call(*(next(some) if new else x for new, x in zip(mapped, arrays, strict=True)))

            return jax.lax.map(one, [x for new, x in zip(mapped, arrays, strict=True) if new]), tuple(every)
        # A batch that is cut over devices stays the slow axis, that its parts stay in one piece.
        inner = bool(_cut(op, arrays, new_axes=mapped).batch)

        def fold(x, axes, new):
            if "B" not in axes:
                return x
            place = axes.index("B")
            x = jnp.moveaxis(x, 0, place + inner) if new else jnp.expand_dims(x, place + inner)
            shape = list(x.shape)
            shape[place + inner] = size
            x = jnp.broadcast_to(x, shape)
            return x.reshape(*shape[:place], -1, *shape[place + 2 :])

        def unfold(y, axes):
            place = axes.index("B")
            batch = y.shape[place] // size
            split = (batch, size) if inner else (size, batch)
            return jnp.moveaxis(y.reshape(*y.shape[:place], *split, *y.shape[place + 1 :]), place + inner, 0)

        outputs = call(*(fold(*each) for each in zip(arrays, op.in_axes, mapped, strict=True)))
        return tuple(unfold(*each) for each in zip(outputs, op.out_axes, strict=True)), tuple(every)

    return call


# ---- several devices


@dataclasses.dataclass(frozen=True)
class _Cut:
    """Mesh axes that cut the batch and the heads.

    Attributes:
      batch: mesh axes over the batch.
      heads: mesh axes over the heads.
      share: devices that read the same key head; above 1 key heads are not cut.
    """

    batch: Names = ()
    heads: Names = ()
    share: int = 1

    def spec(self, axes: str) -> P:
        """How an array with these axes is cut."""
        names = {"B": self.batch, "H": self.heads, "G": self.heads if self.share == 1 else ()}
        return P(*(names.get(letter) or None for letter in axes))

    def fitting(self, sizes: dict[str, int], mesh_shape: dict[str, int]) -> "_Cut":
        """Without what does not divide the axes of these sizes."""
        batch, heads = (math.prod(mesh_shape[name] for name in names) for names in (self.batch, self.heads))
        all_heads = sizes.get("H", sizes.get("G", 1))
        groups = sizes.get("G", all_heads)
        whole = sizes["B"] % batch == 0
        fits = all_heads % heads == 0 and (groups % heads == 0 or heads % groups == 0)
        return _Cut(
            batch=self.batch if whole else (),
            heads=self.heads if fits else (),
            share=heads // groups if fits and groups % heads else 1,
        )


def _partitioned(op: _Op, arrays: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
    """The call on this device's part, by whichever way of cutting the surroundings allow."""
    sizes = op.sizes(arrays)
    explicit, automatic = _free_axes(AxisType.Explicit), _free_axes(AxisType.Auto)
    if explicit or (automatic and _named.get() is not None):
        mesh_shape = explicit | automatic
        cut = _cut(op, arrays).fitting(sizes, mesh_shape)
        specs = [cut.spec(axes) for axes in op.in_axes]
        if explicit:
            arrays = [jax.sharding.reshard(x, spec) for x, spec in zip(arrays, specs, strict=True)]
        return jax.shard_map(
            _local(op, cut, sizes),
            in_specs=tuple(specs),
            out_specs=tuple(cut.spec(axes) for axes in op.out_axes),
            axis_names=set(mesh_shape),
            check_vma=False,  # a kernel knows nothing of the axes over which it varies
        )(*arrays)
    if dispatch.current_platform() == "tpu" or AxisType.Manual in jax.sharding.get_abstract_mesh().axis_types:
        return op.fn(*arrays)
    return _by_rule(op, sizes)(*arrays)


def _cut(op: _Op, arrays: Sequence[jax.Array], new_axes: Sequence[bool] | None = None) -> _Cut:
    """Mesh axes of batch and heads: those in the types of the arrays, and those that `mesh_axes` names.

    Args:
      op: the call.
      arrays: its arguments.
      new_axes: which of them have one more axis in front than `op` says.
    """
    explicit, automatic = _free_axes(AxisType.Explicit), _free_axes(AxisType.Auto)
    specs = [jax.typeof(x).sharding.spec for x in arrays] if explicit else []
    if new_axes is not None:
        specs = [spec[1:] if new else spec for spec, new in zip(specs, new_axes, strict=False)]
    named = _named.get() or _Named((), ())
    batch = *_names_of("B", specs, op.in_axes), *(name for name in named.batch if name in automatic)
    heads = _names_of("H", specs, op.in_axes) or _names_of("G", specs, op.in_axes)
    heads = *heads, *(name for name in named.heads if name in automatic)
    return _Cut(batch, tuple(name for name in heads if name not in batch))


def _names_of(letter: str, specs: Sequence[Sequence], in_axes: Sequence[str]) -> Names:
    """Mesh axes of the first array that is cut along `letter`."""
    for spec, axes in zip(specs, in_axes, strict=False):
        names = spec[axes.index(letter)] if letter in axes and axes.index(letter) < len(spec) else None
        if names:
            return (names,) if isinstance(names, str) else tuple(names)
    return ()


def _local(op: _Op, cut: _Cut, sizes: dict[str, int]) -> Callable[..., tuple[jax.Array, ...]]:
    """What one device computes; where devices share a key head it picks its own, and sums what all found for it."""
    if cut.share == 1:
        return op.fn

    def local(*arrays):
        group = jax.lax.axis_index(cut.heads) // cut.share

        def own(x, axes):
            return jax.lax.dynamic_slice_in_dim(x, group, 1, axes.index("G")) if "G" in axes else x

        def summed(y, axes):
            if "G" not in axes:
                return y
            place = axes.index("G")
            whole = jnp.zeros((*y.shape[:place], sizes["G"], *y.shape[place + 1 :]), at_least_float32(y))
            whole = jax.lax.dynamic_update_slice_in_dim(whole, y.astype(whole.dtype), group, place)
            return jax.lax.psum(whole, cut.heads).astype(y.dtype)

        outputs = op.fn(*(own(*each) for each in zip(arrays, op.in_axes, strict=True)))
        return tuple(summed(*each) for each in zip(outputs, op.out_axes, strict=True))

    return local


def _by_rule(op: _Op, sizes: dict[str, int]) -> Callable[..., tuple[jax.Array, ...]]:
    """The call with a rule of partitioning, which XLA asks when it knows how the arrays are cut."""
    op = dataclasses.replace(op, fn=jax.jit(op.fn))  # keeps its constants inside: a partitioned call may have none

    def partition(mesh, arguments, results):
        if mesh.empty:
            raise ValueError("arrays that are cut over devices must have a NamedSharding")
        named = [(x.sharding.spec, axes) for x, axes in zip(arguments, op.in_axes, strict=True)]
        named += [(y.sharding.spec, axes) for y, axes in zip(results, op.out_axes, strict=True)]
        specs, axes_of = zip(*named, strict=True)
        batch = _names_of("B", specs, axes_of)
        heads = _names_of("H", specs, axes_of) or _names_of("G", specs, axes_of)
        cut = _Cut(batch, tuple(name for name in heads if name not in batch)).fitting(sizes, dict(mesh.shape))
        shardings = [NamedSharding(mesh, cut.spec(axes)) for axes in op.in_axes + op.out_axes]
        count = len(op.in_axes)
        return mesh, _local(op, cut, sizes), tuple(shardings[count:]), tuple(shardings[:count])

    call = custom_partitioning(lambda *arrays: op.fn(*arrays))
    call.def_partition(partition, sharding_rule=_sharding_rule(op, sizes))
    return call


def _sharding_rule(op: _Op, sizes: dict[str, int]) -> SdyShardingRule:
    """Batch and heads go through, all other axes must be whole.

    H and G are factors of their own where they differ: as (G, H / G), a mesh axis larger than G would be cut in two,
    which no NamedSharding can say. `partition` puts them in agreement.
    """
    factors = {"B": "b", "H": "h", "G": "h" if sizes.get("H", sizes.get("G")) == sizes.get("G") else "g"}
    whole = []

    def factor(letter: str) -> str:
        if letter not in factors:
            whole.append(f"w{len(whole)}")
        return factors.get(letter) or whole[-1]

    ins, outs = (tuple(ArrayMapping(*map(factor, axes)) for axes in every) for every in (op.in_axes, op.out_axes))
    return SdyShardingRule(ins, outs, need_replication_factors=tuple(whole))


# ---- small things


def _free_axes(kind: AxisType) -> dict[str, int]:
    """Axes of this kind and of more than one device in the mesh at hand."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
    return {name: size for name, size, its in kinds if its == kind and size > 1}


def _varying(arrays: Sequence[jax.Array]) -> frozenset[str]:
    """Manual mesh axes over which any of the arrays varies."""
    return frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in arrays))


def _all_varying(tree, axes: frozenset[str]):
    def cast(x):
        missing = tuple(sorted(axes - jax.typeof(x).manual_axis_type.varying))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(cast, tree)


def _spread(some: Sequence, places: Sequence[int], count: int) -> tuple:
    """A tuple of `count` with `some` at `places` and None elsewhere."""
    every = [None] * count
    for place, x in zip(places, some, strict=True):
        every[place] = x
    return tuple(every)


def _name(fn: Callable) -> str:
    return getattr(fn, "__name__", repr(fn))
