import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab.attention.dense.softmax_attention import SoftmaxAttention
from attnlab.attention.linear.agent_attention import AgentAttention
from attnlab.attention.local.window_attention import WindowAttention
from attnlab.models.agent_transformers import AGENT_TRANSFORMERS, AgentDeiT, AgentPVT, AgentSwin, agent_transformer
from attnlab.models.backbone import Choice, choices_from_letters
from attnlab.models.inline_transformers import INLINE_TRANSFORMERS, InlinePVT, inline_transformer

# Millions of parameters, from the tables of the authors' repositories.
SIZES = {"agent_pvt_tiny": 11.6, "agent_deit_tiny": 6.0, "inline_pvt_tiny": 12.0, "inline_deit_tiny": 6.5}


@pytest.mark.parametrize("name", SIZES)
def test_named_models_have_the_papers_size(name):
    build = agent_transformer if name in AGENT_TRANSFORMERS else inline_transformer
    model = nnx.eval_shape(lambda: build(name, rngs=nnx.Rngs(0)))
    count = sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    assert count / 1e6 == pytest.approx(SIZES[name], abs=0.051)


def test_names_are_suggested():
    with pytest.raises(KeyError, match="did you mean agent_swin_tiny"):
        agent_transformer("agent_swin_tinny", rngs=nnx.Rngs(0))
    assert set(INLINE_TRANSFORMERS).isdisjoint(AGENT_TRANSFORMERS)


def test_letters_choose_mixers():
    choose = {"A": lambda stage, block: Choice("agent", {"at": (stage, block)}), "B": lambda *_: Choice("base")}
    stages = choices_from_letters("AMB2", (1, 3, 2), "AB", choose)
    assert [[choice.mixer for choice in blocks] for blocks in stages] == [
        ["agent"],
        ["agent", "agent", "base"],
        ["base", "base"],
    ]
    assert stages[1][1].options == {"at": (1, 1)}
    for letters in ("AB", "ABX", "AMB", "AAA2", "AMBx"):
        with pytest.raises(ValueError, match=f"3 letters of A, B or M.*got '{letters}'"):
            choices_from_letters(letters, (1, 3, 2), "AB", choose)


def test_swin_clips_and_shifts_windows():
    model = AgentSwin(
        8, num_heads=(2, 2), depths=(2, 2), attention="AB", num_agents=(4, 4), window=14, image_size=56, patch_size=2,
        num_classes=3, rngs=nnx.Rngs(0),
    )  # fmt: skip
    mixers = [block.mixer for blocks in model.stages for block in blocks]
    assert [type(mixer) for mixer in mixers] == [AgentAttention] * 2 + [WindowAttention] * 2
    assert [mixer.windows.size for mixer in mixers] == [(14, 14)] * 2 + [(7, 7)] * 2
    assert [mixer.windows.shift for mixer in mixers] == [(0, 0), (7, 7), (0, 0), (3, 3)]


def test_deit_takes_agents_in_the_first_blocks():
    model = AgentDeiT(
        8, num_heads=2, depth=3, agent_layers=2, num_agents=(4,) * 4, image_size=16, patch_size=4, rngs=nnx.Rngs(0)
    )
    assert [type(block.mixer) for block in model.blocks] == [AgentAttention, AgentAttention, SoftmaxAttention]
    with pytest.raises(ValueError, match="first 12 blocks, got 13"):
        AgentDeiT(8, num_heads=2, depth=13, rngs=nnx.Rngs(0))


def small_pvt(**options):
    stages = {"features": (8, 8, 8, 8), "num_heads": (2,) * 4, "depths": (1,) * 4, "mlp_ratios": (1,) * 4}
    return InlinePVT(**(stages | {"image_size": 64, "num_classes": 3} | options), rngs=nnx.Rngs(params=0, dropout=1))


def test_pvt_takes_other_image_sizes_where_its_mixers_do():
    model = small_pvt()
    assert model(jnp.ones((1, 64, 96, 3))).shape == (1, 3)
    with pytest.raises(ValueError, match="images must be"):
        model(jnp.ones((1, 66, 64, 3)))
    agents = AgentPVT(
        (8,) * 4, num_heads=(2,) * 4, depths=(1,) * 4, num_agents=(4,) * 4, image_size=64, rngs=nnx.Rngs(0)
    )
    with pytest.raises(ValueError, match=r"built for tokens \(16, 16\)"):
        agents(jnp.ones((1, 64, 96, 3)))


def test_bfloat16_computes_and_training_differs_from_evaluation():
    images = jax.random.normal(jax.random.key(0), (4, 32, 32, 3))
    exact = small_pvt(image_size=32)(images)
    logits = small_pvt(image_size=32, dtype=jnp.bfloat16)(images)
    assert logits.dtype == jnp.float32
    assert jnp.abs(logits - exact).max() < 0.05 * jnp.abs(exact).max()
    model = small_pvt(image_size=32, drop_path=0.5, dropout=0.1)
    np.testing.assert_array_equal(model(images), exact)
    assert not np.allclose(model(images, deterministic=False), exact)


def test_refuses_lists_of_different_lengths_and_images_that_patches_do_not_tile():
    with pytest.raises(ValueError, match="num_heads must have one entry for each of 4 stages, got 3"):
        small_pvt(num_heads=(2, 2, 2))
    with pytest.raises(ValueError, match=r"image_size must be a multiple of \(32, 32\), got \(48, 48\)"):
        small_pvt(image_size=48)
