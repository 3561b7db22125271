"""A memory of earlier segments: what it holds, who sees it, and what has gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import UnsupportedArgument
from attnlab.models.transformer_xl import TransformerXL

SMALL = {"features": 8, "depth": 2, "num_heads": 2, "mlp_features": 8, "mixer_options": {"rcmha": {"max_offset": 16}}}
IDS = np.random.default_rng(0).integers(0, 7, (2, 9))


@pytest.fixture(scope="module")
def model():
    model = TransformerXL(7, **SMALL, memory_length=5, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(1)
    for block in model.blocks.blocks:
        for table in (block.mixer.core.key_vectors, block.mixer.core.key_bias):
            table[...] = jnp.asarray(rng.standard_normal(table.shape), jnp.float32)
    return model


def test_two_segments_see_the_first(model):
    first, memory = model.extend(IDS[:, :4])
    np.testing.assert_allclose(first, model(IDS[:, :4]), rtol=1e-5, atol=1e-5)
    assert [m.shape for m in memory] == [(2, 4, 8)] * 2
    second, after = model.extend(IDS[:, 4:], memory)
    assert [m.shape for m in after] == [(2, 5, 8)] * 2, "at most memory_length"
    changed = IDS.copy()
    changed[0, 1] = (changed[0, 1] + 1) % 7
    other, _ = model.extend(changed[:, 4:], model.extend(changed[:, :4])[1])
    difference = np.abs(other - second).max((1, 2))
    assert difference[0] > 1e-4, "a token of the first segment is seen in the second"
    assert difference[1] == 0, "by its own example"
    assert np.abs(model.extend(IDS[:, 4:])[0] - second).max() > 1e-3, "without memory it is not"


def test_memory_has_no_gradient(model):
    def loss(x):
        memory = (x, x)
        logits, after = model.extend(IDS[:, 4:], memory)
        return logits.sum() + sum(m.sum() for m in after)

    assert not np.any(jax.grad(loss)(jnp.ones((2, 3, 8))))


def test_refusals(model):
    with pytest.raises(UnsupportedArgument, match=r"attend\(x, memory\)"):
        TransformerXL(7, **{**SMALL, "mixer": "phantom", "mixer_options": None}, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="memory_length"):
        TransformerXL(7, **SMALL, memory_length=0, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="of 2 layers"):
        model.extend(IDS, model.init_memory(2)[:1])
