"""One sequence cut over devices gives what one device does; what devices exchange is read out of the program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import block_sparse_attention
from pallas_kernels.block_sparse_attention import context_parallel_attention, zigzag
from pallas_kernels.masks import Causal, Prefix, SlidingWindow
from tests.accuracy import relative_rms
from tests.pallas_kernels.eight_devices import collectives

DEVICES, LENGTH = 4, 256
MESH = jax.make_mesh((DEVICES,), ("seq",), axis_types=(AxisType.Auto,), devices=jax.devices()[:DEVICES])
SEQ = P(None, "seq")
CASES = {
    "ring": {"method": "ring", "mask": Causal()},
    "ring_zigzag": {"method": "ring", "order": "zigzag", "mask": Causal()},
    "ring_window": {"method": "ring", "order": "zigzag", "mask": SlidingWindow(30, 5) | Prefix(3)},
    "ring_empty_rows": {"method": "ring", "mask": Causal(-20) & ~SlidingWindow(3, 3)},
    "ring_full": {"method": "ring"},
    "all_to_all": {"method": "all_to_all", "mask": Causal() & SlidingWindow(99, 0)},
}


def draw(heads: int = 8, groups: int = 4):
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, LENGTH, n, 16)) for n in (heads, groups, groups))
    return (*(jnp.asarray(x, jnp.float32) for x in (q, k, v)), jnp.asarray(np.sort(rng.integers(0, 3, (2, LENGTH)), 1)))


def in_parts(options, segments: bool):
    def local(q, k, v, ids):
        ids = ids if segments else None
        return context_parallel_attention(q, k, v, "seq", segment_ids=ids, return_lse=True, **options)

    return jax.shard_map(local, mesh=MESH, in_specs=(SEQ,) * 4, out_specs=(SEQ, SEQ))


def evaluated(run, arrays):
    def loss(q, k, v):
        y, lse = run(q, k, v, arrays[3])
        lse = jnp.where(lse == -jnp.inf, 0, lse)
        return jnp.sum(jnp.sin(y) * jnp.cos(jnp.arange(16.0))) + jnp.sum(jnp.sin(lse)), (y, lse)

    return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(*arrays[:3])


@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_equals_one_device(name, segments):
    options, arrays = CASES[name], draw()
    order = zigzag(LENGTH, DEVICES) if options.get("order") == "zigzag" else np.arange(LENGTH)
    back = np.argsort(order)
    run = in_parts(options, segments)
    got = evaluated(lambda *a: tuple(x[:, back] for x in run(*(x[:, order] for x in a))), arrays)

    def whole(q, k, v, ids):
        ids = ids if segments else None
        return block_sparse_attention(q, k, v, mask=options.get("mask"), segment_ids=ids, return_lse=True)

    want = evaluated(whole, arrays)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert relative_rms(np.asarray(g), np.asarray(w)) <= 4e-6


def test_a_ring_sends_keys_and_values_and_nothing_else():
    arrays = draw()
    cut = NamedSharding(MESH, SEQ)
    structs = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=cut) for x in arrays]
    compiled = jax.jit(in_parts(CASES["ring_zigzag"], False)).lower(*structs).compile()
    part = (2, LENGTH // DEVICES, 4, 16)
    assert collectives(compiled) == [("collective-permute", part)] * 2 * (DEVICES - 1)


def test_heads_are_exchanged_for_tokens_and_back():
    cut = NamedSharding(MESH, SEQ)
    structs = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=cut) for x in draw()]
    compiled = jax.jit(in_parts(CASES["all_to_all"], False)).lower(*structs).compile()
    kinds = {kind for kind, _ in collectives(compiled)}
    assert kinds == {"all-to-all"}


def test_what_is_refused():
    q, k, v, ids = draw(heads=4, groups=2)
    with pytest.raises(ValueError, match="the 4 devices divide, got 2"):
        in_parts(CASES["all_to_all"], False)(q, k, v, ids)
    with pytest.raises(ValueError, match="method must be one of ring, all_to_all"):
        in_parts({"method": "tree"}, False)(q, k, v, ids)
    with pytest.raises(ValueError, match="order must be contiguous"):
        in_parts({"method": "all_to_all", "order": "zigzag"}, False)(q, k, v, ids)
