"""BiFormer: the mixers of its stages, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import attnlab.interop
from attnlab.attention.linear.agent_attention import AgentAttention
from attnlab.interop.biformer_bra import OFFICIAL
from attnlab.interop.names import StateDictError
from attnlab.interop.official import ConfigError
from attnlab.models.biformer import BIFORMERS, BiFormer, ConvMixer, LocallyEnhancedAttention
from attnlab.models.biformer_stl import BIFORMER_STLS, BiFormerSTL
from attnlab.models.staged import build_named

SMALL = {
    "depths": (1, 1, 1, 1),
    "features": (8, 8, 16, 16),
    "head_dim": 4,
    "n_win": 2,
    "mixers": ("routed", "agent_attention", "convolution", "local"),
    "topks": (1, None, None, None),
}


@pytest.mark.slow
def test_stages_have_their_mixers_and_training_drops_branches():
    model = BiFormer(5, **SMALL, image_size=(64, 64), drop_path=0.5, rngs=nnx.Rngs(0))
    kinds = [type(block.mixer) for block in model.blocks[1:]]
    assert kinds == [AgentAttention, ConvMixer, LocallyEnhancedAttention]
    images = jax.random.normal(jax.random.key(0), (2, 64, 64, 3))
    train = nnx.jit(lambda model, x: model(x, deterministic=False))
    first, second = train(model, images), train(model, images)
    assert first.shape == (2, 5)
    assert not np.allclose(first, second)
    logits = nnx.eval_shape(lambda model, x: model(x), model, images.astype(jnp.bfloat16))
    assert logits.dtype == jnp.float32


@pytest.mark.parametrize("of_values", [False, True])
def test_a_local_part_is_added_in_front_of_the_last_map(of_values):
    mixer = LocallyEnhancedAttention(8, num_heads=2, side=3, of_values=of_values, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (2, 3, 4, 8))
    tokens = x.reshape(2, 12, 8)
    weights = mixer.core.attention(mixer.project(tokens, tokens, None), attnlab.contract.View())
    heads = jnp.einsum("bhnm,bmhe->bnhe", weights, mixer.value(tokens))
    source = mixer.value(x).reshape(x.shape) if of_values else x
    heads = heads + mixer.local(source).reshape(2, 12, 2, 4)
    np.testing.assert_allclose(mixer(x), mixer.out(heads).reshape(x.shape), atol=1e-6)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="topks must have one entry for each of 4 stages, got 2"):
        BiFormer(5, **SMALL | {"topks": (1, 2)}, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"topks go with the routed stages and are None in others, got \(1, 2, "):
        BiFormer(5, **SMALL | {"topks": (1, 2, None, None)}, rngs=nnx.Rngs(0))
    with pytest.raises(KeyError, match="no variant is called 'convolutions'"):
        BiFormer(5, **SMALL | {"mixers": ("routed", "convolutions", "plain", "local")}, rngs=nnx.Rngs(0))
    model = nnx.eval_shape(lambda: BiFormer(5, **SMALL, image_size=(64, 64), rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"images must be \(B, 64, 64, 3\), got \(1, 64, 64, 1\)"):
        model(jnp.zeros((1, 64, 64, 1)))
    with pytest.raises(StateDictError, match=r"has no .*'downsample_layers\.0\.0\.weight'"):
        own = SMALL | {"mixers": ("routed", "plain", "convolution", "local")}
        attnlab.interop.load(BiFormer(5, **own, rngs=nnx.Rngs(0)), {"head.weight": np.zeros((5, 16))})


@pytest.mark.parametrize(
    "name", ["biformer_stl_nchw", *(pytest.param(n, marks=pytest.mark.slow) for n in ("biformer_base", "biformer_stl"))]
)
def test_features_at_every_stage(name):
    table, fewer = BIFORMERS | BIFORMER_STLS, {"image_size": (224, 224), "depths": (1, 1, 1, 1)}
    model = nnx.eval_shape(lambda: build_named(table, name, **fewer, rngs=nnx.Rngs(0)))
    images = jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.bfloat16)
    maps, tokens, pooled, logits = nnx.eval_shape(
        lambda m, x: (m.stages(x), m.tokens(x), m.pooled(x), m(x)), model, images
    )
    assert [part.shape for part in maps] == [(2, 56 >> i, 56 >> i, 96 << i) for i in range(4)]
    assert tokens.shape[-1] == 768 and pooled.shape == (2, 768)
    assert logits.shape == (2, 1000) and logits.dtype == jnp.float32


def test_in_the_layout_of_swin_stages_say_what_does_not_fit():
    sizes = {"depths": (1, 1), "features": (8, 8), "n_wins": (2, 2), "mlp_ratios": (1, 1), "head_dim": 4}
    with pytest.raises(ValueError, match="topks go with the routed stages"):
        BiFormerSTL(5, **sizes, mixers=("regional", "local_values"), topks=(1, 1), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="norm must be one of batch, layer, got 'group'"):
        BiFormerSTL(5, **sizes, mixers=("plain", "plain"), topks=(None, None), norm="group", rngs=nnx.Rngs(0))


def test_official_names_in_the_layout_of_swin():
    config = {"depth": [1, 1], "embed_dim": [8, 8], "mlp_ratios": [1, 1], "n_wins": [2, 2], "head_dim": 4}
    later = {"stages.0.blocks.0.attn.qkv_linear.weight", "stages.1.blocks.0.attn.lepe.bias", "norm.bias"}
    first = {"stages.0.blocks.0.attn.qkv.qkv.weight", "stages.1.blocks.0.mlp.2.bias", "downsample_layers.1.0.bias"}
    for symbol, topks, some in (("nchwBiFormerSTL", [1, -1], later), ("BiFormerSTL", [2, 0], first)):
        (official,) = (each for each in OFFICIAL if each.symbol == symbol)
        model = nnx.eval_shape(lambda official=official, topks=topks: official.build(config | {"topks": topks}))
        names = official.rules(model).names()
        assert some < set(names) and len(set(names)) == len(names)
        assert not any(name.endswith("running_mean") for name in names), "norms are layer norms there by default"
        with pytest.raises(ConfigError, match="norm_layer must be BatchNorm2d or LayerNorm2d"):
            official.options(config | {"norm_layer": "GroupNorm"})
    with pytest.raises(ConfigError, match="topks must be positive or -1"):
        next(each for each in OFFICIAL if each.symbol == "nchwBiFormerSTL").options({"topks": [1, -2]})
