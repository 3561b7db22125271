import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import Layout, UnsupportedArgument
from attnlab.mixers.gaam import GaussianAttention, GaussianStack, importance_factor
from attnlab.mixers.gaam import gaussian_weights as eager_weights
from tests.accuracy import relative_rms

gaussian_weights = jax.jit(eager_weights, static_argnames=("axis", "padding_value", "eps"))


def by_the_equations(x: np.ndarray, offsets: np.ndarray, widths: np.ndarray, eps: float = 1e-8) -> np.ndarray:
    """Weights along axis 1 of (B, N, C), in float64, Gaussian by Gaussian."""
    size, weights = x.shape[1] // len(offsets), []
    for head, (delta, c) in enumerate(zip(offsets, widths, strict=True)):
        chunk = x[:, head * size : None if head == len(offsets) - 1 else (head + 1) * size].astype(np.float64)
        z = (chunk - chunk.mean(1, keepdims=True))[..., None] - delta
        z = z / np.sqrt(chunk.var(1, ddof=1, keepdims=True) + eps)[..., None]
        p = (np.exp(-0.5 * (z / c) ** 2) / np.sqrt(2 * np.pi * c**2)).prod(-1)
        weights.append(p / np.maximum(p.sum(1, keepdims=True), eps))
    return np.concatenate(weights, 1)


def drawn(heads: int, gaussians: int = 3) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    x = random.standard_normal((2, 11, 4)).astype(np.float32)
    return x, 0.3 * random.standard_normal((heads, gaussians)), np.exp(0.3 * random.standard_normal((heads, gaussians)))


@pytest.mark.parametrize("far", [0.0, 6.0, 40.0], ids=["near", "near_the_floor", "no_weight"])
def test_weights_are_those_of_the_product(far: float):
    x, offsets, widths = drawn(3)
    want = by_the_equations(x, offsets + far, widths)
    sums = want[:, :3].sum(1)
    assert {0.0: sums.min() > 0.999, 6.0: 0 < sums.min() < 0.99, 40.0: sums.max() < 1e-6}[far], "the floor is met"
    got = gaussian_weights(x, offsets + far, widths, axis=1)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-7)


def test_weights_of_an_axis_sum_to_one_and_wide_gaussians_are_uniform():
    x, offsets, widths = drawn(2)
    np.testing.assert_allclose(gaussian_weights(x, offsets, widths, axis=1).sum(1), 2, rtol=1e-6)
    # One Gaussian: the product of several wide ones is below the floor.
    for axis, each in ((0, 1), (1, 1 / 5), (2, 1 / 2)):
        weights = gaussian_weights(x, offsets[:, :1], np.full((2, 1), 1e4), axis=axis)
        np.testing.assert_allclose(np.moveaxis(weights, axis, 0)[0], each, rtol=1e-5)


def test_chunks_of_one_value_and_of_none():
    x, offsets, widths = drawn(8)
    # 11 values: seven of one and one of four; 4 values: all are the last head's.
    for axis in (1, 2):
        gradient = jax.jit(jax.grad(lambda a, axis=axis: gaussian_weights(a, offsets, widths, axis=axis)[:, 1].sum()))(
            x
        )
        assert jnp.isfinite(gaussian_weights(x, offsets, widths, axis=axis)).all() and jnp.isfinite(gradient).all()
    alone = gaussian_weights(x, offsets[-1:], widths[-1:], axis=2)
    np.testing.assert_allclose(gaussian_weights(x, offsets, widths, axis=2), alone, rtol=1e-6)


@pytest.mark.parametrize("heads", [3, 12])
def test_masked_and_packed_tokens_with_chunks(heads: int):
    x, offsets, widths = drawn(heads)
    mask = np.array([[1, 0, 1, 1, 0, 1, 1, 1, 0, 1, 1], [0] * 11], bool)
    ids = np.array([[4] * 7 + [9] * 4] * 2)
    got = gaussian_weights(x, offsets, widths, axis=1, mask=mask, segment_ids=ids)
    for part in (slice(0, 7), slice(7, 11)):
        real = mask[0, part]
        want = gaussian_weights(x[:1, part][:, real], offsets, widths, axis=1)
        assert relative_rms(got[:1, part][:, real], want) < 1e-5
    assert not got[~mask].any()


