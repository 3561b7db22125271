"""Neighborhood attention: the definition written out, implementations against the reference, memory, refusals."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import dispatch
from pallas_kernels.block_lists import lower
from pallas_kernels.grid_masks import TiledGrid
from pallas_kernels.neighborhood_attention import (
    Window,
    api,
    explain,
    neighborhood_attention,
    neighborhood_attention_weights,
    neighborhood_mask,
    tpu,
    xla,
)
from pallas_kernels.neighborhood_attention.cases import SMALL, SPEED, Case
from tests.accuracy import relative_rms
from tests.jaxprs import largest_array
from tests.pallas_kernels.quick import quick
from tests.pallas_kernels.tpu_compile import compile_for, kernels_of, needs_tpu_compiler
from tests.pallas_kernels.tpu_interpreter import interpreted


def visible_keys(x: int, length: int, k: int, s: int, d: int, causal: bool) -> set[int]:
    """The definition for one query of one axis, in words of the source: groups, leaders, shifted windows."""
    members = list(range(x % d, length, d))
    i = members.index(x)
    run_start = i - i % s
    if causal:
        leader = min(run_start + s - 1, len(members) - 1)
        return {members[j] for j in range(i + 1) if leader - j < k}
    leader = min(run_start + s // 2, len(members) - 1)
    start = leader - k // 2
    start = max(0, min(start, len(members) - k))
    return {members[j] for j in range(start, start + k)}


@st.composite
def axes(draw, longest: int = 30):
    length = draw(st.integers(1, longest))
    d = draw(st.integers(1, min(4, length)))
    k = draw(st.integers(1, length // d))
    return length, k, draw(st.integers(1, k)), d, draw(st.booleans())


@settings(max_examples=200, deadline=None)
@given(axes())
def test_window_is_the_definition(axis):
    window = Window(*axis)
    dense = window.dense(window.length)
    for x in range(window.length):
        assert set(np.flatnonzero(dense[x]).tolist()) == visible_keys(x, *axis)


@settings(max_examples=60, deadline=None)
@given(st.lists(axes(7), min_size=1, max_size=3), st.integers(1, 20), st.integers(1, 20))
def test_mask_is_lowered_exactly(all_axes, block_q, block_k):
    shape, kernel, stride, dilation, causal = zip(*all_axes, strict=True)
    mask = neighborhood_mask(shape, kernel, stride=stride, dilation=dilation, is_causal=causal)
    n = math.prod(shape)
    dense, lists = mask.dense(n), lower(mask, n, n, block_q, block_k)
    for i, j in itertools.product(range(lists.num_q_blocks), range(lists.num_k_blocks)):
        block = dense[i * block_q : (i + 1) * block_q, j * block_k : (j + 1) * block_k]
        assert (j in lists.visited(i), j in lists.full(i)) == (block.any(), block.all())


def test_block_lists_of_a_large_image_are_sparse():
    lists = lower(neighborhood_mask((64, 64), 13), 4096, 4096, 64, 64)
    assert lists.counts.tolist() == [13] * 64  # a block is a row of the image
    assert not lists.is_full.any()


def results(case: Case, implementation: str, dtype=jnp.float32):
    """y, lse and the gradients of every array, for cotangents that are the same for all implementations."""
    arrays = case.arrays(dtype)
    rng = np.random.default_rng(1)
    shape = arrays["q"].shape[:-1]
    dy, dlse = rng.standard_normal((*shape, arrays["v"].shape[-1])), rng.standard_normal(shape)

    def loss(arrays):
        y, lse = neighborhood_attention(**arrays, **case.options, return_lse=True, implementation=implementation)
        wide = jnp.promote_types(y.dtype, jnp.float32)
        return jnp.sum(y.astype(wide) * dy) + jnp.sum(lse * dlse), (y, lse)

    grads, (y, lse) = jax.jit(jax.grad(loss, has_aux=True))(arrays)
    empty = np.isneginf(lse)
    assert empty.any() == (case.masked and not case.additional) and not np.asarray(y, np.float32)[empty].any()
    assert not np.asarray(grads["q"], np.float32)[empty].any()
    return {"y": y, "lse": jnp.where(empty, -1.0, lse)} | {f"d{name}": g for name, g in grads.items()}


def in_float64(case: Case, arrays_dtype):
    """The reference in float64 on the numbers that `arrays_dtype` holds."""
    with jax.enable_x64(True):
        rounded = {name: np.asarray(a, np.float64) for name, a in case.arrays(arrays_dtype).items()}

        class Wide(Case):
            def arrays(self, dtype):
                return {name: jnp.asarray(a, dtype) for name, a in rounded.items()}

        wide = Wide(**vars(case))
        return {name: np.asarray(a) for name, a in results(wide, "reference", jnp.float64).items()}


QUICK = (
    "one_token",
    "sequence_blocks",
    "sequence_masked",
    "sequence_causal_stride_dilation",
    "image_mixed",
    "image_bias_dilation",
    "image_masked",
    "image_masked_additional",
    "video_bias",
)


@pytest.mark.parametrize("case", quick(SMALL, QUICK, lambda case: case.name))
def test_equals_reference_in_float64(case):
    want = in_float64(case, jnp.float32)
    for name, got in results(case, "xla").items():
        if np.abs(want[name]).max() > 1e-9:  # one token alone: no gradient for q and k
            assert relative_rms(got, want[name]) <= (2e-6 if name.startswith("d") else 1e-6), name


@pytest.mark.parametrize(
    "name", quick(["image_mixed", "image_additional", "sequence_causal_stride_dilation"], ("image_additional",))
)
def test_bfloat16(name):
    case = next(case for case in SMALL if case.name == name)
    want, got = in_float64(case, jnp.bfloat16), results(case, "xla", jnp.bfloat16)
    assert got["y"].dtype == got["dq"].dtype == got["dk"].dtype == got["dv"].dtype == jnp.bfloat16
    assert got["lse"].dtype == jnp.float32
    for output in got:
        limit = {"y": 4e-3, "lse": 1e-5}.get(output, 8e-3)
        assert relative_rms(got[output].astype(jnp.float32), want[output]) <= limit, output


@pytest.mark.slow
@settings(max_examples=6, deadline=None)
@given(st.data())
def test_random_options_equal_reference(data):
    count = data.draw(st.integers(1, 3))
    longest = {1: 40, 2: 10, 3: 5}[count]
    shape, kernel, stride, dilation, causal = zip(*(data.draw(axes(longest)) for _ in range(count)), strict=True)
    bias = data.draw(st.booleans())
    if bias:
        kernel = tuple(k - 1 + k % 2 for k in kernel)
        stride, causal = (1,) * count, (False,) * count
    groups, repeats = data.draw(st.sampled_from([(1, 1), (2, 1), (1, 3), (2, 2)]))
    additional = data.draw(st.sampled_from([0, 0, 1, 4]))
    case = Case(
        "random", shape, kernel, stride, dilation, causal, 0.4, 2, groups * repeats, groups, 3, 5, bias, additional
    )
    want, got = results(case, "reference"), results(case, "xla")
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=2e-4, atol=2e-5, err_msg=name)


@pytest.mark.slow
@settings(max_examples=6, deadline=None)
@given(st.data())
def test_every_tiling_gives_the_same(data):
    case = data.draw(st.sampled_from([SMALL[9], SMALL[13]]))
    args = api.normal_form(**case.arrays(), **case.options)
    tiles = tuple(data.draw(st.integers(1, window.group_length)) for window in args.windows)
    choose, xla.tile_sizes = xla.tile_sizes, lambda windows, batch: tiles
    try:
        y, lse = jax.jit(lambda args: xla.run.__wrapped__(args))(args)
    finally:
        xla.tile_sizes = choose
    want, want_lse = jax.jit(api.reference.run)(args)
    np.testing.assert_allclose(y, want, rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(lse, want_lse, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("case", SPEED, ids=lambda case: case.name)
def test_memory_is_linear(case):
    arrays = {name: jax.ShapeDtypeStruct(a.shape, a.dtype) for name, a in case.arrays().items()}

    def loss(arrays):
        return jnp.sum(neighborhood_attention(**arrays, **case.options, implementation="xla"))

    n, k = math.prod(case.shape), case.kernel_size ** len(case.shape)
    largest = largest_array(jax.grad(loss), arrays)
    per_tile = case.batch * case.heads * min(n * k, xla.MOST_SCORES)
    assert largest <= max(2 * arrays["q"].size, per_tile)
    assert largest < case.batch * case.heads * n * n
    if n >= 1024:
        assert largest <= 4 * arrays["q"].size + xla.MOST_SCORES


def test_reference_does_build_the_matrix():
    case = SPEED[1]

    def run(arrays):
        return neighborhood_attention(**arrays, **case.options, implementation="reference")

    assert largest_array(run, case.arrays()) >= case.heads * 256 * 256


def test_work_is_a_small_part_of_dense():
    """Scores computed for 64×64 tokens, k = 13, against the 4096² of dense attention."""
    windows = neighborhood_mask((64, 64), 13).masks
    plan = [xla._axis(window, tile) for window, tile in zip(windows, xla.tile_sizes(windows, 4), strict=True)]
    scores = math.prod(axis.count * axis.queries * axis.keys for axis in plan)
    assert scores <= 0.15 * 4096**2


def test_whole_window_is_full_attention():
    q, k, v = (jax.random.normal(jax.random.key(i), (2, 4, 6, 2, 8)) for i in range(3))
    y = neighborhood_attention(q, k, v, (4, 6))
    flat = [x.reshape(2, 24, 2, 8) for x in (q, k, v)]
    np.testing.assert_allclose(y.reshape(2, 24, 2, 8), jax.nn.dot_product_attention(*flat), rtol=1e-5, atol=1e-6)
    causal = neighborhood_attention(*flat, 24, is_causal=True)
    want = jax.nn.dot_product_attention(*flat, is_causal=True)
    np.testing.assert_allclose(causal, want, rtol=1e-5, atol=1e-6)


def test_weights_are_those_of_the_call():
    case = next(case for case in SMALL if case.name == "image_bias_dilation")
    arrays = case.arrays()
    weights = neighborhood_attention_weights(arrays["q"], arrays["k"], bias=arrays["bias"], **case.options)
    allowed = neighborhood_mask(case.shape, case.kernel_size, dilation=case.dilation).dense(90)
    assert np.array_equal(np.asarray(weights > 0), np.broadcast_to(allowed, weights.shape))
    values = jnp.repeat(arrays["v"].reshape(1, 90, 2, 8), 2, axis=2)
    y = jnp.einsum("bhij,bjhe->bihe", weights, values, precision="highest").reshape(1, 10, 9, 4, 8)
    np.testing.assert_allclose(y, neighborhood_attention(**arrays, **case.options), rtol=1e-5, atol=1e-6)


def test_no_key_outside_the_neighborhood_has_influence():
    q, k, v = (jax.random.normal(jax.random.key(i), (1, 12, 10, 1, 4)) for i in range(3))
    options = {"kernel_size": (4, 3), "stride": (2, 1), "dilation": (1, 3), "is_causal": (True, False)}
    mask = neighborhood_mask((12, 10), **options).dense(120).reshape(12, 10, 12, 10)
    gradient = jax.grad(lambda v: neighborhood_attention(q, k, v, **options)[0, 6, 4].sum())(v)
    assert np.array_equal(np.asarray(gradient[0, :, :, 0, 0] != 0), mask[6, 4])


def test_masked_keys_have_no_influence():
    case = next(case for case in SMALL if case.name == "image_masked")
    arrays, options = case.arrays(), case.options
    mask = options["key_mask"]
    largest = {name: jnp.where(mask[..., None, None], arrays[name], 1e30) for name in ("k", "v")}

    def results(arrays):
        y, pull = jax.vjp(lambda arrays: neighborhood_attention(**arrays, **options), arrays)
        return y, pull(jnp.ones_like(y))[0]

    (y, grads), (got, same) = results(arrays), results(arrays | largest)
    np.testing.assert_array_equal(got, y)
    for name in arrays:
        np.testing.assert_array_equal(same[name], grads[name], err_msg=name)
    assert not np.asarray(grads["k"])[~mask].any() and not np.asarray(grads["v"])[~mask].any()
    weights = neighborhood_attention_weights(arrays["q"], arrays["k"], bias=arrays["bias"], **options)
    seen = np.asarray(weights).sum((1, 2)).reshape(mask.shape) > 0
    assert np.array_equal(seen, mask)
    rows = np.asarray(weights).sum(-1)
    assert np.all(np.isclose(rows, 1) | (rows == 0)) and np.any(rows == 0)


def test_a_bias_of_minus_infinity_hides_its_offset():
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(1, 9, 1, 4)), jnp.float32) for _ in range(3))
    bias = rng.normal(size=(1, 5)).astype(np.float32)
    hidden = np.where(np.arange(5) == 4, -np.inf, bias).astype(np.float32)

    def run(bias, implementation):
        return neighborhood_attention(q, k, v, 3, bias=bias, implementation=implementation)

    y, pullback = jax.vjp(lambda b: run(b, "xla"), jnp.asarray(hidden))
    corner = jnp.asarray([k[0, j, 0] @ q[0, 0, 0] / 2 + bias[0, j + 2] for j in (0, 1)])  # key 2 is hidden from query 0
    assert relative_rms(y[0, 0, 0], jax.nn.softmax(corner) @ v[0, :2, 0]) < 1e-6
    assert relative_rms(y, run(hidden, "reference")) < 1e-6
    gradient = pullback(y)[0]
    assert np.isfinite(gradient).all() and gradient[0, 4] == 0 and gradient[0, 3] != 0
    for implementation in ("xla", "reference"):
        assert not np.any(run(np.full((1, 5), -np.inf, np.float32), implementation))


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_large_scores_stay_finite(dtype):
    q, k, v = (100 * jax.random.normal(jax.random.key(i), (1, 6, 5, 2, 8)).astype(dtype) for i in range(3))

    def loss(q, k, v):
        y, lse = neighborhood_attention(q, k, v, 3, is_causal=(True, False), return_lse=True)
        return jnp.sum(y.astype(jnp.float32)) + jnp.sum(lse)

    value, grads = jax.value_and_grad(loss, (0, 1, 2))(q, k, v)
    assert np.isfinite(value)
    assert all(np.isfinite(np.asarray(g, np.float32)).all() for g in grads)


def test_transformations():
    case = next(case for case in SMALL if case.name == "image_additional")
    arrays, options = case.arrays(), case.options
    call = lambda arrays: neighborhood_attention(**arrays, **options)  # noqa: E731
    want = call(arrays)
    np.testing.assert_allclose(jax.jit(call)(arrays), want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(jax.checkpoint(call)(arrays), want, rtol=1e-5, atol=1e-6)
    many = {name: jnp.stack([a, 2 * a]) for name, a in arrays.items()}
    np.testing.assert_allclose(jax.vmap(call)(many)[0], want, rtol=1e-5, atol=1e-6)
    _, scanned = jax.lax.scan(lambda _, a: (None, call(a)), None, many)
    np.testing.assert_allclose(scanned[0], want, rtol=1e-5, atol=1e-6)


def test_shard_map_over_examples():
    case = next(case for case in SMALL if case.name == "image_additional")
    arrays = case.arrays()
    bias = arrays.pop("bias")
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.P("data")

    def loss(arrays):
        sharded = jax.shard_map(
            lambda a: neighborhood_attention(**a, bias=bias, **case.options), mesh=mesh, in_specs=spec, out_specs=spec
        )
        return jnp.sum(sharded(arrays) ** 2)

    alone = jax.grad(lambda a: jnp.sum(neighborhood_attention(**a, bias=bias, **case.options) ** 2))
    want = jax.jit(alone)(arrays)
    for name, gradient in jax.jit(jax.grad(loss))(arrays).items():
        np.testing.assert_allclose(gradient, want[name], rtol=1e-5, atol=1e-6, err_msg=name)


def call(shape=(1, 8, 6, 4, 8), kv=None, **options):
    q = jnp.zeros(shape)
    k = jnp.zeros(shape if kv is None else kv)
    return neighborhood_attention(q, options.pop("k", k), options.pop("v", k), **{"kernel_size": 3} | options)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (
            lambda: call(kernel_size=7),
            ValueError,
            r"axis 1 of the tokens \(8, 6\): kernel_size \* dilation .* 6, got 7",
        ),
        (lambda: call(dilation=(1, 3)), ValueError, r"axis 1 .*got 3 \* 3"),
        (lambda: call(stride=4), ValueError, "stride must be at most kernel_size = 3, got 4"),
        (lambda: call(kernel_size=0), ValueError, "kernel_size must be at least 1, got 0"),
        (lambda: call(kernel_size=(3, 3, 3)), ValueError, "kernel_size must have one entry for each of the 2 axes"),
        (lambda: call(kernel_size=3.0), TypeError, "kernel_size must be an integer or one per axis, got 3.0"),
        (lambda: call(is_causal=1), TypeError, "is_causal must be a bool"),
        (lambda: call(is_causal=(True,)), ValueError, "is_causal must have one entry"),
        (lambda: call(shape=(8, 4, 8)), ValueError, "1, 2 or 3 axes of tokens"),
        (lambda: call(kv=(1, 8, 6, 3, 8)), ValueError, "multiple of the heads of k, got 4 and 3"),
        (lambda: call(kv=(1, 8, 5, 4, 8)), ValueError, r"agree in \(B, \*S\)"),
        (lambda: call(k=jnp.zeros((1, 8, 6, 4, 7))), ValueError, "agree in D"),
        (lambda: call(v=jnp.zeros((1, 8, 6, 2, 8))), ValueError, r"agree in \(B, \*S, G\)"),
        (lambda: call(v=jnp.zeros((1, 8, 6, 4, 8), jnp.bfloat16)), TypeError, "one dtype"),
        (lambda: call(v=jnp.zeros((1, 8, 6, 4, 8), int)), TypeError, "v must be one of float16"),
        (lambda: call(bias=jnp.zeros((4, 5))), ValueError, r"bias must be .* \(4, 5, 5\), got shape \(4, 5\)"),
        (lambda: call(kernel_size=4, bias=jnp.zeros((4, 7, 7))), ValueError, "bias needs an odd kernel_size"),
        (lambda: call(is_causal=True, bias=jnp.zeros((4, 5, 5))), ValueError, "is_causal False on every axis"),
        (lambda: call(additional_keys=jnp.zeros((1, 2, 4, 8))), ValueError, "additional_values is None"),
        (
            lambda: call(additional_keys=jnp.zeros((1, 2, 3, 8)), additional_values=jnp.zeros((1, 2, 4, 8))),
            ValueError,
            r"additional_keys must have shape \(1, A, 4, 8\)",
        ),
        (lambda: call(key_mask=jnp.ones((1, 8, 6))), TypeError, "key_mask must be boolean, got float32"),
        (lambda: call(key_mask=jnp.ones((1, 48), bool)), ValueError, r"key_mask must be \(B, \*S\) = \(1, 8, 6\)"),
        (lambda: call(scale=float("nan")), ValueError, "scale must be finite"),
        (lambda: call(scale=jnp.ones(3)), TypeError, "scale must be a number"),
        (lambda: call(implementation="xl"), ValueError, "did you mean 'xla'"),
    ],
)
def test_refusals(build, error, message):
    with pytest.raises(error, match=message):
        build()


def test_scale_zero_is_the_default():
    q, k, v = (jax.random.normal(jax.random.key(i), (1, 9, 1, 4)) for i in range(3))
    np.testing.assert_array_equal(neighborhood_attention(q, k, v, 3, scale=0), neighborhood_attention(q, k, v, 3))


def test_explain_names_the_implementations():
    q = jnp.zeros((1, 9, 1, 4))
    assert [choice.name for choice in explain(q, q, q, 3) if choice.ok][:1] == ["xla"]
    assert {choice.name for choice in explain()} >= {"xla", "reference"}


ON_TPU = ("one_token", "sequence_causal_stride_dilation", "image_mixed", "image_additional", "video_bias")


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, id=c.name, marks=pytest.mark.slow) for c in SMALL if c.name in ON_TPU]
    + [pytest.param(c, id=c.name) for c in SMALL if c.name == "image_bias_dilation"],
)
def test_tpu_kernels_equal_reference_in_float64(case):
    """Interpreted: memory that nobody wrote is NaN, reads out of bounds raise, races are found."""
    want = in_float64(case, jnp.float32)
    with interpreted() as kernels:
        found = results(case, "tpu")
    assert len(kernels) >= 3
    for name, got in found.items():
        if np.abs(want[name]).max() > 1e-9:
            assert relative_rms(got, want[name]) <= (4e-6 if name.startswith("d") else 2e-6), name


def test_tpu_tiles_are_boxes():
    mask = neighborhood_mask((128, 128), 13)
    tile = tpu.tile_of(mask.masks)
    assert tile in ((8, 16), (16, 8))
    tiled = TiledGrid((128, 128), mask.masks, tile)
    in_tiles, in_rows = (lower(one, 1 << 14, 1 << 14, 128, 128) for one in (tiled, mask))
    assert in_rows.counts.max() == 13 and in_tiles.counts.max() == 9


@pytest.mark.slow
@needs_tpu_compiler
@pytest.mark.parametrize("name", ["image_64x64_k13", "video_8x16x16_k5"])
def test_tpu_kernels_compile(name):
    case = next(case for case in SPEED if case.name == name)
    arrays = case.arrays(jnp.bfloat16)

    def loss(arrays):
        y = neighborhood_attention(**arrays, **case.options, implementation="tpu")
        return jnp.sum(y.astype(jnp.float32))

    assert kernels_of(compile_for("v5e", jax.grad(loss), arrays)) == 3


def test_tpu_kernels_refuse_key_masks():
    case = next(case for case in SMALL if case.name == "image_masked")
    with dispatch.target("tpu", "TPU v5e"), pytest.raises(dispatch.UnsupportedError, match="key_mask"):
        neighborhood_attention(**case.arrays(), **case.options, implementation="tpu")
