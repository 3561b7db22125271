"""Attention cut over eight devices is attention of one; a file of its own process, as eight_devices.py says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from attnlab.nn.sharded_attention import sharded_attention
from tests.accuracy import relative_rms
from tests.pallas_kernels.eight_devices import collectives

MESH = jax.make_mesh((2, 4), ("heads", "tokens"), axis_types=(AxisType.Auto,) * 2)
CASES = {
    "heads": {"head_axis": "heads"},
    "tokens": {"token_axis": "tokens", "causal": True},
    "both": {"head_axis": "heads", "token_axis": "tokens"},
    "both_causal": {"head_axis": "heads", "token_axis": "tokens", "causal": True, "order": "zigzag"},
    "exchange": {"head_axis": "heads", "token_axis": "tokens", "causal": True, "method": "all_to_all"},
    "cross": {"head_axis": "heads", "token_axis": "tokens", "keys": 96},
    "causal_cross": {"token_axis": "tokens", "causal": True, "keys": 32},
}


def draw(keys=64):
    rng = np.random.default_rng(0)
    return [rng.standard_normal((2, n, 8, 4)) for n in (64, keys, keys)]


def exact(q, k, v, causal):
    """By definition, in float64."""
    scores = np.einsum("bnhd,bmhd->bhnm", q, k) / q.shape[-1] ** 0.5
    if causal:
        scores = np.where(np.arange(k.shape[1]) <= np.arange(q.shape[1])[:, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("bhnm,bmhe->bnhe", weights, v)


@pytest.mark.parametrize("name", CASES)
def test_equals_one_device(name):
    options = dict(CASES[name])
    arrays = draw(options.pop("keys", 64))
    cut = P(None, options.get("token_axis"), options.get("head_axis"))
    parts = [jax.device_put(jnp.asarray(x, jnp.float32), NamedSharding(MESH, cut)) for x in arrays]

    def loss(run):
        return lambda *a: jnp.sum(jnp.sin(run(*a)))

    def whole(q, k, v):
        return sharded_attention(q, k, v, mesh=MESH, causal=options.get("causal", False))

    def in_parts(q, k, v):
        return sharded_attention(q, k, v, mesh=MESH, **options)

    got = jax.jit(in_parts)(*parts)
    assert got.sharding.is_equivalent_to(NamedSharding(MESH, cut), 4)
    assert np.abs(np.asarray(got) - exact(*arrays, options.get("causal", False))).max() < 1e-5
    gradients = jax.jit(jax.grad(loss(in_parts), (0, 1, 2)))(*parts)
    wanted = jax.jit(jax.grad(loss(whole), (0, 1, 2)))(*(jnp.asarray(x, jnp.float32) for x in arrays))
    for one, other in zip(gradients, wanted, strict=True):
        assert relative_rms(np.asarray(one), np.asarray(other)) < 1e-4


def compiled(tokens, **options):
    cut = NamedSharding(MESH, P(None, options.get("token_axis"), options.get("head_axis")))
    array = jax.ShapeDtypeStruct((1, tokens, 8, 16), jnp.float32, sharding=cut)
    run = jax.jit(lambda q, k, v: sharded_attention(q, k, v, mesh=MESH, **options))
    return run.lower(array, array, array).compile()


def test_cut_by_heads_nothing_is_sent_and_in_a_ring_keys_and_values():
    assert not collectives(compiled(64, head_axis="heads"))
    for order in ("contiguous", "zigzag"):
        found = collectives(compiled(64, token_axis="tokens", head_axis="heads", causal=True, order=order))
        assert {kind for kind, _ in found} == {"collective-permute"}


def test_a_device_needs_its_share_of_the_memory():
    sizes = []
    for options in ({}, {"token_axis": "tokens", "head_axis": "heads"}):
        memory = compiled(4096, **options).memory_analysis()
        sizes.append(memory.argument_size_in_bytes + memory.output_size_in_bytes)
    assert sizes[1] * 8 <= sizes[0] * 1.01
