"""Kernels on eight devices: they compute what one device does, and no operand is gathered."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import partition
from tests.pallas_kernels.eight_devices import collectives
from tests.pallas_kernels.toy_kernel import arguments, loss, toy

GRAD = jax.value_and_grad(loss, argnums=(0, 1, 2))


def check(compiled, placed, want, moved=("all-reduce",)):
    kinds = {kind for kind, _ in collectives(compiled)}
    assert kinds <= set(moved), collectives(compiled)
    for got, expected in zip(jax.tree.leaves(compiled(*placed)), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def mesh_of(kind, data=4, model=2):
    return jax.make_mesh((data, model), ("data", "model"), axis_types=(kind,) * 2)


def placed_on(mesh, arrays, heads="model"):
    divides = arrays[1].shape[2] % mesh.shape["model"] == 0
    specs = P("data", None, heads), P("data", None, heads if divides else None), P(heads)
    return [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(arrays, specs, strict=True)]


HEADS = {"all": (4, 4, 4, 2), "groups": (4, 2, 4, 2), "one key head": (8, 1, 4, 2), "two share": (8, 2, 2, 4)}


@pytest.mark.parametrize("way", ["rule", "named", "explicit"])
@pytest.mark.parametrize("sizes", HEADS.values(), ids=HEADS)
def test_batch_and_heads_are_cut(way, sizes):
    heads, groups, data, model = sizes
    arrays = arguments(heads, groups)
    want = GRAD(*arrays)
    mesh = mesh_of(AxisType.Explicit if way == "explicit" else AxisType.Auto, data, model)
    placed = placed_on(mesh, arrays)
    if way == "rule":
        check(jax.jit(GRAD).lower(*placed).compile(), placed, want)
        return

    def grad(*arrays):
        with partition.mesh_axes(batch="data", heads="model"):
            return GRAD(*arrays)

    with jax.set_mesh(mesh):
        check(jax.jit(GRAD if way == "explicit" else grad).lower(*placed).compile(), placed, want)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_the_output_is_cut_as_the_input(kind):
    mesh = mesh_of(kind)
    with jax.set_mesh(mesh):
        y = jax.jit(toy)(*placed_on(mesh, arguments()))
    assert tuple(y.sharding.spec)[:3] == ("data", None, "model")


def test_one_device_of_a_mesh_needs_no_names():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        got = jax.jit(GRAD)(*arguments())
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-5), got, GRAD(*arguments()))


def test_what_does_not_divide_stays_whole():
    arrays = arguments(3, 3)
    mesh = mesh_of(AxisType.Auto)

    def grad(*arrays):
        with partition.mesh_axes(batch=("data", "absent"), heads="model"):
            return GRAD(*arrays)

    with jax.set_mesh(mesh):
        placed = placed_on(mesh, arrays, heads=None)
        check(jax.jit(grad).lower(*placed).compile(), placed, GRAD(*arrays))


def test_inside_shard_map():
    arrays = arguments()
    mesh = mesh_of(AxisType.Auto)
    specs = P("data", None, "model"), P("data", None, "model"), P("model")
    # Pallas' interpreter fails where mesh axes are checked; test_partition.py checks them with the TPU compiler.
    local = jax.shard_map(toy, mesh=mesh, in_specs=specs, out_specs=specs[0], check_vma=False)
    grad = jax.value_and_grad(lambda *arrays: jnp.sum(jnp.sin(local(*arrays))), argnums=(0, 1, 2))
    placed = placed_on(mesh, arrays)
    check(jax.jit(grad).lower(*placed).compile(), placed, GRAD(*arrays))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_inside_shard_map_over_some_axes(kind):
    arrays = arguments()
    mesh, part = mesh_of(kind), P("data")
    local = jax.shard_map(toy, mesh=mesh, in_specs=(part, part, P()), out_specs=part, axis_names={"data"})

    def grad(*arrays):
        with partition.mesh_axes(heads="model"):
            return jax.value_and_grad(lambda *arrays: jnp.sum(jnp.sin(local(*arrays))), argnums=(0, 1, 2))(*arrays)

    with jax.set_mesh(mesh):
        placed = placed_on(mesh, arrays)
        # JAX itself gathers explicit axes where such a shard_map begins.
        moved = ("all-reduce",) if kind == AxisType.Auto else ("all-reduce", "all-gather")
        check(jax.jit(grad).lower(*placed).compile(), placed, GRAD(*arrays), moved)


@pytest.mark.parametrize("way", ["rule", "named", "explicit"])
def test_vmap_and_scan_of_what_is_cut(way):
    arrays = arguments()
    mesh = mesh_of(AxisType.Explicit if way == "explicit" else AxisType.Auto)

    def layers(q, k, w):
        def one(total, factor):
            outputs = jax.vmap(loss, (0, None, None))(jnp.stack([q, factor * q]), k, w)
            return total + jnp.sum(outputs), None

        return jax.lax.scan(jax.checkpoint(one), 0.0, jnp.asarray([0.5, 2.0]))[0]

    def named(*arrays):
        with partition.mesh_axes(batch="data", heads="model"):
            return jax.value_and_grad(layers, argnums=(0, 1, 2))(*arrays)

    grad = named if way == "named" else jax.value_and_grad(layers, argnums=(0, 1, 2))
    want = jax.value_and_grad(layers, argnums=(0, 1, 2))(*arrays)
    with jax.set_mesh(mesh):
        placed = placed_on(mesh, arrays)
        # XLA alone does not see that a batch that is cut must stay the slow axis.
        moved = ("all-reduce", "all-to-all", "collective-permute", "all-gather") if way == "rule" else ("all-reduce",)
        check(jax.jit(grad).lower(*placed).compile(), placed, want, moved)
