"""Attention to a cache in pages is attention to its keys in order."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import block_sparse_attention
from pallas_kernels.array_masks import ArrayMask
from pallas_kernels.block_sparse_attention import Blocks, paged_attention, xla
from tests.accuracy import relative_rms

B, N, H, G, D, S, W, P = 3, 2, 4, 2, 8, 16, 5, 11
LENGTHS = np.array([70, 1, 33])


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal(shape) for shape in ((B, N, H, D), (P, S, G, D), (P, S, G, D)))
    table = rng.integers(0, P, (B, W))
    return (*(jnp.asarray(x, jnp.float32) for x in (q, k, v)), jnp.asarray(table, jnp.int32))


def below(i, j, until):
    return j < until


def in_order(q, key_pages, value_pages, table, lengths, blocks=None):
    k, v = (x[table].reshape(B, W * S, G, D) for x in (key_pages, value_pages))
    until = jnp.asarray(lengths).reshape(B, -1, 1) + jnp.arange(1 - N, 1)
    return block_sparse_attention(q, k, v, mask=ArrayMask(below, (until,)), blocks=blocks, return_lse=True)


@pytest.mark.parametrize(("per_head", "splits"), [(False, None), (True, None), (True, 3), (True, 7)])
def test_equals_keys_in_order(arrays, per_head, splits):
    *floats, table = arrays
    lengths = np.stack([LENGTHS, LENGTHS // 2, LENGTHS, LENGTHS + 3], 1) if per_head else LENGTHS
    visible = jnp.asarray(np.random.default_rng(1).random((B, 1, 1, W)) < 0.7)
    blocks = Blocks.from_booleans(visible, N, S) if per_head else None

    def evaluated(f):
        def loss(q, k, v):
            y, lse = f(q, k, v)
            return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.where(lse == -jnp.inf, 0, lse)), y

        return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(*floats)

    options = {"blocks": blocks, "splits": splits, "return_lse": True}
    got = evaluated(lambda q, k, v: paged_attention(q, k, v, table, lengths, **options))
    want = evaluated(lambda q, k, v: in_order(q, k, v, table, lengths, blocks))
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert relative_rms(np.asarray(g), np.asarray(w)) <= 4e-6


@pytest.mark.slow
def test_splits_without_keys_count_nothing(arrays):
    q, k, v, table = arrays
    lengths = np.array([0, 1, 80])  # the first element has no keys, and most of its splits no step
    want, want_lse = paged_attention(q, k, v, table, lengths, causal=False, splits=1, return_lse=True)
    for splits in (2, 5, 64):
        y, lse = paged_attention(q, k, v, table, lengths, causal=False, splits=splits, return_lse=True)
        assert relative_rms(np.asarray(y), np.asarray(want)) <= 1e-6
        np.testing.assert_allclose(lse, want_lse, rtol=1e-6)
        assert not np.asarray(y[0]).any() and (np.asarray(lse[0]) == -np.inf).all()


def test_a_contiguous_cache_is_split_by_size(monkeypatch):
    rng, found = np.random.default_rng(2), []
    q, k, v = (jnp.asarray(rng.standard_normal((B, n, h, D)), jnp.float32) for n, h in ((N, H), (640, G), (640, G)))
    until = jnp.asarray([[640, 3, 0, 77], [1, 639, 64, 128], [500, 500, 129, 2]])[..., None] + jnp.arange(N)
    original = xla.splits_of
    monkeypatch.setattr(xla, "splits_of", lambda *a: found.append(original(*a)) or found[-1])

    def evaluated(implementation):
        def loss(q, k, v):
            options = {"mask": ArrayMask(below, (until,)), "return_lse": True, "implementation": implementation}
            y, lse = block_sparse_attention(q, k, v, **options)
            return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.where(lse == -jnp.inf, 0, lse)), y

        return jax.tree.leaves(jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(q, k, v))

    for got, want in zip(evaluated("xla"), evaluated("reference"), strict=True):
        assert relative_rms(np.asarray(got), np.asarray(want)) <= 4e-6
    assert min(found) > 1
    many = xla.Layout(1, 4096, 4096, 1, 1, 128, 128)
    assert original(many, 1024) == 1  # what is no decoding


def test_pages_behind_the_length_are_not_read(arrays):
    q, k, v, table = arrays
    used = {int(page) for row, length in zip(table, LENGTHS, strict=True) for page in row[: -(-length // S)]}
    unused = jnp.asarray([page not in used for page in range(P)])[:, None, None, None]
    assert unused.any()
    y = paged_attention(q, jnp.where(unused, jnp.nan, k), jnp.where(unused, jnp.nan, v), table, LENGTHS)
    assert np.isfinite(y).all()


def test_what_a_step_holds_does_not_grow_with_the_pool():
    def bytes_of(pages):
        arrays = [jax.ShapeDtypeStruct(x, jnp.float32) for x in ((B, 1, H, 64), *[(pages, 64, G, 64)] * 2)]
        lengths = jax.ShapeDtypeStruct((B,), jnp.int32)
        call = functools.partial(paged_attention, splits=1)
        compiled = jax.jit(call).lower(*arrays, jax.ShapeDtypeStruct((B, 16), jnp.int32), lengths).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    small, large = bytes_of(64), bytes_of(1024)
    pool = 1024 * 64 * G * 64 * 4
    assert 0 < small == large < pool / 4


def test_refusals(arrays):
    q, k, v, table = arrays
    with pytest.raises(ValueError, match=r"page_table must be integers \(3, W\)"):
        paged_attention(q, k, v, table[:2], LENGTHS)
    with pytest.raises(ValueError, match=r"lengths must be integers \(3,\) or \(3, 4\)"):
        paged_attention(q, k, v, table, LENGTHS[:2])
    with pytest.raises(ValueError, match=r"blocks must have block sizes \(2, 16\), got 2 and 8"):
        paged_attention(q, k, v, table, LENGTHS, blocks=Blocks.from_booleans(jnp.ones((1, 1, 1, 10), bool), 2, 8))
    with pytest.raises(ValueError, match="splits must be at least 1, got 0"):
        paged_attention(q, k, v, table, LENGTHS, splits=0)
