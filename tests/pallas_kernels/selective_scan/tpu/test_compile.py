"""The TPU kernels, compiled by the TPU compiler for every generation."""

import itertools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import partition, selective_scan
from tests.pallas_kernels.quick import joined, quick
from tests.pallas_kernels.tpu_compile import TOPOLOGIES, compile_for, kernels_of, mesh, needs_tpu_compiler, shape

pytestmark = needs_tpu_compiler


def arguments(channels: int, dtype=jnp.bfloat16, length: int = 1000, size: int = 16, groups: int = 1):
    x, b, wide = shape((2, length, channels), dtype), shape((2, length, groups, size), dtype), jnp.float32
    vector = shape((channels,), wide)
    given = {"x": x, "delta": x, "a": shape((channels, size), wide), "b": b, "c": b, "gate": x}
    return given | {"skip": vector, "delta_bias": vector, "initial_state": shape((2, channels, size), wide)}


def gradients(arguments, **options):
    def loss(arguments):
        outputs = selective_scan(**arguments, softplus=True, return_state=True, **options)
        return sum(jnp.sum(x.astype(jnp.float32)) for x in outputs)

    return jax.grad(loss)(arguments)


@pytest.mark.parametrize(
    ("topology", "dtype"), quick(itertools.product(TOPOLOGIES, ("bfloat16", "float32")), ("v5e-bfloat16",), joined)
)
def test_forward_and_backward(topology, dtype):
    assert kernels_of(compile_for(topology, gradients, arguments(512, jnp.dtype(dtype)))) == 2


@pytest.mark.slow
def test_segments_groups_and_short_sequences():
    ids = jnp.zeros((2, 100), jnp.int32)
    options = arguments(24, jnp.float32, 100, 5, 4)
    assert kernels_of(compile_for("v6e", lambda a: gradients(a, segment_ids=ids), options)) == 2


def test_prediction_is_one_kernel_that_keeps_no_states():
    compiled = compile_for("v6e", lambda a: selective_scan(**a, softplus=True), arguments(512, length=4096))
    assert kernels_of(compiled) == 1
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * 2**20  # b and c, with tokens in lanes


@pytest.mark.slow
def test_batch_and_channels_are_cut_without_gathering():
    devices = mesh("v5p", data=2, model=2)
    names = {"a": P("model"), "skip": P("model"), "delta_bias": P("model"), "initial_state": P("data", "model")}
    names |= dict.fromkeys(("b", "c"), P("data")) | dict.fromkeys(("x", "delta", "gate"), P("data", None, "model"))
    placed = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(devices, names[name]))
        for name, x in arguments(512, length=256).items()
    }
    with jax.set_mesh(devices), partition.mesh_axes(batch="data", heads="model"):
        text = compile_for("v5p", gradients, placed, mesh=devices).as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 2
    assert not any(name in text for name in ("all-gather", "all-to-all", "collective-permute"))