def weights_of(x: jax.Array, axis: str | int, offsets: jax.Array, widths: jax.Array) -> jax.Array:
    mixer = GaussianAttention(5, num_heads=2, num_gaussians=3, axis=axis, layout=Layout.IMAGE, rngs=nnx.Rngs(0))
    for head, delta, width in zip(mixer.heads, offsets, widths, strict=True):
        head.mean_offsets[...], head.widths[...] = delta, width
    return nnx.jit(lambda mixer, x: mixer.weigh(x)[1])(mixer, x)


def test_axes_of_an_image():
    x = jax.random.normal(jax.random.key(0), (2, 4, 6, 5))
    offsets, widths = jnp.zeros((2, 3)), jnp.ones((2, 3))
    whole, rows, channels = (weights_of(x, axis, offsets, widths) for axis in ("tokens", 1, "channels"))
    np.testing.assert_allclose(whole.sum((1, 2)), 2, rtol=1e-5)
    np.testing.assert_allclose(rows.sum(1), 2, rtol=1e-5)
    np.testing.assert_allclose(channels.sum(-1), 2, rtol=1e-5)


def test_padding_values_pass_and_their_zeros_count():
    x = drawn(1)[0]
    padded = x.copy()
    padded[:, 8:] = -7.0
    mixer = GaussianAttention(4, num_gaussians=3, padding_value=-7.0, rngs=nnx.Rngs(0))
    y, weights = mixer.weigh(padded)
    np.testing.assert_array_equal(y[:, 8:], padded[:, 8:])
    zeroed = np.where(padded == -7.0, 0, padded)
    mean, deviation = zeroed.mean(1, keepdims=True), zeroed.std(1, ddof=1, keepdims=True)
    p = np.exp(-0.5 * (((padded - mean) / deviation)[..., None] / np.asarray(mixer.heads[0].widths[...])) ** 2).prod(-1)
    assert relative_rms(weights, p / p.sum(1, keepdims=True)) < 1e-5


def test_stack_is_its_layers_with_residuals():
    x = jax.random.normal(jax.random.key(0), (2, 8, 6))
    stack = GaussianStack(6, depth=2, num_heads=(2, 1), axis=("tokens", "channels"), rngs=nnx.Rngs(0))
    call = nnx.jit(lambda mixer, x: mixer(x))
    first = call(stack.layers[0], x) + x
    np.testing.assert_allclose(call(stack, x), call(stack.layers[1], first) + first, rtol=1e-5)
    with pytest.raises(UnsupportedArgument, match="key_mask"):
        stack(x, mask=jnp.ones((2, 8), bool))


def test_importance_is_from_zero_to_one():
    weights = np.broadcast_to(np.array([0.1, 0.5, 0.3]), (4, 7, 3))
    np.testing.assert_allclose(importance_factor(weights, (0, 1)), [0, 1, 0.5], atol=1e-6)
    assert not importance_factor(np.ones((4, 7, 3)), (0, 1)).any()


def test_refuses_what_does_not_fit():
    x, offsets, widths = drawn(2)
    for match, call in {
        "axis 3": lambda: gaussian_weights(x, offsets, widths, axis=3),
        r"\(H, G\)": lambda: gaussian_weights(x, offsets[0], widths[0]),
        "axis 1 of tokens": lambda: gaussian_weights(x, offsets, widths, axis=2, mask=np.ones((2, 11), bool)),
        r"mask must be \(2, 11\)": lambda: gaussian_weights(x, offsets, widths, axis=1, mask=np.ones((2, 4), bool)),
        "'tokens', 'channels'": lambda: GaussianAttention(4, axis="rows", rngs=nnx.Rngs(0)),
        "num_heads": lambda: GaussianAttention(4, num_heads=0, rngs=nnx.Rngs(0)),
        "num_gaussians": lambda: GaussianAttention(4, num_gaussians=0, rngs=nnx.Rngs(0)),
        "one for each of 2 layers": lambda: GaussianStack(4, num_heads=(1, 1, 2), rngs=nnx.Rngs(0)),
    }.items():
        with pytest.raises(ValueError, match=match):
            call()
