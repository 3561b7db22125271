"""The families PVT, Swin, CSwin and DeiT, and the papers' models made of them."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab.attention.dense.softmax_attention import SoftmaxAttention
from attnlab.attention.linear.agent_attention import AgentAttention
from attnlab.attention.local.window_attention import WindowAttention
from attnlab.contract import Given, UnsupportedArgument
from attnlab.models import named_models
from attnlab.models.agent_transformers import AGENT_TRANSFORMERS, AgentDeiT, AgentPVT, AgentSwin, agent_transformer
from attnlab.models.cswin import CSwinTransformer
from attnlab.models.deit import DeiT
from attnlab.models.inline_transformers import INLINE_TRANSFORMERS, InlinePVT, NormedInlineAttention
from attnlab.models.pvt import PyramidVisionTransformer
from attnlab.models.staged import build_named
from attnlab.models.swin import SwinTransformer

# Parameters, as the authors' code has them (their tables round them to millions).
SIZES = {
    "agent_pvt_tiny": 11_570_352,
    "agent_swin_tiny": 28_902_964,
    "agent_deit_base": 87_204_904,
    "inline_cswin_tiny": 20_604_520,
    "inline_deit_small": 16_734_760,
    "biformer_tiny": 13_142_760,
    "biformer_small": 25_536_232,
    "biformer_base": 56_804_968,
    "biformer_stl": 28_372_552,
    "biformer_stl_nchw": 28_372_552,
    "l2vit_tiny": 28_596_781,
    "l2vit_small": 50_199_157,
    "l2vit_base": 88_577_188,
    "ravlt_tiny": 14_897_768,
    "ravlt_small": 25_591_208,
    "soft_tiny": 13_069_056,
    "davit_tiny": 28_360_168,
    "davit_small": 49_745_896,
    "davit_base": 87_954_408,
    "cswin_tiny": 22_320_552,
    "cswin_small": 34_643_304,
    "cswin_base": 77_382_184,
    "cswin_large": 173_262_664,
    "crossformer_tiny": 27_776_794,
    "crossformer_small": 30_657_394,
    "crossformer_base": 51_971_554,
    "crossformer_large": 91_971_184,
    "crossformerpp_small": 23_325_340,
    "crossformerpp_huge": 95_962_944,
    "maxvit_tiny_tf_224": 30_916_528,
    "maxvit_small_tf_224": 68_927_956,
    "maxvit_base_tf_224": 119_467_708,
    "maxvit_large_tf_224": 211_785_560,
    "maxvit_xlarge_tf_384": 475_323_472,
    "maxvit_nano_rw_256": 15_451_148,
    "maxvit_tiny_rw_224": 29_057_312,
    "halonet_h1": 8_100_056,
    "halonet26t": 12_480_288,
    "ppma_tiny": 14_335_272,
    "ppma_small": 26_969_472,
    "ppma_base": 54_158_524,
    "tap_fan_tiny_12_p16_224": 7_404_688,
    "tap_fan_small_12_p16_224": 28_513_048,
    "tap_fan_base_18_p16_224": 54_643_360,
    "tap_fan_large_24_p16_224": 80_992_468,
    "cait_xxs24_224": 11_956_264,
    "cait_xxs24_384": 12_029_224,
    "cait_xxs36_224": 17_299_720,
    "cait_xxs36_384": 17_372_680,
    "cait_xs24_384": 26_670_088,
    "cait_s24_224": 46_916_200,
    "cait_s24_384": 47_062_120,
    "cait_s36_384": 68_366_632,
    "cait_m36_384": 271_221_352,
    "cait_m48_448": 356_460_520,
    "vit_tiny_patch16_224": 5_717_416,
    "vit_small_patch16_224": 22_050_664,
    "vit_base_patch16_224": 86_567_656,
    "vit_large_patch16_224": 304_326_632,
    "vit_medium_patch16_reg4_gap_256": 38_881_768,
    "vit_base_patch16_reg4_gap_256": 86_615_272,
    "vit_small_patch14_reg4_dinov2": 22_442_344,
    "vit_base_patch14_reg4_dinov2": 87_351_016,
    "vit_large_patch14_reg4_dinov2": 305_395_688,
    "davit_base_fl": 91_395_048,
    "deit_tiny": 5_717_416,
    "deit_small": 22_050_664,
    "deit_base": 86_567_656,
    "deit3_small": 22_059_496,
    "deit3_base": 86_585_320,
    "deit3_large": 304_374_760,
    "crossvit_9": 8_553_296,
    "crossvit_9_dagger": 8_776_592,
    "crossvit_15": 27_528_464,
    "crossvit_15_dagger": 28_209_008,
    "crossvit_18": 43_271_408,
    "crossvit_18_dagger": 44_266_976,
    "crossvit_15_dagger_408": 28_500_080,
    "crossvit_18_dagger_408": 44_606_560,
    "crossvit_tiny": 7_014_800,
    "crossvit_small": 26_856_272,
    "crossvit_base": 105_025_232,
}
PYRAMID = {"num_heads": (2, 2), "depths": (2, 1), "image_size": 32, "num_classes": 3}
FAMILIES = {
    PyramidVisionTransformer: {**PYRAMID, "features": (8, 8), "reductions": (2, 1), "mlp_ratios": (1, 1)},
    SwinTransformer: {**PYRAMID, "features": 8, "window": 4},
    CSwinTransformer: {**PYRAMID, "features": 8, "splits": (2, 4)},
    DeiT: {"features": 8, "num_heads": 2, "depth": 3, "image_size": 32, "num_classes": 3},
}


def number_of_parameters(model: nnx.Module) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


QUICK = ("agent_pvt_tiny", "biformer_tiny", "davit_tiny", "cswin_tiny", "crossformer_tiny", "maxvit_nano_rw_256")
QUICK += ("ppma_tiny", "tap_fan_tiny_12_p16_224", "vit_medium_patch16_reg4_gap_256")


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in SIZES])
def test_named_models_have_the_papers_size(name):
    model = nnx.eval_shape(lambda: build_named(named_models(), name, rngs=nnx.Rngs(0)))
    assert number_of_parameters(model) == SIZES[name]


def test_names_are_suggested():
    with pytest.raises(KeyError, match="did you mean agent_swin_tiny"):
        agent_transformer("agent_swin_tinny", rngs=nnx.Rngs(0))
    assert set(INLINE_TRANSFORMERS).isdisjoint(AGENT_TRANSFORMERS)


@pytest.mark.parametrize("family", FAMILIES)
def test_families_have_their_own_mixer_and_take_any_other(family):
    images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    own = nnx.eval_shape(lambda: family(**FAMILIES[family], rngs=nnx.Rngs(0))).blocks[0].mixer
    for mixer in ("hedgehog", "softmax_attention"):
        for count in (None, 1):
            replaced = count if family is DeiT else (count, 0)
            options = {"mixers": mixer, "replaced": replaced, "dtype": jnp.bfloat16}
            model = nnx.eval_shape(lambda o=options: family(**FAMILIES[family], **o, rngs=nnx.Rngs(0)))  # fmt: skip
            kinds = [isinstance(block.mixer, type(own)) for block in model.blocks]
            if type(own).__name__ != "SoftmaxAttention" or mixer == "hedgehog":
                kept = {(False, None): [0, 0, 1], (False, 1): [0, 1, 1], (True, None): [0] * 3, (True, 1): [0, 1, 1]}
                assert kinds == [bool(k) for k in kept[family is DeiT, count]]
            logits = nnx.eval_shape(lambda m, x: m(x), model, images)
            assert logits.shape == (2, 3) and logits.dtype == jnp.float32


def test_features_at_every_stage_and_without_a_head():
    images = jnp.ones((2, 32, 32, 3))
    swin = nnx.eval_shape(lambda: SwinTransformer(**FAMILIES[SwinTransformer] | {"num_classes": 0}, rngs=nnx.Rngs(0)))
    assert [part.shape for part in nnx.eval_shape(lambda m: m.stages(images), swin)] == [(2, 8, 8, 8), (2, 4, 4, 16)]
    deit = DeiT(**FAMILIES[DeiT], rngs=nnx.Rngs(0))
    (grid,), tokens, pooled, logits = nnx.jit(
        lambda m, x: (m.stages(x), m.tokens(x), m.pooled(x), m(x))
    )(deit, images)  # fmt: skip
    assert grid.shape == (2, 2, 2, 8) and tokens.shape == (2, 5, 8)
    np.testing.assert_allclose(deit.norm(grid).reshape(2, 4, 8), tokens[:, 1:], atol=1e-6)
    np.testing.assert_allclose(deit.head(pooled), logits, atol=1e-6)
    np.testing.assert_array_equal(pooled, tokens[:, 0])
    assert nnx.eval_shape(lambda m: m(images), swin).shape == (2, 16)


def test_swin_clips_and_shifts_windows():
    model = AgentSwin(
        features=8, num_heads=(2, 2), depths=(2, 2), replaced=(None, 0), num_agents=(4, 4), agent_window=14,
        image_size=56, patch_size=2, num_classes=3, rngs=nnx.Rngs(0),
    )  # fmt: skip
    mixers = [block.mixer for block in model.blocks]
    assert [type(mixer) for mixer in mixers] == [AgentAttention] * 2 + [WindowAttention] * 2
    assert [mixer.windows.size for mixer in mixers] == [(14, 14)] * 2 + [(7, 7)] * 2
    assert [mixer.windows.shift for mixer in mixers] == [(0, 0), (7, 7), (0, 0), (3, 3)]


def test_deit_takes_agents_in_the_first_blocks():
    sizes = {"features": 8, "num_heads": 2, "image_size": 16, "patch_size": 4}
    model = AgentDeiT(**sizes, depth=3, replaced=2, num_agents=(4, 1, 4), rngs=nnx.Rngs(0))
    assert [type(block.mixer) for block in model.blocks] == [AgentAttention, AgentAttention, SoftmaxAttention]
    with pytest.raises(UnsupportedArgument, match=r"WindowAttention takes image.*behind a prefix of 1"):
        DeiT(**sizes, mixers="window_attention", rngs=nnx.Rngs(0))


def test_the_kernels_of_inline_in_cswin_follow_from_the_mean_in_front_of_the_norm():
    mixer = NormedInlineAttention(8, num_heads=2, grid=(3, 4), rngs=nnx.Rngs(0))
    x = 3 + jax.random.normal(jax.random.key(0), (2, 3, 4, 8))
    np.testing.assert_allclose(mixer(x), mixer.attend(mixer.norm(x), x.mean((1, 2)), Given()), atol=1e-5)
    assert not np.allclose(mixer(x), mixer.attend(mixer.norm(x), mixer.norm(x).mean((1, 2)), Given()), atol=1e-3)


def small_pvt(**options):
    stages = {"features": (8, 8, 8, 8), "num_heads": (2,) * 4, "depths": (1,) * 4, "mlp_ratios": (1,) * 4}
    return InlinePVT(**(stages | {"image_size": 32, "num_classes": 3} | options), rngs=nnx.Rngs(params=0, dropout=1))


def test_pvt_takes_other_image_sizes_where_its_mixers_do():
    sizes, wide = FAMILIES[PyramidVisionTransformer], jax.ShapeDtypeStruct((1, 64, 96, 3), jnp.float32)
    model = nnx.eval_shape(lambda: PyramidVisionTransformer(**sizes, rngs=nnx.Rngs(0)))
    assert nnx.eval_shape(lambda m, x: m(x), model, wide).shape == (1, 3)
    with pytest.raises(ValueError, match="images must be"):
        nnx.eval_shape(lambda m: m(jnp.ones((1, 34, 32, 3))), model)
    agents = AgentPVT(
        features=(8,) * 4, num_heads=(2,) * 4, depths=(1,) * 4, num_agents=(4,) * 4, image_size=64, rngs=nnx.Rngs(0)
    )
    with pytest.raises(ValueError, match=r"built for .*\(16, 16\)"):
        nnx.eval_shape(lambda m, x: m(x), agents, wide)


@pytest.mark.slow
def test_training_differs_from_evaluation():
    images = jax.random.normal(jax.random.key(0), (4, 32, 32, 3))
    exact = nnx.jit(lambda m: m(images))(small_pvt())
    model = small_pvt(drop_path=0.5, dropout=0.1)
    trained, evaluated = nnx.jit(lambda m: (m(images, deterministic=False), m(images)))(model)
    np.testing.assert_allclose(evaluated, exact, atol=1e-6)
    assert not np.allclose(trained, exact)


def test_refuses_lists_of_different_lengths_and_images_that_patches_do_not_tile():
    with pytest.raises(ValueError, match="num_heads must have one entry for each of 4 stages, got 3"):
        small_pvt(num_heads=(2, 2, 2))
    with pytest.raises(ValueError, match=r"image_size must be a multiple of \(32, 32\), got \(48, 48\)"):
        small_pvt(image_size=48)
