"""What belongs to the op beside its output, against the dense weights; and how it transforms."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from pallas_kernels import block_sparse_attention
from pallas_kernels.array_masks import ArrayMask
from pallas_kernels.block_sparse_attention import (
    Blocks,
    attention_columns,
    attention_weights,
    key_group_lse,
    merge_attention,
    parts,
    transposed_attention,
)
from pallas_kernels.masks import Causal, PerHead, SlidingWindow
from tests.accuracy import relative_rms

MASK = Causal() & ~SlidingWindow(3, 0)  # the first rows see nothing
IDS = np.sort(np.random.default_rng(1).integers(0, 3, (2, 70)), 1)


@pytest.fixture(scope="module")
def qkv():
    rng = np.random.default_rng(0)
    shapes = (2, 70, 4, 8), (2, 70, 2, 8), (2, 70, 2, 8)
    return tuple(jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes)


def close(got, want, bound=2e-6):
    assert relative_rms(np.asarray(got), np.asarray(want)) <= bound


def test_weights_give_the_output(qkv):
    q, k, v = qkv
    options = {"mask": MASK, "segment_ids": IDS, "softcap": 3.0, "sinks": jnp.asarray([0.0, 1.0, -1.0, 2.0])}
    weights = attention_weights(q, k, **options)
    close(jnp.einsum("bhnm,bmhe->bnhe", weights, jnp.repeat(v, 2, 2)), block_sparse_attention(q, k, v, **options))


def test_partial_results_join_to_the_whole(qkv):
    q, k, v = qkv
    bounds = (0, 1, 40, 70)

    def joined(q):
        results = []
        for a, b in itertools.pairwise(bounds):
            own = Causal(-a) & ~SlidingWindow(3 + a, -a)
            results.append(block_sparse_attention(q, k[:, a:b], v[:, a:b], mask=own, return_lse=True))
        return merge_attention(results)

    (y, lse), (want, want_lse) = joined(q), block_sparse_attention(q, k, v, mask=MASK, return_lse=True)
    close(y, want)
    np.testing.assert_allclose(lse, want_lse, rtol=1e-5)
    assert (np.asarray(lse[:, :4]) == -np.inf).all() and not np.asarray(y[:, :4]).any()
    got, want = (jax.grad(lambda q, f=f: jnp.sum(jnp.sin(f(q))))(q) for f in
                 (lambda q: joined(q)[0], lambda q: block_sparse_attention(q, k, v, mask=MASK)))  # fmt: skip
    close(got, want, 4e-6)


def test_columns_and_transposed_weights(qkv):
    q, k, v = qkv
    options = {"mask": MASK, "segment_ids": IDS, "bias": jnp.sin(jnp.arange(140.0)).reshape(1, 2, 1, 70)}
    weights = attention_weights(q, k, **options)
    _, lse = block_sparse_attention(q, k, v, return_lse=True, **options)
    columns = jnp.asarray([3, 69, 0])
    close(attention_columns(q, k, lse, columns, **options), weights[..., columns])
    x = jnp.repeat(v, 2, 2)
    close(transposed_attention(q, k, x, lse, **options), jnp.einsum("bhnm,bnhe->bmhe", weights, x))


@pytest.mark.parametrize("groups", [20, "ids"])
def test_lse_of_key_groups(qkv, groups, monkeypatch):
    q, k, _ = qkv
    monkeypatch.setattr(parts, "KEYS_TOGETHER", 32)
    options = {"mask": PerHead((MASK, Causal(), MASK, ~Causal()))}
    ids = np.broadcast_to(np.arange(70) // 20 if groups == 20 else np.arange(70) * 7 % 5, (2, 70))
    num_groups = int(ids.max()) + 1
    weights = attention_weights(q, k, **options)
    _, lse = block_sparse_attention(q, k, k, return_lse=True, **options)
    shares = jnp.stack([(weights * (ids == s)[:, None, None]).sum(-1) for s in range(num_groups)], -1)
    got = key_group_lse(q, k, groups if groups == 20 else jnp.asarray(ids), num_groups=num_groups, **options)
    close(jnp.exp(got - jnp.where(lse == -jnp.inf, 0, lse).swapaxes(1, 2)[..., None]), shares)
    assert np.isfinite(jax.grad(lambda q: jnp.exp(key_group_lse(q, k, 20, **options)).sum())(q)).all()


def test_routing_is_traced_and_the_cost_follows_the_counts(qkv):
    q, k, v = qkv

    @jax.jit
    def routed(q, k, v, few):
        scores = jnp.einsum("binhd,bjmgd->bhij", q.reshape(2, 7, 10, 4, 8), k.reshape(2, 7, 10, 2, 8))
        blocks = Blocks.from_indices(jax.lax.top_k(scores, 3)[1], 10, 10, valid=jnp.arange(3) < few)
        return block_sparse_attention(q, k, v, blocks=blocks), blocks.counts.sum()

    for few in (0, 2, 3):
        y, visited = routed(q, k, v, few)
        assert visited == few * 7 * 2 * 4
        assert bool(jnp.any(y)) == (few > 0)
    indices = jnp.asarray([[[[4, -1, 2, 4]]]])
    blocks = Blocks.from_indices(indices, 8, 8)
    assert (blocks.counts.tolist(), blocks.indices[0, 0, 0, :2].tolist()) == ([[[2]]], [2, 4])


def test_vmap_and_remat(qkv):
    q, k, v = qkv

    def f(q, k, v, ids):
        return block_sparse_attention(q[None], k[None], v[None], mask=MASK, segment_ids=ids[None])[0]

    whole = block_sparse_attention(q, k, v, mask=MASK, segment_ids=IDS)
    close(jax.vmap(f)(q, k, v, jnp.asarray(IDS)), whole)
    loss = lambda q: jnp.sum(jax.checkpoint(block_sparse_attention)(q, k, v) ** 2)  # noqa: E731
    close(jax.grad(loss)(q), jax.grad(lambda q: jnp.sum(block_sparse_attention(q, k, v) ** 2))(q), 4e-6)


@pytest.mark.slow
def test_inside_shard_map(qkv):
    q, k, v = qkv
    mesh = jax.make_mesh((1,), ("data",), (jax.sharding.AxisType.Auto,))
    bias = jnp.cos(jnp.arange(70.0)).reshape(1, 1, 1, 70)

    def f(q, k, v, ids, bias):
        options = {"mask": MASK & ArrayMask(_below, (ids[:, None],)), "segment_ids": ids, "bias": bias}
        return block_sparse_attention(q, k, v, **options)

    parts = (P("data"),) * 4 + (P(),)
    sharded = jax.shard_map(f, mesh=mesh, in_specs=parts, out_specs=P("data"))
    ids = jnp.asarray(IDS)
    got, want = (jax.grad(lambda bias, g=g: jnp.sum(g(q, k, v, ids, bias) ** 2))(bias) for g in (sharded, f))
    close(got, want, 4e-6)


def _below(i, j, kind):
    return j - i <= kind
