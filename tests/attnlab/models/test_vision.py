import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import attnlab
from attnlab import Layout, Pattern, UnsupportedArgument
from attnlab.measure import watch
from attnlab.models.pyramid_vit import PyramidViT
from attnlab.models.vit import ViT
from attnlab.nn.resampling import resize_bicubic

VISION = sorted(
    set(attnlab.names(kind=attnlab.Kind.MIXER, pattern=Pattern.SELF, layout=Layout.IMAGE))
    | set(attnlab.names(kind=attnlab.Kind.MIXER, pattern=Pattern.SELF, layout=Layout.SEQUENCE))
)

# One of each kind of base in `make test`, all in `make test-slow`.
QUICK = {"softmax_attention", "window_attention", "biformer_bra", "lightnet", "neighborhood_attention", "hornet"}
EVERY = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in VISION]


def images(size=(8, 8), channels=1, batch=2) -> jax.Array:
    return jax.random.normal(jax.random.key(0), (batch, *size, channels))


def vit(image_size=(8, 8), **options) -> ViT:
    sizes = {"channels": 1, "patch_size": 2, "features": 16, "depth": 2, "num_heads": 2}
    return ViT(image_size, 10, **(sizes | options), rngs=nnx.Rngs(0))


@pytest.mark.parametrize("mixer", EVERY)
def test_every_mixer_of_images_fits_a_vit_and_a_pyramid(mixer):
    """The pyramid goes down to a single token, through odd grids."""
    x = images((12, 20))
    model = nnx.eval_shape(lambda: vit((12, 20), mixer=mixer))
    logits = nnx.eval_shape(lambda model: model(x), model)
    assert logits.shape == (2, 10) and logits.dtype == jnp.float32
    sizes = {"patch_size": 2, "features": (8, 8, 16, 16), "depths": (1, 1, 1, 1), "num_heads": (2, 2, 4, 4)}
    pyramid = PyramidViT((12, 20), 10, channels=1, mixer=mixer, **sizes, rngs=nnx.Rngs(0))
    maps, logits = nnx.jit(lambda model, x: (model.stages(x), model(x)))(pyramid, x)
    assert [part.shape[1:] for part in maps] == [(6, 10, 8), (3, 5, 8), (2, 3, 16), (1, 2, 16)]
    assert jnp.isfinite(logits).all()


def test_a_mixer_for_each_layer_and_stage():
    model = vit(depth=4, mixer=("hedgehog", "softmax_attention"))
    assert [type(b.mixer).__name__ for b in model.blocks] == ["HedgehogAttention", "SoftmaxAttention"] * 2
    mixers = ("agent_attention", ("hedgehog", "softmax_attention"), "softmax_attention", "softmax_attention")
    pyramid = PyramidViT(
        (16, 16), 3, patch_size=2, features=(8,) * 4, depths=(1, 2, 1, 1), num_heads=(2,) * 4, mixer=mixers,
        mixer_options={"agent_attention": {"num_agents": 4}}, rngs=nnx.Rngs(0),
    )  # fmt: skip
    kinds = [type(b.mixer).__name__ for b in pyramid.blocks]
    assert kinds == ["AgentAttention", "HedgehogAttention", "SoftmaxAttention", "SoftmaxAttention", "SoftmaxAttention"]


@pytest.mark.parametrize("pooling", ["mean", "cls", "efficient_probing", "efficient_probing.siglip"])
def test_poolings(pooling):
    model = nnx.eval_shape(lambda: vit(pooling=pooling))
    shapes = nnx.eval_shape(lambda model: (model(images()), model.tokens(images())), model)
    assert [part.shape for part in shapes] == [(2, 10), (2, 16 + (pooling == "cls"), 16)]


def test_mixers_of_images_that_know_of_a_prefix_stand_behind_a_class_token():
    model = vit(pooling="cls", position="sincos", mixer=("agent_attention", "hedgehog"))
    assert [block.mixer.prefix for block in model.blocks] == [1, 0]
    tokens, (grid,) = nnx.jit(lambda model: (model.tokens(images()), model.stages(images())))(model)
    assert tokens.shape == (2, 17, 16) and grid.shape == (2, 4, 4, 16)


