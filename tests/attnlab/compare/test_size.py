"""Models of equal size by their width."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab.compare import size
from attnlab.experiment import PyramidViTConfig, ViTConfig
from experiments import digits_vit

INFO = digits_vit.CONFIG.open().info
INPUTS = jax.ShapeDtypeStruct((1, *INFO.image_shape), jnp.float32)


def small(mixer="softmax_attention", **options):
    model = ViTConfig(patch_size=2, features=32, depth=2, num_heads=2, mixer=mixer, **options)
    return dataclasses.replace(digits_vit.CONFIG, model=model)


def test_counts_the_operations_of_a_program():
    def program(x, w, kernel):
        def turn(carry, row):
            return carry * 2.0, row.sum()

        _, sums = jax.lax.scan(turn, x, x)
        picture = jax.lax.conv(x.reshape(1, 1, 4, 6), kernel, (1, 1), "VALID")
        return jax.jit(lambda x: jnp.exp(x @ w))(x), sums, picture, jnp.pad(x, 1).T

    shapes = [(4, 6), (6, 5), (3, 1, 2, 2)]
    jaxpr = jax.make_jaxpr(program)(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)).jaxpr
    product, exponential, loop, convolution = 2 * 4 * 5 * 6, 4 * 5, 4 * (24 + 6), 2 * (3 * 3 * 5) * 4
    assert size.operations(jaxpr) == product + exponential + loop + convolution
    with pytest.raises(ValueError, match="a loop in it ends by what it computes"):
        size.operations(jax.make_jaxpr(lambda x: jax.lax.while_loop(lambda x: x < 3, lambda x: x + 1, x))(0.0).jaxpr)


def test_size_of_a_model():
    built = small().model.build(INFO, rngs=nnx.Rngs(0))
    assert size.size_of(small(), INFO, "parameters", INPUTS) == sum(
        np.size(leaf) for leaf in jax.tree.leaves(nnx.state(built, nnx.Param))
    )
    # Linear maps of 16 tokens: q, k, v and out, and a feed-forward of ratio 4; products with keys and values.
    products = 2 * 2 * (16 * 12 * 32 * 32 + 2 * 16 * 16 * 32)
    assert products < size.size_of(small(), INFO, "flops", INPUTS) < 1.3 * products


@pytest.mark.parametrize("measure", size.MEASURES)
def test_the_width_with_the_nearest_size(measure):
    target = int(0.7 * size.size_of(small("inline_attention"), INFO, measure, INPUTS))
    matched = size.matched(small("inline_attention"), INFO, measure, INPUTS, target)
    assert matched.model.features < 32 and matched.model.features % 4 == 0 and matched.model.num_heads == 2
    for features in (matched.model.features - 4, matched.model.features + 4):
        other = dataclasses.replace(matched, model=dataclasses.replace(matched.model, features=features))
        distances = [abs(size.size_of(one, INFO, measure, INPUTS) - target) for one in (matched, other)]
        assert distances[0] <= distances[1]
    assert size.matched(small(), INFO, measure, INPUTS, size.size_of(small(), INFO, measure, INPUTS)) == small()


def test_stages_keep_their_proportions():
    model = PyramidViTConfig(features=(8, 16, 32, 64), depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8), patch_size=1)
    trial = dataclasses.replace(digits_vit.CONFIG, model=model)
    target = 4 * size.size_of(trial, INFO, "parameters", INPUTS)
    found = size.matched(trial, INFO, "parameters", INPUTS, target).model
    assert found.features == tuple(found.features[0] * factor for factor in (1, 2, 4, 8))
    assert 14 <= found.features[0] <= 18 and size.width(found).startswith(f"{found.features[0]} · ")


def test_what_has_no_width_is_refused():
    @dataclasses.dataclass(frozen=True)
    class OtherConfig:
        depth: int = 1

    trial = dataclasses.replace(digits_vit.CONFIG, model=OtherConfig())
    with pytest.raises(ValueError, match="Other has no options features and num_heads"):
        size.matched(trial, INFO, "parameters", INPUTS, 10)
