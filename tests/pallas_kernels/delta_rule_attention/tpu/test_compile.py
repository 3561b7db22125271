"""The TPU kernels, compiled by the TPU compiler for every generation."""

import itertools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import delta_rule_attention, partition
from tests.pallas_kernels.quick import joined, quick
from tests.pallas_kernels.tpu_compile import TOPOLOGIES, compile_for, kernels_of, mesh, needs_tpu_compiler, shape

pytestmark = needs_tpu_compiler


def arguments(size: int, dtype=jnp.bfloat16, length: int = 1000, heads: int = 2, **extra):
    q = shape((2, length, heads, size), dtype)
    return {"q": q, "k": q, "v": q, "beta": shape((2, length, heads), jnp.float32)} | extra


def gradients(arguments):
    def loss(arguments):
        outputs = delta_rule_attention(**arguments, return_state=True)
        return sum(jnp.sum(x.astype(jnp.float32)) for x in outputs)

    return jax.grad(loss)(arguments)


@pytest.mark.parametrize(
    ("topology", "size"), quick(itertools.product(TOPOLOGIES, (64, 128, 256)), ("v5e-64", "v6e-128"), joined)
)
def test_forward_and_backward(topology, size):
    options = {"log_decay": shape((2, 1000, 2), jnp.float32)} if size != 64 else {}
    assert kernels_of(compile_for(topology, gradients, arguments(size, **options))) == 2


@pytest.mark.slow
def test_every_option_in_float32():
    extra = {
        "log_decay": shape((2,), jnp.float32),
        "scale": shape((), jnp.float32),
        "initial_state": shape((2, 2, 128, 128), jnp.float32),
    }
    compiled = compile_for("v5e", gradients, arguments(128, jnp.float32, **extra))
    assert kernels_of(compiled) == 2


def test_prediction_is_one_kernel_that_keeps_no_states():
    compiled = compile_for("v6e", lambda a: delta_rule_attention(**a), arguments(128))
    assert kernels_of(compiled) == 1
    assert compiled.memory_analysis().temp_size_in_bytes < 2**20


def test_batch_and_heads_are_cut_without_communication():
    devices = mesh("v5p", data=2, model=2)
    cut = NamedSharding(devices, P("data", None, "model"))
    placed = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=cut), arguments(128, heads=4, length=256)
    )
    with jax.set_mesh(devices), partition.mesh_axes(batch="data", heads="model"):
        text = compile_for("v5p", gradients, placed, mesh=devices).as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 2
    assert not any(name in text for name in ("all-gather", "all-to-all", "all-reduce", "collective-permute"))
