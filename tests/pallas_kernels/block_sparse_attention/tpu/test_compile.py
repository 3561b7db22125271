"""The TPU kernels, compiled by the TPU compiler for every generation."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import partition
from pallas_kernels.block_sparse_attention import block_sparse_attention
from pallas_kernels.block_sparse_attention.cases import SMALL
from pallas_kernels.masks import Causal, Prefix, SlidingWindow
from tests.pallas_kernels.quick import joined, quick
from tests.pallas_kernels.tpu_compile import TOPOLOGIES, compile_for, kernels_of, mesh, needs_tpu_compiler, shape

pytestmark = needs_tpu_compiler
CASES = {case.name: case for case in SMALL}
MASK = SlidingWindow(511, 0) | Prefix(16)


def gradients(q, k, v, **options):
    def loss(q, k, v):
        return jnp.sum(block_sparse_attention(q, k, v, implementation="tpu", **options).astype(jnp.float32))

    return jax.grad(loss, (0, 1, 2))(q, k, v)


@pytest.mark.parametrize(
    ("topology", "size"),
    quick([*((name, 128) for name in TOPOLOGIES), ("v5e", 64), ("v5e", 256)], ("v6e-128",), joined),
)
def test_forward_and_backward(topology, size):
    q, k = shape((2, 3000, 4, size)), shape((2, 3000, 2, size))
    assert kernels_of(compile_for(topology, lambda *a: gradients(*a, mask=MASK), q, k, k)) == 3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["per_head", "segments", "routed_128", "array_mask", "chosen", "decode", "score_mod"])
def test_every_option_in_float32(name):
    case = CASES[name]
    arrays, _ = case.arguments()
    loss = jax.grad(lambda a: jnp.sum(case.call(a, implementation="tpu")[0] ** 2))
    kernels = kernels_of(compile_for("v5e", loss, arrays))
    assert kernels == 3 + (name in ("per_head", "routed_128"))


@pytest.mark.slow
def test_batch_and_heads_are_cut_without_communication():
    devices = mesh("v5p", data=2, model=2)
    cut = NamedSharding(devices, P("data", None, "model"))
    q = jax.ShapeDtypeStruct((2, 1024, 4, 128), jnp.bfloat16, sharding=cut)
    ids = jax.ShapeDtypeStruct((2, 1024), jnp.int32, sharding=NamedSharding(devices, P("data")))

    def run(q, ids):
        return gradients(q, q, q, mask=Causal(), segment_ids=ids)

    with jax.set_mesh(devices), partition.mesh_axes(batch="data", heads="model"):
        text = compile_for("v5p", run, q, ids, mesh=devices).as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 3
    assert not any(name in text for name in ("all-gather", "all-to-all", "all-reduce", "collective-permute"))
