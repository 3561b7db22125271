"""Softmax attention against the formula in float64 NumPy, and against JAX's own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab.attention.dense.softmax_attention import SoftmaxAttention
from attnlab.nn.masking import attention_mask, masked_softmax, segment_positions
from attnlab.nn.softmax import LONG, attention_weights, softmax_attention
from pallas_kernels import dispatch
from pallas_kernels.masks import Causal, Full, Prefix, QueryPrefix, SlidingWindow
from tests.accuracy import relative_rms
from tests.jaxprs import largest_array


def draw(seed, *shapes, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape).astype(dtype) for shape in shapes]


def formula(q, k, v, mask=None, bias=None, scale=None, softcap=None):
    """Loops over batch, heads and queries, in float64; a mask is (B, H, N, M)."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    b, n, h, d = q.shape
    y = np.zeros((b, n, h, v.shape[-1]))
    weights = np.zeros((b, h, n, k.shape[1]))
    for i, j, row in np.ndindex(b, h, n):
        group = j // (h // k.shape[2])
        scores = (d**-0.5 if scale is None else scale) * k[i, :, group] @ q[i, row, j]
        scores = scores if softcap is None else softcap * np.tanh(scores / softcap)
        scores = scores if bias is None else scores + bias[i, j, row]
        seen = np.ones(len(scores), bool) if mask is None else mask[i, j, row]
        if seen.any():
            e = np.where(seen, np.exp(scores - scores[seen].max()), 0)
            weights[i, j, row] = e / e.sum()
            y[i, row, j] = weights[i, j, row] @ v[i, :, group]
    return y, weights


SHAPES = {"multi-head": (4, 4), "grouped": (4, 2), "multi-query": (4, 1)}


@pytest.mark.parametrize("block_size", [None, 3, 7])
@pytest.mark.parametrize("heads", SHAPES.values(), ids=SHAPES)
def test_equals_the_formula_with_everything_at_once(heads, block_size):
    h, g = heads
    q, k, v, bias = draw(0, (2, 6, h, 8), (2, 7, g, 8), (2, 7, g, 5), (2, h, 6, 7))
    rng = np.random.default_rng(1)
    mask = rng.random((2, h, 6, 7)) < 0.7
    mask[0, 1, 2] = False
    causal, band = np.tri(6, 7, dtype=bool), SlidingWindow(4, 4).dense(6, 7)
    options = {
        "bias": bias,
        "mask": mask,
        "causal": True,
        "structural_mask": SlidingWindow(4, 4),
        "scale": 0.6,
        "softcap": 2.0,
    }
    expected, weights = formula(q, k, v, mask & causal & band, bias, 0.6, 2.0)
    assert relative_rms(softmax_attention(q, k, v, **options, block_size=block_size), expected) < 1e-6
    if block_size is None:
        y, mine = softmax_attention(q, k, v, **options, return_weights=True)
        assert relative_rms(mine, weights) < 1e-6 and relative_rms(y, expected) < 1e-6
        del options["scale"]
        again = attention_weights(q, k, **options, scale=0.6)
        np.testing.assert_array_equal(again, mine)


@pytest.mark.parametrize("bias_shape, block_size", [((2, 4, 6, 7), 3), ((1, 4, 1, 7), 1), ((4, 6, 1), 4), ((7,), 4)])
def test_blocks_have_the_gradients_of_the_whole(bias_shape, block_size):
    q, k, v, bias, ct = draw(2, (2, 6, 4, 8), (2, 7, 2, 8), (2, 7, 2, 5), bias_shape, (2, 6, 4, 5))
    mask = np.random.default_rng(3).random((2, 4, 6, 7)) < 0.6
    mask[1, :, 3] = False

    def loss(q, k, v, bias, scale, block_size):
        options = {"mask": mask, "causal": True, "softcap": 3.0, "block_size": block_size}
        return (ct * softmax_attention(q, k, v, bias=bias, scale=scale, **options)).sum()

    gradient = jax.jit(jax.grad(loss, range(5)), static_argnums=5)
    whole, blocks = (gradient(q, k, v, bias, jnp.float32(0.5), size) for size in (None, block_size))
    for mine, expected in zip(blocks, whole, strict=True):
        # Absolute: a bias that is the same for all keys has no gradient.
        np.testing.assert_allclose(mine, expected, rtol=0, atol=4e-6)


