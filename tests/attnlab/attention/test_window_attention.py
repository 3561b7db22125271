import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab.attention.linear.inline_attention import InlineCore
from attnlab.attention.local.cross_shaped_windows import CrossShapedWindowAttention
from attnlab.attention.local.window_attention import WindowAttention
from attnlab.nn.grid_mixer import GridMixer


def attention_map(mixer, x):
    return nnx.capture(mixer, nnx.Intermediate)(x)[1]["attention"][0]


def test_shifted_windows_see_only_what_was_near_before_the_shift():
    mixer = WindowAttention(8, num_heads=2, window=4, shift=2, rngs=nnx.Rngs(0))
    weights = attention_map(mixer, jax.random.normal(jax.random.key(0), (1, 8, 8, 8)))
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-6)
    rows, columns = np.divmod(np.arange(64), 8)
    near = (np.abs(rows[:, None] - rows) < 4) & (np.abs(columns[:, None] - columns) < 4)
    assert not np.any(np.asarray(weights[0, 0]) * ~near)
    # The window in the middle is whole: it has 16 tokens; those at the corners of the image are alone with their 2x2.
    seen = np.count_nonzero(np.asarray(weights[0, 0]), axis=-1).reshape(8, 8)
    assert (seen[2:6, 2:6] == 16).all() and seen[0, 0] == seen[7, 7] == seen[0, 7] == 4


def test_windows_are_shifted_in_odd_layers_unless_one_covers_the_axis():
    build = lambda **place: WindowAttention(8, num_heads=2, window=4, rngs=nnx.Rngs(0), **place).windows.shift  # noqa: E731
    assert build(layer=0, grid=(8, 8)) == (0, 0)
    assert build(layer=1, grid=(8, 8)) == (2, 2)
    assert build(layer=1, grid=(8, 4)) == (2, 0)


def test_refuses_windows_that_do_not_tile_the_image():
    with pytest.raises(ValueError, match=r"windows of \(7, 7\) do not tile a grid of \(8, 8\)"):
        WindowAttention(8, num_heads=2, grid=(8, 8), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"windows of \(7, 7\) do not tile a grid of \(8, 8\)"):
        WindowAttention(8, num_heads=2, rngs=nnx.Rngs(0))(jnp.ones((1, 8, 8, 8)))


def test_cross_shaped_windows_see_a_cross():
    mixer = CrossShapedWindowAttention(8, num_heads=2, grid=(16, 16), split=2, rngs=nnx.Rngs(0))
    weights = attention_map(mixer, jax.random.normal(jax.random.key(0), (1, 16, 16, 8)))
    seen = np.asarray(weights[0]).any(0)
    assert (seen.sum(-1) == 2 * (16 + 16) - 2**2).all()
    assert (seen.astype(int) @ seen > 0).all()  # two layers reach the whole image


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grid": None}, "needs the grid"),
        ({"num_heads": 1}, "even number of heads"),
        ({"split": 3}, "do not tile a grid"),
    ],
)
def test_cross_shaped_windows_refuse(options, message):
    with pytest.raises(ValueError, match=message):
        CrossShapedWindowAttention(8, **({"num_heads": 2, "grid": (4, 4), "split": 2, "rngs": nnx.Rngs(0)} | options))


@pytest.mark.slow
def test_padded_stripes_take_images_of_any_size():
    mixer = CrossShapedWindowAttention(8, num_heads=2, split=4, padded=True, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 5, 8, 8))
    weights = np.asarray(attention_map(mixer, x))
    assert mixer(x).shape == x.shape and weights.shape == (2, 2, 40, 40)
    # Rows are padded by 3, one of them above: those of the horizontal stripes are 0..2 and 3..4.
    rows = np.arange(40) // 8
    assert (weights[0, 1].astype(bool) == ((rows < 3)[:, None] == (rows < 3))).all()
    assert (weights[:, 0].sum(-1) > 0.999).all() and (weights[:, 1].sum(-1) < 0.999).all()
    with pytest.raises(ValueError, match="core must do without the grid"):
        CrossShapedWindowAttention(8, num_heads=2, core=InlineCore, padded=True, rngs=nnx.Rngs(0))


def test_inline_stripes_must_cover_the_image():
    mixer = CrossShapedWindowAttention(8, num_heads=2, grid=(4, 4), split=2, core=InlineCore, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="a window that covers the image"):
        mixer(jnp.ones((1, 4, 4, 8)))


def test_padding_is_attended_with_the_biases_as_keys_and_values():
    mixer = WindowAttention(8, num_heads=2, window=4, shift=0, relative_bias=False, padded=True, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 5, 7, 8))
    for part in (mixer.query, mixer.key, mixer.value):
        part.bias[...] = jax.random.normal(jax.random.key(1), part.bias.shape)
    padded = jnp.pad(x, ((0, 0), (0, 3), (0, 1), (0, 0)))
    np.testing.assert_allclose(mixer(x), mixer(padded)[:, :5, :7], atol=1e-6)
    weights = attention_map(mixer, x)
    whole = attention_map(mixer, padded).reshape(2, 2, 8, 8, 8, 8)[:, :, :5, :7, :5, :7]
    np.testing.assert_allclose(weights, whole.reshape(2, 2, 35, 35), atol=1e-6)
    assert weights.sum(-1).max() < 1.001 and weights.sum(-1).min() < 0.9  # the padding has the rest
    with pytest.raises(ValueError, match="pads windows only"):
        GridMixer(8, num_heads=2, grid=(4, 4), padded=True, rngs=nnx.Rngs(0))
