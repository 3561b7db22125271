"""Kernels over several devices and under vmap."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import dispatch, partition
from tests.pallas_kernels import eight_devices
from tests.pallas_kernels.toy_kernel import arguments, loss, toy
from tests.pallas_kernels.tpu_compile import compile_for, kernels_of, mesh, needs_tpu_compiler, shape


def test_on_eight_devices():
    eight_devices.passes(pathlib.Path(__file__).parent / "on_eight_devices" / "partition.py")


def test_one_device_runs_the_kernel_alone():
    wrapped = jax.jit(toy).lower(*arguments()).compile()
    assert "CustomSPMDPartitioning" not in wrapped.as_text()
    q, k, w = arguments()
    want = q * jnp.repeat(jnp.sum(k, axis=1, keepdims=True), 2, axis=2) * w[:, None]
    np.testing.assert_allclose(wrapped(q, k, w), want, rtol=1e-6)


MAPPED = {
    "all": (0, 0, 0),
    "queries": (1, None, None),
    "arrays with a batch": (0, 2, None),
    "no batch": (None, None, 0),
}


@pytest.mark.parametrize("axes", MAPPED.values(), ids=MAPPED)
def test_vmap_is_a_loop(axes):
    stacked = [
        x if axis is None else jnp.stack([x, -0.5 * x, 2 * x], axis) for x, axis in zip(arguments(), axes, strict=True)
    ]
    grad = jax.value_and_grad(loss, argnums=(0, 1, 2))
    got = jax.vmap(grad, in_axes=axes)(*stacked)
    for i in range(3):
        one = [x if axis is None else jnp.take(x, i, axis) for x, axis in zip(stacked, axes, strict=True)]
        jax.tree.map(lambda g, w, i=i: np.testing.assert_allclose(g[i], w, rtol=1e-5, atol=1e-5), got, grad(*one))


def test_vmap_adds_no_call_and_no_axis():
    q, k, w = arguments()
    jaxpr = str(jax.make_jaxpr(jax.vmap(jax.vmap(toy, (0, None, None)), (0, 0, None)))(q[None, None], k[None], w))
    assert jaxpr.count("pallas_call[") == 1
    assert "scan" not in jaxpr


def test_gradient_of_vmap_and_scan_and_remat():
    q, k, w = arguments()
    stacked = jnp.stack([q, 2 * q])

    def scanned(stacked):
        layer = jax.checkpoint(lambda total, q: (total + loss(q, k, w), None))
        return jax.lax.scan(layer, 0.0, stacked)[0]

    got = jax.jit(jax.grad(scanned))(stacked)
    mapped = jax.grad(lambda stacked: jnp.sum(jax.vmap(loss, (0, None, None))(stacked, k, w)))(stacked)
    want = jnp.stack([jax.grad(loss)(q, k, w), jax.grad(loss)(2 * q, k, w)])
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(mapped, want, rtol=1e-5, atol=1e-6)


def test_a_kernel_may_have_constants():
    table = np.arange(3.0, dtype=np.float32)
    scaled = partition.batched_and_partitioned(lambda x: (x * table,), ("BN",), ("BN",))
    np.testing.assert_array_equal(jax.jit(scaled)(jnp.ones((2, 3)))[0], [table, table])


def test_absent_arrays_and_outputs():
    def fn(x, y):
        return (x, None) if y is None else (x, y)

    x = jnp.ones((2, 3))
    assert partition.batched_and_partitioned(fn, ("BN", "BN"), ("BN", None))(x, None)[1] is None
    with pytest.raises(ValueError, match=r"has arrays at \[0\], fn gave them at \[0, 1\]"):
        partition.batched_and_partitioned(fn, ("BN", "BN"), ("BN", None))(x, x)


REFUSED = {
    "output without batch": (("BHD",), ("HD",), "every output must have a batch axis B, got 'HD'"),
    "axis twice": (("BHB",), ("B",), "at most once, got 'BHB'"),
    "rank": (("BNHD",), ("B",), r"in_axes names 'BNHD' for an array of shape \(2, 4, 3\)"),
    "size": (("BHD", "HBD"), ("B",), "axis H must have one size, got 4 and 2"),
    "groups": (("BHD", "BDG"), ("B",), "H must be a multiple of G, got 4 and 3"),
    "count": (("BHD", "BHD", "BHD"), ("B",), "in_axes has 3 arrays, got 2"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusal(name):
    in_axes, out_axes, message = REFUSED[name]
    arrays = [jnp.ones((2, 4, 3))] * min(2, len(in_axes))
    with pytest.raises(ValueError, match=message):
        partition.batched_and_partitioned(lambda *x: x[:1], in_axes, out_axes)(*arrays)


def test_mesh_axes_must_differ():
    message = r"each axis once, got batch=.*'data'.* and heads=.*'data'"
    with pytest.raises(ValueError, match=message), partition.mesh_axes(batch=("data",), heads="data"):
        pass


def test_a_tpu_needs_the_names_of_automatic_axes():
    automatic = jax.sharding.AbstractMesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    explicit = jax.sharding.AbstractMesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    with dispatch.target("tpu"):
        assert partition.refusal() is None
        with jax.sharding.use_abstract_mesh(automatic):
            assert "name those of batch and heads" in partition.refusal()
            with partition.mesh_axes(batch="data"):
                assert partition.refusal() is None
        with jax.sharding.use_abstract_mesh(explicit):
            assert partition.refusal() is None
    partly = jax.sharding.AbstractMesh(
        (2, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Manual, jax.sharding.AxisType.Auto)
    )
    with jax.sharding.use_abstract_mesh(partly):
        assert (
            r"XLA inside jax.shard_map does not cut kernels over automatic mesh axes ('model',)" in partition.refusal()
        )
    with jax.sharding.use_abstract_mesh(automatic):
        assert partition.refusal() is None


@needs_tpu_compiler
def test_the_tpu_compiler_cuts_a_kernel():
    pod = mesh("v5p", data=2, model=2)

    def struct(*shape, spec):
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(pod, spec))

    shapes = (
        struct(4, 256, 4, 128, spec=P("data", None, "model")),
        struct(4, 256, 2, 128, spec=P("data", None, "model")),
        struct(4, spec=P("model")),
    )

    def grad(*arrays):
        with partition.mesh_axes(batch="data", heads="model"):
            return jax.grad(loss, argnums=(0, 1, 2))(*arrays)

    with jax.set_mesh(pod):
        compiled = compile_for("v5p", grad, *shapes, mesh=pod)
    assert kernels_of(compiled) == 2
    assert eight_devices.collectives(compiled) == [("all-reduce", (2,))]  # the sum of w's gradient over the batch


@needs_tpu_compiler
def test_shard_map_checks_the_mesh_axes_of_a_kernel():
    pod = mesh("v5p", data=2, model=2)
    specs = P("data", None, "model"), P("data", None, "model"), P("model")
    local = jax.shard_map(toy, mesh=pod, in_specs=specs, out_specs=specs[0])
    shapes = (shape((4, 256, 4, 128), jnp.float32), shape((4, 256, 2, 128), jnp.float32), shape((4,), jnp.float32))

    def grad(*arrays):
        return jax.value_and_grad(lambda *arrays: jnp.sum(jnp.sin(local(*arrays))), argnums=(0, 1, 2))(*arrays)

    assert kernels_of(compile_for("v5p", grad, *shapes, mesh=pod)) == 2