def test_registers_and_class_tokens_stand_in_front_and_are_not_pooled():
    model, x = vit(registers=2, class_token=True), images()
    tokens = model.tokens(x)
    assert tokens.shape == (2, 19, 16) and model.stage[0].position.table.shape == (17, 16)
    np.testing.assert_allclose(model.pooled(x), tokens[:, 3:].mean(1), atol=1e-5)
    model.stage[0].position.table[...] *= 0
    assert not model.stage[0].position(jnp.zeros((1, 19, 16))).any()
    pooled = nnx.eval_shape(lambda: vit(registers=1, pooling="efficient_probing"))
    assert nnx.eval_shape(lambda model: model(x), pooled).shape == (2, 10)
    classes = vit(registers=2, pooling="cls")
    np.testing.assert_array_equal(classes.pooled(x), classes.tokens(x)[:, 0])
    for options, message in (
        ({"pooling": "cls", "class_token": False}, "class_token"),
        ({"registers": -1}, "at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            vit(**options)


@pytest.mark.parametrize("options", [{}, {"pooling": "cls", "registers": 1}, {"position": "sincos", "pooling": "cls"}])
def test_tables_are_resized_for_images_of_other_sizes(options):
    model, fixed = vit(resize="bicubic", **options), vit(**options)
    np.testing.assert_allclose(model(images()), fixed(images()), atol=1e-6)
    position, prefix = model.stage[0].position, model.stage[0].position.prefix
    (grid,) = model.stages(images((8, 12)))
    assert grid.shape == (2, 4, 6, 16)
    table = position(jnp.zeros((1, prefix + 24, 16) if prefix else (1, 4, 6, 16)), (4, 6)).reshape(-1, 16)[prefix:]
    own = position(jnp.zeros((1, prefix + 16, 16) if prefix else (1, 4, 4, 16))).reshape(-1, 16)[prefix:]
    want = resize_bicubic(own.reshape(1, 4, 4, 16), (4, 6)).reshape(-1, 16)
    np.testing.assert_allclose(table, want, atol=1e-6)
    with pytest.raises(ValueError, match="multiples of 2"):
        model(images((8, 11)))


def test_features_are_the_streams_behind_blocks():
    model, x = vit(pooling="cls"), images()
    features = model.features(x)
    assert [part.shape for part in features] == [(2, 17, 16)] * 2
    np.testing.assert_allclose(model.norm(features[-1]), model.tokens(x), atol=1e-5)
    np.testing.assert_allclose(model.stage[0].blocks[1](features[0]), features[1], atol=1e-5)
    np.testing.assert_array_equal(model.features(x, layers=(-1, 0))[1], features[0])
    streams = watch(model, x)[1]["stream"]
    np.testing.assert_allclose(streams[1], features[0], atol=1e-5)
    with pytest.raises(ValueError, match="among the 2 of the model"):
        model.features(x, layers=(2,))


@pytest.mark.parametrize("position", ["learned", "sincos", "none"])
def test_positions_tell_patches_apart(position):
    """Without positions, softmax attention with mean pooling sees a bag of patches."""
    model, x = vit(position=position, mixer_options={"softmax_attention": {}}), images()
    swapped = jnp.concatenate([x[:, 4:], x[:, :4]], axis=1)
    assert np.allclose(model(x), model(swapped), atol=1e-6) == (position == "none")


def test_captures_the_maps_of_every_layer():
    model = vit()
    logits, intermediates = nnx.capture(model, nnx.Intermediate)(images())
    np.testing.assert_array_equal(logits, model(images()))
    maps = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(intermediates) if "attention" in str(path)]
    assert [part.shape for part in maps] == [(2, 2, 16, 16)] * 2
    np.testing.assert_allclose(maps[0].sum(-1), 1, rtol=1e-5)


def test_drop_path_rises_with_depth_and_acts_in_training_alone():
    model = vit(depth=3, drop_path=0.4)
    assert model.blocks[0].drop_path is None
    assert [block.drop_path.rate for block in model.blocks[1:]] == pytest.approx([0.2, 0.4])
    np.testing.assert_array_equal(model(images()), model(images()))
    assert not np.allclose(model(images(), deterministic=False), model(images(), deterministic=False))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"patch_size": 3}, ValueError, "not a multiple of patch_size 3"),
        ({"position": "rotary"}, ValueError, "position must be one of"),
        ({"pooling": "efficient_probin"}, KeyError, "did you mean efficient_probing"),
        ({"pooling_options": {"num_queries": 2}}, ValueError, "registered pooling"),
        ({"pooling": "cls", "mixer": "window_attention"}, UnsupportedArgument, "behind a prefix of 1"),
        ({"mixer": "tnl.transnormer"}, UnsupportedArgument, "no tokens"),
    ],
)
def test_refusals(options, error, message):
    with pytest.raises(error, match=message):
        vit(**options)


def test_refuses_images_of_another_size():
    with pytest.raises(ValueError, match=r"images must be \(B, 8, 8, 1\), got \(2, 8, 12, 1\)"):
        vit()(images((8, 12)))


def test_pyramid_refuses_settings_of_unequal_length():
    with pytest.raises(ValueError, match="features must have one entry for each of 4 stages, got 3"):
        PyramidViT((16, 16), 2, features=(8, 8, 8), rngs=nnx.Rngs(0))