def test_blocks_never_hold_all_scores():
    q = jax.ShapeDtypeStruct((1, 512, 1, 4), jnp.float32)
    whole = 512 * 512

    def largest(block_size):
        def loss(q, k, v):
            return softmax_attention(q, k, v, block_size=block_size, causal=True).sum()

        return largest_array(jax.grad(loss, (0, 1, 2)), q, q, q)

    assert largest(None) >= whole
    assert largest(16) <= whole // 16


@pytest.mark.slow
def test_keys_that_a_rule_hides_from_a_run_of_queries_are_left_out():
    q, k, v = draw(13, (1, 64, 2, 4), (1, 64, 1, 4), (1, 64, 1, 4))

    def products(mask, block_size):
        def y(q, k, v):
            return softmax_attention(q, k, v, structural_mask=mask, block_size=block_size)

        return y(q, k, v), jax.jit(y).lower(q, k, v).as_text().count("dot_general")

    rules = {
        "causal": Causal(),
        "window": SlidingWindow(5, 3),
        "columns": Prefix(2) | SlidingWindow(5, 0),  # keys in two places
        "nothing": QueryPrefix(8) & Prefix(8),  # for all but the first queries
    }
    for name, rule in rules.items():
        (y, spans), (expected, _) = products(rule, 8), products(rule, 64)
        np.testing.assert_allclose(y, expected, rtol=0, atol=2e-6, err_msg=name)
        assert spans == (2 if name == "nothing" else 8), name  # two products for each run that sees anything
    assert products(Full(), 8)[1] == 2


def test_a_causal_mixer_leaves_hidden_keys_out():
    def products(block_size):
        mixer = SoftmaxAttention(4, num_heads=1, causal=True, block_size=block_size, rngs=nnx.Rngs(0))
        return jax.jit(mixer).lower(jnp.ones((1, 64, 4))).as_text().count("dot_general")

    assert products(8) - products(64) == 3 * 2


