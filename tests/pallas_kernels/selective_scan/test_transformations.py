"""Memory, and life under jit, vmap, scan, remat, shard_map and shardings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from pallas_kernels import selective_scan
from pallas_kernels.selective_scan.cases import SMALL, TOKENS, Case

CASES = {case.name: case for case in SMALL}


def loss(arguments, **options):
    return jnp.sum(selective_scan(**arguments, **options) ** 2)


def test_compiled_memory_is_linear_forward_and_backward():
    temporary = {}
    for length in (2048, 8192):
        arguments, options = Case("memory", 1, length, 32, 16, gate=True).arguments()
        run = jax.jit(jax.value_and_grad(lambda a, options=options: loss(a, **options)))
        temporary[length] = run.lower(arguments).compile().memory_analysis().temp_size_in_bytes
        inputs = sum(x.nbytes for x in jax.tree.leaves(arguments))
    assert temporary[8192] <= 4 * temporary[2048]
    assert temporary[8192] <= 2 * inputs  # all states are four times as large


@pytest.mark.parametrize("name", ["packed_grouped"])
def test_jit_is_eager_and_remat_changes_nothing(name):
    arguments, options = CASES[name].arguments()

    def run(arguments):
        return loss(arguments, **options)

    want = jax.value_and_grad(run)(arguments)
    for variant in (jax.jit(jax.value_and_grad(run)), jax.value_and_grad(jax.checkpoint(run))):
        jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-5), variant(arguments), want)


def test_vmap_is_a_loop():
    arguments, options = Case("vmap", 1, 50, gate=True).arguments()
    stacked = jax.tree.map(lambda x: jnp.stack([x, 0.5 * x]), arguments)
    grads = jax.jit(jax.value_and_grad(lambda a: loss(a, **options, chunk_size=16)))
    got = jax.vmap(grads)(stacked)
    for i in range(2):
        want = grads(jax.tree.map(lambda x, i=i: x[i], stacked))
        jax.tree.map(lambda g, w, i=i: np.testing.assert_allclose(g[i], w, rtol=1e-4, atol=1e-4), got, want)


def test_scan_over_layers():
    arguments, options = CASES["plain_63"].arguments()
    x, scales = arguments.pop("x"), jnp.asarray([0.1, 0.2, 0.3])

    def layer(x, s):
        return x + s * selective_scan(x, **arguments, **options), None

    def loop(x):
        for s in scales:
            x, _ = layer(x, s)
        return jnp.sum(x**2)

    want = jax.jit(jax.grad(loop))(x)
    got = jax.jit(jax.grad(lambda x: jnp.sum(jax.lax.scan(layer, x, scales)[0] ** 2)))(x)
    np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-4)


def test_shard_map_over_the_batch():
    arguments, options = CASES["packed_150"].arguments()
    ids = options.pop("segment_ids")
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = {name: P("data") if name in (*TOKENS, "initial_state") else P() for name in arguments}

    def run(arguments, ids):
        return selective_scan(**arguments, **options, segment_ids=ids)

    local = jax.shard_map(run, mesh=mesh, in_specs=(specs, P("data")), out_specs=P("data"))
    got = jax.jit(jax.grad(lambda a: jnp.sum(local(a, ids) ** 2)))(arguments)  # sums those of shared parameters, too
    want = jax.jit(jax.grad(lambda a: jnp.sum(run(a, ids) ** 2)))(arguments)
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-5), got, want)


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_sharded_arrays_are_accepted(kind):
    arguments, options = Case("sharded", 2, 150, gate=True).arguments()
    mesh = jax.make_mesh((1, 1), ("data", "model"), axis_types=(getattr(jax.sharding.AxisType, kind),) * 2)
    want = jax.jit(jax.grad(lambda a: loss(a, **options)))(arguments)
    with jax.set_mesh(mesh):
        placed = {name: jax.device_put(x, P("data") if name in TOKENS else P()) for name, x in arguments.items()}
        got = jax.jit(jax.grad(lambda a: loss(a, **options)))(placed)
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-5), got, want)
