"""What the conformance suite and the goldens do not cover of the neighborhood attention mixer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import attnlab.interop
from attnlab import Layout, Site, UnsupportedArgument
from attnlab.attention.local.neighborhood_attention import NeighborhoodAttention
from attnlab.interop.names import StateDictError
from pallas_kernels.neighborhood_attention import neighborhood_mask


def build(layout=Layout.IMAGE, **options) -> NeighborhoodAttention:
    return NeighborhoodAttention(8, **{"num_heads": 2, "layout": layout, "rngs": nnx.Rngs(0)} | options)


def tokens(*grid: int, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (2, *grid, 8))


def test_map_is_recorded_and_zero_outside_the_neighborhood():
    mixer, x = build(kernel_size=3, dilation=(2, 1), relative_bias=True), tokens(7, 5)
    _, intermediates = nnx.capture(mixer, nnx.Intermediate)(x)
    weights = np.asarray(intermediates["attention"][0])
    allowed = neighborhood_mask((7, 5), 3, dilation=(2, 1)).dense(35)
    assert weights.shape == (2, 2, 35, 35)
    assert weights.dtype == np.float32
    assert np.array_equal(weights > 0, np.broadcast_to(allowed, weights.shape))
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-6)


def test_map_of_a_short_causal_sequence_has_its_own_length():
    mixer, x = build(Layout.SEQUENCE, kernel_size=5, dilation=2, causal=True), tokens(4)
    y, intermediates = nnx.capture(mixer, nnx.Intermediate)(x)
    weights = np.asarray(intermediates["attention"][0])
    assert y.shape == x.shape
    allowed = [[i - j >= 0 and (i - j) % 2 == 0 for j in range(4)] for i in range(4)]
    assert np.array_equal(weights > 0, np.broadcast_to(allowed, (2, 2, 4, 4)))


@pytest.mark.parametrize(("kernel_size", "dilation"), [(1, 1), (3, 1), (4, 3)])
def test_decoding_with_dilation_equals_the_call(kernel_size, dilation):
    mixer = build(Layout.SEQUENCE, kernel_size=kernel_size, dilation=dilation, causal=True)
    x = tokens(16)
    whole = mixer(x)
    first, state = mixer.prefill(x[:, :1], mixer.init_state(2))
    second, state = mixer.prefill(x[:, 1:14], state)
    third, state = mixer.step(x[:, 14], state)
    fourth, state = mixer.step(x[:, 15], state)
    got = jnp.concatenate([first, second, third[:, None], fourth[:, None]], 1)
    np.testing.assert_allclose(got, whole, rtol=1e-4, atol=1e-6)
    assert state.keys.shape == (2, (kernel_size - 1) * dilation, 2, 4)
    assert state.length.tolist() == [16, 16]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_padding_in_a_later_prefill(dtype):
    mixer, x = build(Layout.SEQUENCE, kernel_size=4, dilation=2, causal=True), tokens(12).astype(dtype)
    _, state = mixer.prefill(x[:, :5], mixer.init_state(2, dtype=dtype))
    padding = jnp.full((2, 2, 8), 50, dtype)
    mask = jnp.arange(6)[None].repeat(2, 0) >= 2
    got, state = mixer.prefill(jnp.concatenate([padding, x[:, 5:9]], 1), state, mask=mask)
    want = mixer(x)
    tolerance = 1e-5 if dtype == jnp.float32 else 2e-2
    assert np.isfinite(np.asarray(got, np.float32)).all()
    np.testing.assert_allclose(np.float32(got[:, 2:]), np.float32(want[:, 5:9]), rtol=tolerance, atol=tolerance / 20)
    y, _ = mixer.step(x[:, 9], state)
    np.testing.assert_allclose(np.float32(y), np.float32(want[:, 9]), rtol=tolerance, atol=tolerance / 20)


def test_video_causal_in_time_alone():
    mixer, x = build(Layout.VIDEO, kernel_size=(2, 3, 3), causal=(True, False, False)), tokens(4, 3, 3)
    moved = x.at[:, 2].add(1.0)
    y, changed = mixer(x), mixer(moved)
    np.testing.assert_array_equal(y[:, :2], changed[:, :2])
    assert (np.abs(y[:, 2:] - changed[:, 2:]).max((0, 2, 3, 4)) > 1e-6).all()
    assert not mixer.causal
    with pytest.raises(UnsupportedArgument, match="does not decode"):
        mixer.init_state(2)


def test_sites():
    image = attnlab.create("neighborhood_attention", Site(8, 2, layout=Layout.IMAGE, grid=(14, 6)), rngs=nnx.Rngs(0))
    assert image.kernel_size == (7, 5)
    with pytest.raises(UnsupportedArgument, match="causal on sequences alone, not on the layout video"):
        site = Site(8, 2, layout=Layout.VIDEO, causal=True, grid=(4, 4, 4))
        attnlab.create("neighborhood_attention", site, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: build(num_heads=3), ValueError, "num_heads must divide the 8 channels, got 3"),
        (lambda: build(kernel_size=7, grid=(6, 9)), ValueError, r"axis 0 of the tokens \(6, 9\)"),
        (lambda: build(kernel_size=(3, 3, 3)), ValueError, "kernel_size must have one entry for each of the 2 axes"),
        (lambda: build(kernel_size="7"), TypeError, "kernel_size must be an integer"),
        (lambda: build(kernel_size=3, stride=4), ValueError, "stride must be at most kernel_size"),
        (lambda: build(kernel_size=4, relative_bias=True), ValueError, "relative_bias needs odd kernel_size"),
        (lambda: build(causal=True, relative_bias=True), ValueError, "no causal axis"),
        (lambda: build()(tokens(6, 9)), ValueError, "kernel_size .* dilation must be at most"),
        (
            lambda: build(Layout.SEQUENCE, causal=True, kernel_size=4, stride=2).init_state(1),
            UnsupportedArgument,
            "does not decode with stride 2",
        ),
    ],
)
def test_refusals(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_official_weights_must_fit():
    mixer = build(kernel_size=3, relative_bias=True)
    arrays = {
        "qkv.weight": np.ones((24, 8)),
        "qkv.bias": np.ones(24),
        "proj.weight": np.ones((8, 8)),
        "proj.bias": np.ones(8),
        "rpb": np.ones((2, 5, 5)),
    }
    attnlab.interop.load(mixer, arrays)
    assert mixer.bias[...].shape == (2, 5, 5)
    without = {name: a for name, a in arrays.items() if name != "rpb"}
    with pytest.raises(StateDictError, match="no 'rpb'"):
        attnlab.interop.load(mixer, without)
