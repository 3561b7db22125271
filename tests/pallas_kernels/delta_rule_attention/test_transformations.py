"""Memory, and life under jit, vmap, scan, remat, shard_map and shardings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from pallas_kernels import delta_rule_attention
from pallas_kernels.delta_rule_attention.cases import SMALL, Case
from tests.pallas_kernels.quick import quick

CASES = {case.name: case for case in SMALL}
DECAYS = (None, "head", "token")


def loss(arguments, **options):
    return jnp.sum(delta_rule_attention(**arguments, **options) ** 2)


@pytest.mark.parametrize("decay", quick(DECAYS, ("token",)))
def test_compiled_memory_is_linear_forward_and_backward(decay):
    temporary = {}
    for length in (2048, 8192):
        arguments, _ = Case("memory", 1, length, 2, 32, decay=decay).arguments()
        analysis = jax.jit(jax.value_and_grad(loss)).lower(arguments).compile().memory_analysis()
        temporary[length] = analysis.temp_size_in_bytes
        inputs = sum(x.nbytes for x in jax.tree.leaves(arguments))
    assert temporary[8192] <= 4 * temporary[2048]
    assert temporary[8192] <= 1.5 * inputs


@pytest.mark.parametrize("name", ["packed_head"])
def test_jit_is_eager_and_remat_changes_nothing(name):
    arguments, options = CASES[name].arguments()

    def run(arguments):
        return loss(arguments, **options)

    want = jax.value_and_grad(run)(arguments)
    for variant in (jax.jit(jax.value_and_grad(run)), jax.value_and_grad(jax.checkpoint(run))):
        jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-5), variant(arguments), want)


def test_vmap_is_a_loop():
    arguments, _ = Case("vmap", 1, 50, decay="token").arguments()
    stacked = jax.tree.map(lambda x: jnp.stack([x, 0.5 * x]), arguments)
    grads = jax.jit(jax.value_and_grad(lambda a: loss(a, chunk_size=16)))
    got = jax.vmap(grads)(stacked)
    for i in range(2):
        want = grads(jax.tree.map(lambda x, i=i: x[i], stacked))
        jax.tree.map(lambda g, w, i=i: np.testing.assert_allclose(g[i], w, rtol=1e-4, atol=1e-4), got, want)


def test_scan_over_layers():
    arguments, _ = CASES["plain_63"].arguments()
    x, beta, scales = arguments["k"], arguments["beta"], jnp.asarray([0.1, 0.2, 0.3])

    def layer(x, s):
        return x + delta_rule_attention(x, x, x, beta, scale=s, log_decay=jnp.asarray([-0.1, -0.2])), None

    def loop(x):
        for s in scales:
            x, _ = layer(x, s)
        return jnp.sum(x**2)

    want = jax.jit(jax.grad(loop))(x)
    got = jax.jit(jax.grad(lambda x: jnp.sum(jax.lax.scan(layer, x, scales)[0] ** 2)))(x)
    np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("name", quick(["head_97", "packed_token"], ("head_97",)))
def test_shard_map_over_the_batch(name):
    arguments, options = CASES[name].arguments()
    ids = options.pop("segment_ids", None)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = {name: P() if x.ndim < 2 else P("data") for name, x in arguments.items()}

    def run(arguments, ids):
        return delta_rule_attention(**arguments, segment_ids=ids)

    local = jax.shard_map(run, mesh=mesh, in_specs=(specs, P("data")), out_specs=P("data"))
    got = jax.jit(jax.grad(lambda a: jnp.sum(local(a, ids) ** 2)))(arguments)  # sums that of a shared decay, too
    want = jax.jit(jax.grad(lambda a: jnp.sum(run(a, ids) ** 2)))(arguments)
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-5), got, want)


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_sharded_arrays_are_accepted(kind):
    arguments, _ = Case("sharded", 2, 150, decay="token").arguments()
    mesh = jax.make_mesh((1, 1), ("data", "model"), axis_types=(getattr(jax.sharding.AxisType, kind),) * 2)
    want = jax.jit(jax.grad(loss))(arguments)
    with jax.set_mesh(mesh):
        placed = jax.tree.map(lambda x: jax.device_put(x, P("data", None, "model")), arguments)
        got = jax.jit(jax.grad(loss))(placed)
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-5), got, want)
