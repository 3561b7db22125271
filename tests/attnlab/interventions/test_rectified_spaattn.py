"""Rectified sparse attention: the paper's claim, where it is full attention, blocks beside each other, and its cost."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import Layout, UnsupportedArgument
from attnlab.attention.dense.softmax_attention import SoftmaxAttention
from attnlab.interventions.rectified_spaattn import RectifiedCore, block_neighbours, rectified_sparse_attention
from attnlab.nn.dense_mixer import with_core
from attnlab.nn.scans import scan_order
from attnlab.nn.softmax import softmax_attention
from tests.accuracy import relative_rms
from tests.attnlab.attention.sparse_cost import check_growth, temporaries, visited_pairs


def draw(*shape, count=3, seed=0):
    return tuple(np.random.default_rng(seed + i).standard_normal(shape).astype(np.float32) for i in range(count))


def test_rectified_is_nearer_to_full_attention():
    """The paper's claim, at a density of 25 %: plain block-sparse, its share alone, and with what means estimate."""
    seeds, blocks, size = 40, 16, 8
    shared, own = draw(seeds, blocks, 1, 2, 8), draw(seeds, blocks, size, 2, 8, seed=5)
    q, k, v = ((a + 0.5 * b).reshape(seeds, -1, 2, 8) for a, b in zip(shared, own, strict=True))

    @jax.jit
    def results(q, k, v):
        found = rectified_sparse_attention(q, k, v, block_q=size, block_k=size, top_k=4, share=0.0)
        seen = found.critical.repeat(size, 2).repeat(size, 3)
        plain = softmax_attention(q, k, v, mask=seen)
        kept = jnp.where(found.critical | ~found.gain, found.probabilities, 0).sum(-1).repeat(size, 2)
        return found.critical, softmax_attention(q, k, v), plain, plain * jnp.moveaxis(kept, 1, 2)[..., None], found.y

    critical, full, *rest = results(q, k, v)
    assert (critical.sum(-1) == 4).all()
    plain, share, whole = (np.sqrt(np.square(np.asarray(y - full)).sum((1, 2, 3))) for y in rest)
    assert (whole < plain).mean() >= 0.95
    assert (whole < share).mean() >= 0.95


@pytest.mark.slow
def test_text_that_is_padding_is_not_there():
    q, k, v = draw(2, 40, 2, 4)
    options = {"block_q": 8, "block_k": 8, "top_k": 1, "share": 0.3}

    @jax.jit
    def results(q, k, v):
        short = [a[:, :21] for a in (q, k, v)]
        padded = rectified_sparse_attention(q, k, v, text_slots=24, num_text=jnp.array([5, 24]), **options)
        alone = rectified_sparse_attention(*short, text_slots=5, **options)
        all_blocks = rectified_sparse_attention(q, k, v, text_slots=24, **(options | {"share": 1.0}))
        return padded.y, alone.y, all_blocks.y, softmax_attention(q, k, v)

    padded, alone, all_blocks, full = results(q, k, v)
    assert relative_rms(padded[0, :21], alone[0]) < 1e-6
    assert not padded[0, 21:].any()
    # What means give text as its share is an estimate: its own rows are exact.
    assert relative_rms(all_blocks[:, 16:], full[:, 16:]) < 1e-6
    assert relative_rms(all_blocks[:, :16], full[:, :16]) < 1e-6


def test_blocks_beside_each_other():
    grid, size = (3, 4, 5), 7
    order = scan_order("gilbert", grid)
    places = np.stack(np.unravel_index(order, grid), -1)
    wanted = np.zeros((9, 9), bool)
    for a, b in itertools.product(range(60), repeat=2):
        if np.abs(places[a] - places[b]).max() <= 1:
            wanted[a // size, b // size] = True
    np.testing.assert_array_equal(block_neighbours(order, grid, size), wanted)
    assert not wanted.all()
    assert block_neighbours(order, grid, size, 20).shape == (9, 3)


def test_a_core_that_leaves_nothing_out_is_softmax():
    mixer = SoftmaxAttention(8, num_heads=2, layout=Layout.VIDEO, rotary=100.0, rngs=nnx.Rngs(0))
    options = {"grid": (2, 3, 4), "block_size": 4}
    whole = with_core(mixer, lambda core: RectifiedCore.of(core, **options, drop_rate=0.0))
    near = with_core(
        mixer, lambda core: RectifiedCore.of(core, **options, with_neighbours=True, first_frame=True, drop_rate=1.0)
    )
    x = draw(2, 2, 3, 4, 8)[0]
    got, some, want = jax.jit(lambda x: (whole(x), near(x), mixer(x)))(x)
    assert relative_rms(got, want) < 1e-6
    assert 1e-3 < relative_rms(some, want) < 1
    with pytest.raises(UnsupportedArgument, match="mask"):
        whole(x, mask=np.ones((2, 24), bool))
    with pytest.raises(ValueError, match="24 tokens of the grid"):
        whole(draw(1, 2, 3, 5, 8)[0])
    with pytest.raises(ValueError, match="must be a SoftmaxCore"):
        with_core(whole, lambda core: RectifiedCore.of(core, **options))


def attend(q, k, v):
    return rectified_sparse_attention(q, k, v, block_q=64, block_k=64, top_k=3, share=0.0).y


def test_tiles_that_are_visited_grow_as_declared():
    sizes = (512, 1024)
    visited = [visited_pairs(attend, *draw(1, n, 2, 4)) for n in sizes]
    assert visited == [2 * n * 3 * 64 for n in sizes]


@pytest.mark.slow
def test_memory_grows_as_declared():
    sizes = (2048, 4096)
    shapes = [(jax.ShapeDtypeStruct((1, n, 2, 32), np.float32),) * 3 for n in sizes]
    check_growth([temporaries(attend, *shape) for shape in shapes], [n * 32 + (n / 64) ** 2 for n in sizes])
