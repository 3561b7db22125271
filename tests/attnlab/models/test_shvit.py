"""SHViT: sizes of the papers' models, and its convolutions with their norms folded in."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab.models.shvit import SHVITS, SHViT
from attnlab.models.staged import build_named
from attnlab.nn.conv import folded
from tests.accuracy import relative_rms

# The paper cuts its numbers off behind the first decimal.
MILLIONS = {"shvit_s1": 6.3, "shvit_s2": 11.4, "shvit_s3": 14.2, "shvit_s4": 16.5}


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n == "shvit_s1" else pytest.mark.slow) for n in MILLIONS])
def test_sizes_are_those_of_the_paper(name):
    model = nnx.eval_shape(lambda: build_named(SHVITS, name, rngs=nnx.Rngs(0)))
    count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    assert MILLIONS[name] <= count / 1e6 < MILLIONS[name] + 0.1


@pytest.mark.slow
def test_folded_norms_change_nothing_at_inference():
    sizes = {"features": (16, 24), "partial": (4, 6), "key_dim": (4, 4), "depths": (1, 1), "kinds": ("s", "s")}
    model = SHViT(**sizes, image_size=None, num_classes=3, rngs=nnx.Rngs(0))
    draw = np.random.default_rng(0)
    for _, part in nnx.iter_modules(model):
        if isinstance(part, nnx.BatchNorm):
            for values in (part.scale, part.mean, part.var):
                values[...] = jnp.asarray(draw.uniform(0.5, 1.5, values.shape), jnp.float32)
    images = draw.normal(size=(2, 64, 48, 3)).astype(np.float32)
    assert relative_rms(folded(model)(images), model(images)) < 1e-5


def test_other_kinds_are_refused():
    with pytest.raises(ValueError, match="kinds must be 's' or 'i'"):
        SHViT(kinds=("s", "s", "x"), rngs=nnx.Rngs(0))
