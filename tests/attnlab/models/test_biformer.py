"""BiFormer: the published sizes, the stages, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import attnlab.interop
from attnlab.interop.names import StateDictError
from attnlab.models.biformer import BiFormer, BiFormerBlock, biformer_base, biformer_small, biformer_tiny

SMALL = {"depths": (1, 1, 1, 1), "widths": (8, 8, 16, 16), "head_dim": 4, "n_win": 2, "topks": (1, 2, 0, -2)}


@pytest.mark.parametrize(("build", "millions"), [(biformer_tiny, 13.1), (biformer_small, 25.5), (biformer_base, 56.8)])
def test_named_models_have_the_published_sizes(build, millions: float):
    model = nnx.eval_shape(lambda: build(rngs=nnx.Rngs(0)))
    count = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    assert round(count / 1e6, 1) == millions


def test_stages_halve_the_map_and_training_drops_branches():
    model = BiFormer(5, **SMALL, drop_path=0.5, rngs=nnx.Rngs(0))
    images = jax.random.normal(jax.random.key(0), (2, 64, 64, 3))
    shapes = [m.shape for m in nnx.jit(lambda model, x: model.features(x))(model, images)]
    assert shapes == [(2, 16, 16, 8), (2, 8, 8, 8), (2, 4, 4, 16), (2, 2, 2, 16)]
    train = nnx.jit(lambda model, x: model(x, deterministic=False))
    first, second = train(model, images), train(model, images)
    assert first.shape == (2, 5)
    assert not np.allclose(first, second)
    assert nnx.jit(lambda model, x: model(x))(model, images.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="topks must have one entry for each of the 4 stages, got 2"):
        BiFormer(5, **SMALL | {"topks": (1, 2)}, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="topk must be positive, 0, -1 or -2, got -3"):
        BiFormerBlock(8, num_heads=2, topk=-3, rngs=nnx.Rngs(0))
    model = BiFormer(5, **SMALL, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"BiFormer takes images \(B, Hh, Ww, 3\), got shape \(1, 64, 64, 1\)"):
        model(jnp.zeros((1, 64, 64, 1)))
    with pytest.raises(StateDictError, match=r"no 'downsample_layers\.0\.0\.weight'"):
        attnlab.interop.load(model, {"head.weight": np.zeros((5, 16))})