def test_long_sequences_go_in_blocks_on_a_cpu():
    q = jax.ShapeDtypeStruct((1, LONG, 2, 8), jnp.float32)
    short = jax.ShapeDtypeStruct((1, LONG // 2, 2, 8), jnp.float32)

    def largest(q, **options):
        return largest_array(jax.grad(lambda q, k, v: softmax_attention(q, k, v, **options).sum(), (0, 1, 2)), q, q, q)

    assert largest(q) <= 2 * LONG**2 // 4
    assert largest(short) >= 2 * (LONG // 2) ** 2
    dropout = {"dropout_rate": 0.5, "dropout_key": jax.random.key(0)}
    assert largest(q, **dropout) >= 2 * LONG**2
    with dispatch.target("tpu", device_kind="TPU v5e"):
        assert largest(q) >= 2 * LONG**2


@pytest.mark.parametrize("block_size", [None, 4])
def test_higher_derivatives_are_those_of_the_formula(block_size):
    q, k, v, bias, t = draw(14, (2, 9, 2, 4), (2, 7, 1, 4), (2, 7, 1, 3), (9, 7), (2, 9, 2, 4))
    mask = np.random.default_rng(15).random((2, 1, 9, 7)) < 0.7
    mask[0, :, 2] = False

    def mine(q):
        y = softmax_attention(q, k, v, bias=bias, mask=mask, block_size=block_size)
        return (jnp.sin(y)).sum()

    def plain(q):
        scores = jnp.einsum("bnhd,bmd->bhnm", q, k[:, :, 0]) / 2 + bias
        e = jnp.where(mask, jnp.exp(scores), 0)
        total = e.sum(-1, keepdims=True)
        return jnp.sin(jnp.einsum("bhnm,bme->bnhe", e / jnp.where(total == 0, 1, total), v[:, :, 0])).sum()

    def second(f, q):
        forward = jax.jvp(jax.grad(f), (q,), (t,))[1]
        reverse = jax.grad(lambda q: (jax.grad(f)(q) * t).sum())(q)
        return jax.jvp(f, (q,), (t,))[1], forward, reverse

    for found, expected in zip(jax.jit(second, static_argnums=0)(mine, q), second(plain, q), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-6)


def test_matches_jax_for_grouped_heads():
    q, k, v = draw(4, (2, 9, 6, 8), (2, 9, 2, 8), (2, 9, 2, 8))
    theirs = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    assert relative_rms(softmax_attention(q, k, v, causal=True), theirs) < 1e-6


def test_gradients_match_finite_differences_of_the_formula():
    q, k, v, ct = draw(5, (1, 3, 2, 4), (1, 4, 1, 4), (1, 4, 1, 3), (1, 3, 2, 3))
    grads = jax.grad(lambda q, k, v: (ct * softmax_attention(q, k, v)).sum(), (0, 1, 2))(q, k, v)
    for place, (a, grad) in enumerate(zip((q, k, v), grads, strict=True)):
        numeric = np.zeros(a.shape)
        for index in np.ndindex(a.shape):
            ends = []
            for step in (1e-5, -1e-5):
                args = [x.astype(np.float64) for x in (q, k, v)]
                args[place][index] += step
                ends.append((ct * formula(*args)[0]).sum())
            numeric[index] = (ends[0] - ends[1]) / 2e-5
        assert relative_rms(grad, numeric) < 2e-6


@pytest.mark.parametrize("block_size", [None, 2])
@pytest.mark.parametrize("kind", ["mask", "key mask", "bias", "huge"])
def test_a_row_without_keys_gives_zeros_and_zero_gradients(kind, block_size):
    q, k, v = draw(6, (2, 3, 2, 4), (2, 5, 2, 4), (2, 5, 2, 4))
    mask, bias = None, None
    if kind == "huge":
        q, k = 1e18 * q, 1e18 * k
    if kind in ("mask", "huge"):
        mask = np.ones((2, 1, 3, 5), bool)
        mask[0, :, 1] = False
    elif kind == "key mask":
        mask = np.array([[False] * 5, [True] * 5])
    else:
        bias = np.zeros((2, 1, 3, 5), np.float32)
        bias[0, :, 1] = -np.inf

    def y(q, k, v):
        return softmax_attention(q, k, v, mask=mask, bias=bias, block_size=block_size)

    out, back = jax.vjp(y, q, k, v)
    row = np.zeros(out.shape, np.float32)
    row[0, 1] = 1
    np.testing.assert_array_equal(out[0, 1], np.zeros_like(out[0, 1]))
    assert np.abs(out[1]).min() > 0 and np.isfinite(out).all()
    for grad in back(row):
        np.testing.assert_array_equal(grad, np.zeros_like(grad))
    for grad in back(np.ones_like(row)):
        assert np.isfinite(grad).all()


@pytest.mark.parametrize("block_size", [None, 4])
def test_bfloat16_is_close_to_float64(block_size):
    q, k, v, ct = (jnp.asarray(a, jnp.bfloat16) for a in draw(7, *[(2, 33, 4, 16)] * 4))

    def y(q, k, v):
        return softmax_attention(q, k, v, block_size=block_size)

    out, back = jax.vjp(y, q, k, v)
    assert out.dtype == jnp.bfloat16
    assert relative_rms(out, formula(q, k, v)[0]) < 4e-3
    wide = jax.vjp(y, *(a.astype(jnp.float32) for a in (q, k, v)))[1](ct.astype(jnp.float32))
    for mine, expected in zip(back(ct), wide, strict=True):
        assert mine.dtype == jnp.bfloat16 and relative_rms(mine, expected) < 8e-3


@pytest.mark.parametrize("block_size", [None, 3])
def test_packed_segments_are_separate_sequences(block_size):
    q, k, v = draw(8, (1, 8, 2, 4), (1, 9, 2, 4), (1, 9, 2, 4))
    q_ids, k_ids = np.array([[3] * 5 + [0] * 3]), np.array([[3] * 4 + [0] * 5])
    attend = functools.partial(
        softmax_attention, causal=True, structural_mask=SlidingWindow(2, 2), block_size=block_size
    )
    packed = attend(q, k, v, segment_ids=(q_ids, k_ids))
    first, second = attend(q[:, :5], k[:, :4], v[:, :4]), attend(q[:, 5:], k[:, 4:], v[:, 4:])
    assert relative_rms(packed, np.concatenate([first, second], 1)) < 1e-6


def test_indices_move_the_rules():
    q, k, v = draw(9, (2, 6, 2, 4), (2, 6, 2, 4), (2, 6, 2, 4))
    whole = softmax_attention(q, k, v, causal=True, structural_mask=SlidingWindow(3, 3))
    end = softmax_attention(
        q[:, 4:], k, v, causal=True, structural_mask=SlidingWindow(3, 3), q_idx=np.array([[4, 5]] * 2)
    )
    assert relative_rms(end, whole[:, 4:]) < 1e-6


def test_dropout_keeps_the_mean_and_the_weights():
    q, k, v = draw(10, (1, 4, 2, 4), (1, 6, 2, 4), (1, 6, 2, 4))

    @jax.jit
    def once(key):
        return softmax_attention(q, k, v, dropout_rate=0.3, dropout_key=key, return_weights=True)

    ys, weights = jax.vmap(once)(jax.random.split(jax.random.key(0), 4000))
    expected = formula(q, k, v)
    assert relative_rms(weights[0], expected[1]) < 1e-6
    assert np.asarray(ys).std(0).min() > 0.01
    assert relative_rms(np.asarray(ys).mean(0), expected[0]) < 0.05


def test_attention_mask_joins_all_kinds():
    keys = np.array([[True, True, False, True]])
    ids = np.array([[1, 1, 1, 2]])
    mask = attention_mask(4, 4, mask=keys, segment_ids=ids, causal=True)
    np.testing.assert_array_equal(mask[0, 0].astype(int), [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 1]])
    assert attention_mask(4, 4) is None
    np.testing.assert_array_equal(segment_positions([[5, 5, 2, 2, 2, 5]]), [[0, 1, 0, 1, 2, 0]])


def test_masked_softmax_over_two_axes():
    scores = draw(11, (2, 3, 4))[0]
    mask = np.ones((2, 3, 4), bool)
    mask[1] = False
    weights = masked_softmax(scores, mask, axis=(1, 2))
    e = np.exp(scores[0].astype(np.float64))
    assert relative_rms(weights[0], e / e.sum()) < 1e-6
    np.testing.assert_array_equal(weights[1], 0)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"k": (2, 5, 3, 4)}, "4 heads of q must be a multiple of the 3"),
        ({"k": (2, 5, 2, 3)}, "q must be"),
        ({"v": (2, 6, 2, 4)}, "v must be"),
        ({"mask": np.ones((2, 5))}, "mask must be boolean"),
        ({"mask": np.ones((2, 4), bool)}, "mask must be broadcastable"),
        ({"bias": np.ones((3, 5))}, "bias must be broadcastable"),
        ({"segment_ids": np.ones((2, 4), int)}, "segment_ids"),
        ({"scale": np.ones(4)}, "scale must be a scalar"),
        ({"dropout_rate": 0.1}, "dropout_key is needed"),
        ({"block_size": 2, "return_weights": True}, "block_size does not go"),
        ({"block_size": 0}, "block_size must be"),
        ({"q_idx": np.arange(3)}, "q_idx must be"),
    ],
)
def test_what_does_not_fit_is_refused(change, words):
    shapes = {"q": (2, 4, 4, 4), "k": (2, 5, 2, 4), "v": (2, 5, 2, 4)}
    arrays = {name: np.zeros(change.pop(name, shape), np.float32) for name, shape in shapes.items()}
    with pytest.raises(ValueError, match=words):
        softmax_attention(**arrays, **change)
