"""MoBA and VMoBA: their choices in plain NumPy, what they visit, and where they are full attention."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import Layout, UnsupportedArgument
from attnlab.attention.sparse.moba import ChosenChunkCore, ChunkCache, MixtureOfBlockAttention, moba_attention
from attnlab.attention.sparse.vmoba import block_order, choose_blocks, vmoba_attention
from attnlab.models.language_model import LanguageModel
from attnlab.nn.chosen_blocks import paired_table
from attnlab.nn.dense_mixer import with_core
from attnlab.nn.softmax import attention_weights, softmax_attention
from tests.accuracy import relative_rms
from tests.attnlab.attention.sparse_cost import check_growth, temporaries, visited_pairs

POOLS = ("query_head", "head_global", "overall", "block")


def draw(*shape, seed=0):
    return tuple(np.random.default_rng(seed + i).standard_normal(shape).astype(np.float32) for i in range(3))


def plain_moba(q, k, v, size, topk):
    """One sequence, query by query."""
    y = np.zeros(v.shape)
    for h, i in np.ndindex(q.shape[1], q.shape[0]):
        own = i // size
        gates = [q[i, h] @ k[s * size : (s + 1) * size, h].mean(0) for s in range(own)]
        chunks = [*np.argsort(gates)[::-1][: topk - 1], own]
        seen = [t for s in chunks for t in range(s * size, min((s + 1) * size, i + 1))]
        weights = np.exp(k[seen, h] @ q[i, h] / np.sqrt(q.shape[-1]))
        y[i, h] = weights / weights.sum() @ v[seen, h]
    return y


def test_packed_sequences_with_padding_choose_as_alone():
    q, k, v = draw(1, 40, 2, 4)
    ids = np.repeat([0, 1, 2], (7, 22, 11))[None]
    real = np.ones((1, 40), bool)
    real[0, [9, 10, 17, 30]] = False
    y = np.asarray(jax.jit(lambda *x: moba_attention(*x, chunk_size=4, topk=3, segment_ids=ids, mask=real))(q, k, v))
    for segment in range(3):
        part = np.flatnonzero((ids[0] == segment) & real[0])
        assert relative_rms(y[0, part], plain_moba(*(a[0, part] for a in (q, k, v)), 4, 3)) < 1e-6


def test_all_chunks_chosen_is_full_attention():
    options = {"grid": (21,), "block": 4, "select_mode": "topk"}

    @jax.jit
    def pairs(q, k, v):
        full, part = softmax_attention(q, k, v), [a[:, :4] for a in (q, k, v)]
        own = vmoba_attention(q, k, v, **options, topk=1)
        return [
            (moba_attention(q, k, v, chunk_size=4, topk=9), softmax_attention(q, k, v, causal=True)),
            (vmoba_attention(q, k, v, **options, topk=9), full),
            (vmoba_attention(q, k, v, **options, topk=1, full_fallback=True), full),
            (own[:, :4], softmax_attention(*part)),
        ]

    for got, want in pairs(*draw(2, 21, 2, 4)):
        assert relative_rms(got, want) < 1e-6


def test_blocks_of_one_two_and_three_axes():
    grid = (2, 4, 6)
    places = np.arange(48).reshape(grid)
    for block, wanted in ((0.5, places.reshape(4, 12)), ((4, 3), None), ((1, 2, 3), None)):
        order, ids = block_order(grid, block)
        if wanted is None:
            t, h, w = (2, *block) if len(block) == 2 else block
            cut = places.reshape(2 // t, t, 4 // h, h, 6 // w, w).transpose(0, 2, 4, 1, 3, 5)
            wanted = cut.reshape(-1, t * h * w)
        np.testing.assert_array_equal(order.reshape(wanted.shape), wanted)
        np.testing.assert_array_equal(ids, np.repeat(np.arange(len(wanted)), wanted.shape[1]))
    for grid, block in (((4, 4), (2, 2, 2)), ((9,), (3, 3)), ((9,), 0)):
        with pytest.raises(ValueError, match="block must be"):
            block_order(grid, block)


def test_pools_keep_their_budget_and_examples_apart():
    """Of two examples, one with four tokens that do not exist, whose choices are as if it were alone without them."""
    scores = np.random.default_rng(0).standard_normal((2, 2, 12, 4)).astype(np.float32)
    ids = np.repeat(np.arange(4), 3)[None].repeat(2, 0)
    ids[0, 9:] = -1
    own = (ids[..., None] == np.arange(4))[:, None]
    there = (ids >= 0)[:, None, :, None] & (np.arange(4) <= ids.max(1)[:, None])[:, None, None]
    common = {"topk": 2, "threshold": 0.5}

    def tables(scores, own, there):
        found = {}
        for mode, pools in (("topk", POOLS[:3]), ("threshold", POOLS)):
            for pool in pools:
                rows, blocks, table = choose_blocks(scores, own, there, select_mode=mode, pool=pool, **common)
                found[mode, pool] = paired_table(rows, blocks, *scores.shape[2:]) if table is None else table
        return found

    both = jax.jit(tables)(scores, own, there)
    alone = jax.jit(tables)(scores[:1, :, :9, :3], own[:1, :, :9, :3], there[:1, :, :9, :3])
    for (mode, pool), table in both.items():
        np.testing.assert_array_equal(table[0, :, :9, :3], alone[mode, pool][0], err_msg=f"{mode} {pool}")
        assert not table[0, :, 9:].any()
        assert not (table & own).any()
        if mode == "topk":
            assert table[1].sum() == 2 * 12
            assert (table[1].sum(-1) == 1).all() == (pool == "query_head")
        else:
            axes = {"query_head": -1, "head_global": (-2, -1), "block": (-3, -2), "overall": (-3, -2, -1)}[pool]
            assert table[1].any(axes).all(), "every pool keeps one"


def test_boxes_find_more_of_the_mass_than_runs_of_frames():
    """Of a smooth field, at one budget: blocks that are compact in all axes against those along one."""
    grid, rng = (4, 8, 8), np.random.default_rng(0)
    field = rng.standard_normal((4, *grid, 8))
    for axis in (1, 2, 3):
        field = field + np.roll(field, 1, axis) + np.roll(field, -1, axis)
    q = k = jnp.asarray((field / field.std()).reshape(4, 256, 1, 8), jnp.float32)
    eye = jnp.eye(256)[None, :, None].repeat(4, 0)
    options = {"grid": grid, "select_mode": "topk", "topk": 3}

    @jax.jit
    def recall(q, k, eye):
        mass = attention_weights(q, k)[:, 0]
        found = [vmoba_attention(q, k, eye, block=block, **options)[:, :, 0] > 0 for block in ((2, 4, 4), 0.5)]
        return [(mass * one).sum() / (4 * 256) for one in found]

    boxes, runs = recall(q, k, eye)
    assert boxes > runs + 0.02


def test_cores_are_exchanged():
    model = LanguageModel(7, features=8, depth=2, num_heads=2, rngs=nnx.Rngs(0))
    sparse = with_core(model, ChosenChunkCore(chunk_size=2, topk=2), layers=[1])
    ids = jnp.zeros((2, 8), jnp.int32)
    state = jax.eval_shape(lambda ids: sparse.prefill(ids, sparse.init_state(2, 8))[1], ids)
    assert isinstance(state.mixers[1], ChunkCache)
    with pytest.raises(UnsupportedArgument, match="got mask of shape"):
        jax.eval_shape(lambda ids: sparse(ids, mask=np.ones((1, 1, 8, 8), bool)), ids)


def test_options_that_are_not_there():
    with pytest.raises(ValueError, match="pool must be one of query_head, head_global, overall"):
        vmoba_attention(*draw(1, 4, 1, 2), grid=(4,), block=2, select_mode="topk", pool="block")
    with pytest.raises(ValueError, match="chunk_size and topk"):
        moba_attention(*draw(1, 4, 1, 2), chunk_size=2, topk=0)
    with pytest.raises(ValueError, match="4 tokens of the grid"):
        vmoba_attention(*draw(1, 5, 1, 2), grid=(4,), block=2)
    with pytest.raises(UnsupportedArgument, match="causal self-attention"):
        MixtureOfBlockAttention(8, num_heads=2, layout=Layout.IMAGE, rngs=nnx.Rngs(0))


def moba(n):
    return lambda *x: moba_attention(*x, chunk_size=64, topk=3)


def video(n):
    return lambda *x: vmoba_attention(*x, grid=(n,), block=64, select_mode="topk", topk=3, pool="head_global")


@pytest.mark.parametrize("attend", [moba, video])
def test_tiles_that_are_visited_grow_as_declared(attend):
    """Of random queries, whose choices are scattered: neighbours together choose nearly everything."""
    sizes = (1024, 2048)
    visited = [visited_pairs(attend(n), *draw(1, n, 1, 4)) for n in sizes]
    check_growth(visited, sizes, 1.05)
    assert visited[1] < 0.3 * 2048**2


def test_a_step_visits_as_many_chunks_at_any_length():
    mixer = MixtureOfBlockAttention(4, num_heads=1, chunk_size=4, topk=3, rngs=nnx.Rngs(0))
    visited = []
    for n in (32, 64):
        state, length = mixer.init_state(1, n), jnp.full((1,), n - 1)
        state = ChunkCache(*(dataclasses.replace(part, length=length) for part in (state.tokens, state.means)))
        visited.append(visited_pairs(mixer.step, np.ones((1, 4), np.float32), state))
    assert visited == [3 * 4] * 2


@pytest.mark.slow
@pytest.mark.parametrize("attend", [moba, video])
def test_memory_grows_as_declared(attend):
    sizes = (2048, 4096)
    shapes = [(jax.ShapeDtypeStruct((1, n, 1, 32), np.float32),) * 3 for n in sizes]
    measured = [temporaries(attend(n), *shape) for n, shape in zip(sizes, shapes, strict=True)]
    check_growth(measured, [n * (3 * 64 + n / 64) for n in sizes])
