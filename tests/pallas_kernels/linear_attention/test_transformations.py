"""Memory, and life under jit, vmap, scan, remat, shard_map and shardings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from pallas_kernels import linear_attention
from pallas_kernels.linear_attention.cases import SMALL, Case
from tests.jaxprs import largest_array
from tests.pallas_kernels.quick import quick

CASES = {case.name: case for case in SMALL}
DECAYS = (None, "head", "token", "channel")


def gradient(case: Case):
    arguments, options = case.arguments()
    run = jax.value_and_grad(lambda a: jnp.sum(linear_attention(**a, **options) ** 2))
    return run, arguments


@pytest.mark.parametrize("options", [{"decay": d} for d in DECAYS] + [{"causal": False}, {"segments": 3}], ids=str)
def test_no_intermediate_grows_faster_than_the_inputs(options):
    size = {}
    for length in (2048, 8192):
        run, arguments = gradient(Case("memory", 1, length, 1, 8, **options))
        size[length] = largest_array(run, arguments)
        assert size[length] <= max(128 * 128, 10 * length), size
    assert size[8192] <= 4 * size[2048]


@pytest.mark.parametrize("decay", quick(DECAYS, ("token",)))
def test_compiled_memory_is_linear_forward_and_backward(decay):
    temporary = {}
    for length in (2048, 8192):
        run, arguments = gradient(Case("memory", 1, length, 2, 32, decay=decay))
        analysis = jax.jit(run).lower(arguments).compile().memory_analysis()
        temporary[length] = analysis.temp_size_in_bytes
        inputs = sum(x.nbytes for x in jax.tree.leaves(arguments))
    assert temporary[8192] <= 4 * temporary[2048]
    assert temporary[8192] <= 1.5 * inputs


def test_forward_keeps_one_state():
    arguments, _ = Case("forward", 1, 16384, 1, 16, decay="token").arguments()
    analysis = jax.jit(lambda a: linear_attention(**a)).lower(arguments).compile().memory_analysis()
    assert analysis.temp_size_in_bytes < sum(x.nbytes for x in jax.tree.leaves(arguments)) / 4


@pytest.mark.parametrize("name", quick(["token_300", "packed_head", "full_packed_cross"], ("packed_head",)))
def test_jit_is_eager_and_remat_changes_nothing(name):
    arguments, options = CASES[name].arguments()

    def loss(arguments):
        return jnp.sum(linear_attention(**arguments, **options) ** 2)

    want = jax.value_and_grad(loss)(arguments)
    for variant in (jax.jit(jax.value_and_grad(loss)), jax.value_and_grad(jax.checkpoint(loss))):
        jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-6), variant(arguments), want)


@pytest.mark.parametrize("decay", quick(DECAYS, ("head",)))
def test_vmap_is_a_loop(decay):
    arguments, _ = Case("vmap", 1, 50, decay=decay).arguments()
    stacked = jax.tree.map(lambda x: jnp.stack([x, 0.5 * x, 2 * x]), arguments)

    def grads(arguments):
        return jax.value_and_grad(lambda a: jnp.sum(linear_attention(**a, chunk_size=16) ** 2))(arguments)

    got = jax.vmap(grads)(stacked)
    for i in range(3):
        want = grads(jax.tree.map(lambda x, i=i: x[i], stacked))
        jax.tree.map(lambda g, w, i=i: np.testing.assert_allclose(g[i], w, rtol=1e-4, atol=1e-4), got, want)


def test_scan_over_layers():
    x = CASES["plain_63"].arguments()[0]["q"]
    scales = jnp.asarray([0.1, 0.2, 0.3])

    def loop(x):
        for s in scales:
            x = x + linear_attention(x, x, x, scale=s, log_decay=jnp.asarray([-0.1, -0.2]))
        return jnp.sum(x**2)

    def scanned(x):
        def layer(x, s):
            return x + linear_attention(x, x, x, scale=s, log_decay=jnp.asarray([-0.1, -0.2])), None

        return jnp.sum(jax.lax.scan(layer, x, scales)[0] ** 2)

    np.testing.assert_allclose(jax.jit(jax.grad(scanned))(x), jax.grad(loop)(x), rtol=2e-4, atol=2e-4)


SHARDED = ("head_97", "token_300", "packed", "grouped_channel", "full", "full_packed")


@pytest.mark.parametrize("name", quick(SHARDED, ("head_97", "full_packed")))
def test_shard_map_over_the_batch(name):
    arguments, options = CASES[name].arguments()
    ids = options.pop("segment_ids", None)
    ids = ids[0] if isinstance(ids, tuple) else ids
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = {name: P() if x.ndim == 1 else P("data") for name, x in arguments.items()}

    def run(arguments, ids):
        return linear_attention(**arguments, **options, segment_ids=ids)

    def loss(run):
        return lambda arguments: jnp.sum(run(arguments, ids) ** 2)

    local = jax.shard_map(run, mesh=mesh, in_specs=(specs, P("data")), out_specs=P("data"))
    got = jax.jit(jax.grad(loss(local)))(arguments)  # also sums the gradient of a replicated decay over the shards
    want = jax.grad(loss(run))(arguments)
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-5), got, want)


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_sharded_arrays_are_accepted(kind):
    arguments, _ = Case("sharded", 2, 150, decay="token").arguments()
    mesh = jax.make_mesh((1, 1), ("data", "model"), axis_types=(getattr(jax.sharding.AxisType, kind),) * 2)
    want = jax.grad(lambda a: jnp.sum(linear_attention(**a) ** 2))(arguments)
    with jax.set_mesh(mesh):
        placed = jax.tree.map(lambda x: jax.device_put(x, P("data", None, "model")), arguments)
        got = jax.jit(jax.grad(lambda a: jnp.sum(linear_attention(**a) ** 2)))(placed)
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-5), got, want)
