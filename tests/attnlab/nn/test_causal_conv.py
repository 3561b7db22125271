"""Short causal convolutions: the equations, segments, padding, decoding in parts, gradients of what is absent."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab.nn.causal_conv import CausalConv, causal_conv
from tests.accuracy import relative_rms


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


KERNELS = {"depthwise": ("khd,", (4, 2, 3)), "shared": ("kd,", (4, 3)), "dense": ("khde,", (4, 2, 3, 5))}


@pytest.mark.parametrize("form", KERNELS)
def test_equals_the_sum(form):
    axes, shape = KERNELS[form]
    x, kernel = draw(0, 2, 7, 2, 3), draw(1, *shape)
    padded = np.pad(x, ((0, 0), (3, 0), (0, 0), (0, 0))).astype(np.float64)
    taps = np.stack([padded[:, tap : tap + 7] for tap in range(4)])
    want = np.einsum(f"{axes}kbnhd->bnh{'e' if form == 'dense' else 'd'}", kernel, taps)
    y, _ = causal_conv(x, kernel)
    assert relative_rms(y, want) < 1e-6
    first, state = causal_conv(x[:, :2], kernel)
    second, state = causal_conv(x[:, 2:], kernel, state=state)
    np.testing.assert_allclose(jnp.concatenate([first, second], 1), y, atol=1e-6)
    np.testing.assert_array_equal(state, x[:, 4:])


def test_segments_and_padding_are_as_if_alone():
    x, kernel, bias = draw(0, 1, 10, 4), draw(1, 3, 4), draw(2, 4)
    real = np.array([[0, 1, 1, 0, 0, 1, 1, 1, 0, 1]], bool)
    ids = np.array([[1, 1, 1, 1, 1, 1, 2, 2, 2, 2]])
    y, state = causal_conv(x, kernel, bias, real=real, segment_ids=ids)
    for segment in (1, 2):
        chosen = real[0] & (ids[0] == segment)
        np.testing.assert_allclose(y[:, chosen], causal_conv(x[:, chosen], kernel, bias)[0], atol=1e-6)
    np.testing.assert_array_equal(y[~real], 0)
    np.testing.assert_array_equal(state, x[:, [7, 9]])
    gradient = jax.grad(lambda x: (causal_conv(x, kernel, real=real)[0] ** 2).sum())(x)
    assert not gradient[~real].any() and gradient[real].all()


def test_what_stands_before_a_sequence():
    x, kernel, before = draw(0, 1, 6, 4), draw(1, 3, 4), draw(2, 4)
    ids = np.array([[1, 1, 1, 1, 2, 2]])
    y, _ = causal_conv(x, kernel, segment_ids=ids, before=before)
    for part in (slice(0, 4), slice(4, 6)):
        longer = np.concatenate([np.broadcast_to(before, (1, 2, 4)), x[:, part]], 1)
        np.testing.assert_allclose(y[:, part], causal_conv(longer, kernel)[0][:, 2:], atol=1e-6)


@pytest.mark.parametrize("form", KERNELS)
def test_module_decodes_and_refuses(form):
    conv = CausalConv((2, 3), 4, form=form, use_bias=True, rngs=nnx.Rngs(0))
    x, state = draw(0, 2, 5, 2, 3), conv.init_state(2)
    rows = []
    for t in range(5):
        y, state = conv(x[:, t : t + 1], state)
        rows.append(y)
    np.testing.assert_allclose(jnp.concatenate(rows, 1), conv(x)[0], atol=1e-6)
    with pytest.raises(ValueError, match="kernel_size must be at least 1"):
        CausalConv(4, 0, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="form must be one of"):
        CausalConv(4, 2, form="dense", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="does not fit"):
        causal_conv(draw(0, 2, 5, 4), draw(1, 3, 2, 2))
