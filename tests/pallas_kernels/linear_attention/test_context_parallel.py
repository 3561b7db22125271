"""One sequence over many devices. What needs eight devices is in on_eight_devices/context_parallel.py."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import dispatch, linear_attention
from tests.pallas_kernels import eight_devices
from tests.pallas_kernels.tpu_compile import compile_for, mesh, needs_tpu_compiler

X = jnp.ones((1, 8, 2, 4))
ONE = jax.make_mesh((1,), ("seq",), axis_types=(jax.sharding.AxisType.Auto,))


@pytest.mark.slow
def test_on_eight_devices():
    eight_devices.passes(pathlib.Path(__file__).parents[1] / "on_eight_devices" / "context_parallel.py")


def over_one_device(**options):
    call = jax.shard_map(
        lambda x: linear_attention(x, x, x, axis_name="seq", **options),
        mesh=ONE,
        in_specs=P(None, "seq"),
        out_specs=P(None, "seq"),
    )
    return call(X)


@pytest.mark.parametrize("causal", [True, False])
def test_one_device_is_a_sequence_too(causal):
    np.testing.assert_allclose(over_one_device(causal=causal), linear_attention(X, X, X, causal=causal), rtol=1e-6)


def test_refusals():
    with pytest.raises(ValueError, match="axis_name='seq' must be an axis of a jax"):
        linear_attention(X, X, X, axis_name="seq")
    with pytest.raises(TypeError, match="axis_name must be the name of one axis or None, got 3"):
        linear_attention(X, X, X, axis_name=3)
    with pytest.raises(ValueError, match="segment_ids must be None when causal=False with axis_name"):
        over_one_device(causal=False, segment_ids=jnp.zeros((1, 8), int))
    with pytest.raises(dispatch.UnsupportedError, match="'reference' refuses causal=False with axis_name"):
        over_one_device(causal=False, implementation="reference")
    with pytest.raises(dispatch.UnsupportedError, match="implementation='reference' refuses: it has no chunks"):
        over_one_device(chunk_size=4, implementation="reference")


# Every exchange of 64 shards: one state from 1, 1, 2, 4, 8, 16 and 32 shards before, and its decay.
@pytest.mark.slow
@needs_tpu_compiler
@pytest.mark.parametrize("implementation", ["xla", "tpu"])
def test_a_pod_exchanges_states_alone(implementation):
    pod = mesh("v5p:4x4x4", seq=64)
    cut = NamedSharding(pod, P(None, "seq"))

    def loss(q, k, v, g):
        def local(q, k, v, g):
            return linear_attention(q, k, v, log_decay=g, axis_name="seq", implementation=implementation)

        y = jax.shard_map(local, mesh=pod, in_specs=P(None, "seq"), out_specs=P(None, "seq"))(q, k, v, g)
        return jnp.sum(y.astype(jnp.float32) ** 2)

    sent = {}
    for length in (16384, 65536):
        tokens = jax.ShapeDtypeStruct((1, length, 8, 64), jnp.bfloat16, sharding=cut)
        decay = jax.ShapeDtypeStruct((1, length, 8), jnp.float32, sharding=cut)
        compiled = compile_for("v5p:4x4x4", jax.grad(loss, argnums=(0, 1, 2, 3)), *(tokens,) * 3, decay, mesh=pod)
        sent[length] = eight_devices.collectives(compiled)
    assert sent[16384] == sent[65536]
    assert {kind for kind, _ in sent[65536]} == {"collective-permute"}
    assert max(int(np.prod(shape)) for _, shape in sent[65536]) == 8 * 64 * 64
