"""Long and short distance attention: its groups, padding, and the network of its biases."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab.attention.local.crossformer import LongShortDistanceAttention, groups
from attnlab.nn.windows import DilatedWindows, ShiftedWindows


def attention_map(mixer, x):
    _, found = nnx.capture(mixer, nnx.Intermediate)(x)
    return found["attention"][0]


def build(**options):
    sizes = {"num_heads": 2, "group": 2, "interval": 3, "bias_features": 4}
    return LongShortDistanceAttention(8, **(sizes | options), rngs=nnx.Rngs(0))


def seen(mixer, x):
    return np.asarray(attention_map(mixer, x))[0].any(0)


def test_groups_of_long_distance_are_local_to_a_tile():
    x = jax.random.normal(jax.random.key(0), (1, 12, 6, 8))
    rows, columns = np.divmod(np.arange(72), 6)
    far = seen(build(long=True), x)
    same = [(at // 6 == (at // 6)[:, None]) & (at % 3 == (at % 3)[:, None]) for at in (rows, columns)]
    assert (far == (same[0] & same[1])).all()
    assert (far.sum(1) == 4).all()


def test_short_images_are_attended_in_windows_of_their_side():
    assert groups((3, 9), 4, 2, long=True) == ShiftedWindows((3, 3))
    assert groups((8, 8), 4, None, long=True) == DilatedWindows((4, 4), (2, 2))


@pytest.mark.parametrize("hidden", [True, False])
def test_padding_is_hidden_or_attended_to(hidden):
    x = jax.random.normal(jax.random.key(1), (1, 5, 7, 8))
    rows = np.asarray(attention_map(build(long=True, centred=hidden, hide_padding=hidden), x)).sum(-1)
    assert rows.shape == (1, 2, 35) and (abs(rows - 1) < 1e-5).all() == hidden and (rows.min() < 0.99) != hidden


def test_one_network_makes_the_biases_of_groups_of_any_size():
    mixer, other = build(group=4, long=False), build(group=6, long=False)
    nnx.update(other, nnx.state(mixer))
    x = jax.random.normal(jax.random.key(2), (1, 12, 12, 8))
    assert other(x).shape == x.shape
    four, six = mixer.core.bias(), other.core.bias()
    # Offset (1, -2), as query - key, has one bias in groups of either size.
    np.testing.assert_allclose(four[:, 4 + 0, 2], six[:, 6 + 0, 2], atol=1e-6)
    np.testing.assert_array_equal(jnp.shape(six), (2, 36, 36))
