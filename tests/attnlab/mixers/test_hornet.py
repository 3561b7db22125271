"""Recursive gated convolutions: their degree, and the sizes of the papers' models."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab.mixers.hornet import RecursiveGatedConv
from attnlab.models.hornet import HORNETS
from attnlab.models.staged import build_named
from tests.accuracy import relative_rms


def test_without_biases_it_is_homogeneous_of_degree_one_more_than_its_order():
    mixers = [RecursiveGatedConv(8, order=order, kernel_size=3, rngs=nnx.Rngs(0)) for order in (1, 2, 4)]
    x = np.random.default_rng(0).normal(size=(1, 5, 4, 8)).astype(np.float32)
    parts = [nnx.split(mixer) for mixer in mixers]

    @jax.jit
    def run(states, x):
        calls = [nnx.merge(graph, state) for (graph, _), state in zip(parts, states, strict=True)]
        return [(f(x), f(2 * x)) for f in calls]

    for order, (y, doubled) in zip((1, 2, 4), run([state for _, state in parts], x), strict=True):
        assert jnp.any(y != 0)
        assert relative_rms(doubled, 2 ** (order + 1) * y) < 1e-5


def test_refuses_what_does_not_divide():
    with pytest.raises(ValueError, match=r"2\^\(order - 1\) divide the 12 channels"):
        RecursiveGatedConv(12, order=4, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="spectrum must have 1 axes"):
        RecursiveGatedConv(8, order=2, spectrum=(4, 3), layout="sequence", rngs=nnx.Rngs(0))


# The paper has 22, 50 and 87 million; all differ by their widths alone.
@pytest.mark.parametrize(
    ("name", "size"),
    [("hornet_tiny_7x7", 22_409_512), pytest.param("hornet_base_gf", 88_421_352, marks=pytest.mark.slow)],
)
def test_named_models_have_the_papers_size(name, size):
    model = nnx.eval_shape(lambda: build_named(HORNETS, name, rngs=nnx.Rngs(0)))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))) == size
