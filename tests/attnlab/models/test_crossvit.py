"""CrossViT: sizes of the models, scales of the branches, the fusion of class tokens; and the recipe of its training."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab.models.crossvit import CROSSVITS, CrossViT, MultiScaleBlock
from attnlab.models.staged import build_named
from attnlab.nn.resampling import resize_bicubic
from attnlab.objectives.fast_adversarial import fast_adversarial, random_quarter_turns, random_start

# Millions of parameters, as timm counts them.
MILLIONS = {
    "crossvit_tiny": 7.01,
    "crossvit_15": 27.53,
    "crossvit_9_dagger": 8.78,
    "crossvit_18_dagger_408": 44.61,
}
SMALL = {"features": (8, 12), "num_heads": (2, 2), "depths": ((1, 1, 0),), "mlp_ratios": (1.0, 1.0)}
SMALL |= {"image_size": 24, "image_scales": (1.0, 2 / 3), "patch_sizes": (12, 8), "num_classes": 3}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n == "crossvit_9_dagger" else pytest.mark.slow) for n in MILLIONS]
)
def test_sizes_are_those_of_timm(name):
    (depths,) = set(CROSSVITS[name][1]["depths"])  # alike in all blocks, of which two need not be built

    def parameters(blocks):
        form = {"depths": (depths,) * blocks}
        model = nnx.eval_shape(lambda: build_named(CROSSVITS, name, **form, rngs=nnx.Rngs(0)))
        return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))

    none, one = parameters(0), parameters(1)
    assert round((none + len(CROSSVITS[name][1]["depths"]) * (one - none)) / 1e6, 2) == MILLIONS[name]


@pytest.mark.slow
def test_branches_see_the_image_at_their_scale_and_logits_are_the_mean():
    model = CrossViT(**SMALL, rngs=nnx.Rngs(0))
    images = jax.random.normal(jax.random.key(0), (2, 24, 24, 3))
    seen = [model._scaled(images, size) for size in model.sizes]
    np.testing.assert_array_equal(seen[0], images)
    np.testing.assert_array_equal(seen[1], resize_bicubic(images, 16))
    cropped = CrossViT(**SMALL, crop=True, rngs=nnx.Rngs(0))._scaled(images, (16, 16))
    np.testing.assert_array_equal(cropped, images[:, 4:20, 4:20])

    @nnx.jit
    def run(model, images):
        return model(images), model.tokens(images), model.stages(images), model.pooled(images)

    logits, tokens, maps, pooled = run(model, images)
    each = [head(x[:, 0]) for head, x in zip(model.head, tokens, strict=True)]
    np.testing.assert_allclose(logits, (each[0] + each[1]) / 2, atol=1e-6)
    assert [x.shape for x in tokens] == [(2, 5, 8), (2, 5, 12)] and [x.shape for x in maps] == [
        (2, 2, 2, 8),
        (2, 2, 2, 12),
    ]
    np.testing.assert_array_equal(pooled, jnp.concatenate([x[:, 0] for x in tokens], 1))


def test_the_old_class_token_is_read_and_replaced_and_patches_are_left_alone():
    block = MultiScaleBlock((8, 12), num_heads=(2, 2), depths=(0, 0), fusion_depth=2, rngs=nnx.Rngs(0))
    x = [jax.random.normal(jax.random.key(i), (1, 4, width)) for i, width in enumerate((8, 12))]
    y = block(x)
    for before, after in zip(x, y, strict=True):
        np.testing.assert_array_equal(before[:, 1:], after[:, 1:])
    # Behind the first fusion there is the class token alone: the second adds its value.
    first, second = block.fusions[0]
    token = first(jnp.concatenate([block.go[0](x[0][:, :1]), x[1][:, 1:]], 1))
    value = second.mixer.attention.out(second.mixer.attention.value(second.norm(token)))
    np.testing.assert_allclose(y[0][:, :1], block.back[0](token + value), atol=1e-6)


def test_refusals():
    with pytest.raises(ValueError, match="branches must be 2, got 1"):
        MultiScaleBlock((8, 8), num_heads=(2, 2), depths=(0, 0), rngs=nnx.Rngs(0))([jnp.ones((1, 2, 8))])
    with pytest.raises(ValueError, match="patch_sizes must tile their images, got 7"):
        CrossViT(**SMALL | {"patch_sizes": (12, 7)}, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="multi_conv is for patches of 12 or 16"):
        CrossViT(**SMALL, multi_conv=True, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="must be square"):
        random_quarter_turns(jax.random.key(0), jnp.ones((1, 4, 5, 3)))
    with pytest.raises(ValueError, match="start must have the shape"):
        fast_adversarial(jnp.sum, jnp.ones((1, 4, 4, 3)), jnp.ones((4, 4, 3)))


def test_a_perturbation_raises_the_loss_within_its_bound():
    images = jax.random.uniform(jax.random.key(0), (3, 6, 6, 3))
    weights = jax.random.normal(jax.random.key(1), images.shape[1:])

    def loss(x):
        return (x * weights).sum((1, 2, 3))

    start = random_start(jax.random.key(2), images.shape)
    assert abs(start).max() <= 2 / 255 and start.std() > 1 / 255
    found = fast_adversarial(loss, images, start)
    assert abs(found - images).max() <= 2 / 255 + 1e-6 and found.min() >= 0 and found.max() <= 1
    assert (loss(found) > loss(jnp.clip(images + start, 0, 1))).all()
    # A step of 2.5 reaches the bound of 2 from all that lies above -0.5.
    inside = (images > 0.01) & (images < 0.99)
    reached = jnp.isclose(found - images, jnp.sign(weights) * 2 / 255, atol=1e-6)
    np.testing.assert_allclose((reached & inside).sum() / inside.sum(), 2.5 / 4, atol=0.1)


def test_all_four_turns_are_equally_likely():
    images = jnp.broadcast_to(jnp.arange(4.0).reshape(1, 2, 2, 1), (400, 2, 2, 1))
    corner = np.asarray(random_quarter_turns(jax.random.key(0), images)[:, 0, 0, 0]).astype(int)
    assert (abs(np.bincount(corner, minlength=4) - 100) < 40).all()
