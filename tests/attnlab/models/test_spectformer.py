"""SpectFormer's backbones: the papers' sizes, and logits of tokens under MixToken."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab.models.spectformer import SPECTFORMERS, HierarchicalSpectFormer
from attnlab.models.staged import build_named
from tests.accuracy import relative_rms

# The papers have 9, 20, 57 and 22.2, 54.7 million.
SIZES = {
    "spectformer_ti": 9_158_376,
    "spectformer_xs": 20_028_520,
    "spectformer_b": 57_159_656,
    "spectformer_h_s": 22_226_928,
    "spectformer_h_l": 54_675_792,
}
QUICK = ("spectformer_ti",)


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in SIZES])
def test_named_models_have_the_papers_size(name):
    model = nnx.eval_shape(lambda: build_named(SPECTFORMERS, name, rngs=nnx.Rngs(0)))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))) == SIZES[name]


@pytest.mark.slow
def test_logits_of_tokens():
    sizes = {"features": (4, 8), "num_heads": (2, 2), "depths": (1, 1), "mlp_ratios": (1, 1), "stem_features": 2}
    model = HierarchicalSpectFormer(**sizes, spectral=1, image_size=16, num_classes=3, rngs=nnx.Rngs(0))
    graph, state = nnx.split(model)
    x = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)

    @jax.jit
    def run(state, x):
        model = nnx.merge(graph, state)
        plain, mixed = (model.label_tokens(x, box=box) for box in (None, (0, 1, 1, 2)))
        twins = model.label_tokens(jnp.stack([x[0], x[0]]), box=(0, 1, 1, 2))
        return model(x), plain, mixed, twins

    logits, (of_class, of_tokens), (_, mixed), (_, twins) = run(state, x)
    assert of_tokens.shape == (2, 4, 3)
    assert relative_rms(logits, of_class + 0.5 * of_tokens.max(1)) < 1e-6
    assert relative_rms(mixed, of_tokens) > 1e-3, "the box changes what tokens see"
    assert relative_rms(twins[0], of_tokens[0]) < 1e-6, "an image mixed with itself is itself"
    plain = nnx.eval_shape(lambda: HierarchicalSpectFormer(token_label=False, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="token_label"):
        plain.label_tokens(x)
