"""EViT: how many tokens stay, training-free on a trained model, and sizes of the paper's models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab.attention.linear.hedgehog import HedgehogAttention
from attnlab.contract import UnsupportedArgument
from attnlab.models.block import Block
from attnlab.models.deit import DeiT
from attnlab.models.evit import EVITS, EViT, keep_rate_at, keep_rates, reorganised
from attnlab.models.staged import build_named
from attnlab.models.token_reorganisation import TokenReorganisationParts, keep_tokens
from attnlab.points import Intervention, attach

SMALL = {"features": 8, "num_heads": 2, "depth": 3, "mlp_ratio": 1.0, "image_size": 32, "patch_size": 8}
SIZES = {"evit_small": 22_050_664, "evit_base": 86_567_656}  # those of DeiT: no parameter is new


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n == "evit_small" else pytest.mark.slow) for n in SIZES])
def test_sizes_are_those_of_deit(name):
    model = nnx.eval_shape(lambda: build_named(EVITS, name, rngs=nnx.Rngs(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))) == SIZES[name]


def test_a_fused_token_is_the_sum_of_what_is_left_out():
    x, scores = jax.random.normal(jax.random.key(0), (1, 5, 3)), jnp.array([[0.1, 0.4, 0.2, 0.3]])
    tokens, index = keep_tokens(x, scores, 2)
    np.testing.assert_array_equal(index, [[1, 3]])
    np.testing.assert_allclose(tokens[:, -1], 0.1 * x[:, 1] + 0.2 * x[:, 3], rtol=1e-6)
    np.testing.assert_array_equal(tokens[:, :3], x[:, jnp.array([0, 2, 4])])
    with pytest.raises(ValueError, match=r"scores must be \(B, N\)"):
        keep_tokens(x, scores[:, :3], 2)


def test_the_model_shrinks_in_the_chosen_blocks_and_as_a_call_says():
    model = EViT(**SMALL, num_classes=3, keep_rate=0.5, layers=(0, 2), rngs=nnx.Rngs(0))

    def lengths(side=32, **call):
        images = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
        return [
            None if k is None else k.shape[1]
            for k in nnx.eval_shape(lambda m, x: m.with_kept(x, **call)[1], model, images)
        ]

    assert lengths() == [8, None, 5]  # the fused token counts: 9 of 8 and it, half of them
    assert lengths(64) == [32, None, 17]
    assert lengths(keep_rate=0.25) == [4, None, 2]
    assert lengths(keep_rate=1.0) == [None, None, None]
    assert lengths(count=(None, 3, 3)) == [8, 3, 3]
    features = nnx.eval_shape(lambda m, x: m.features(x), model, jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32))
    assert [x.shape[1] for x in features] == [10, 10, 7]
    with pytest.raises(ValueError, match="tokens are left out"):
        nnx.eval_shape(lambda m: m.stages(jnp.ones((1, 32, 32, 3))), model)
    with pytest.raises(ValueError, match="of 9 tokens 1 to 9 can stay, got 12"):
        nnx.eval_shape(lambda m: m(jnp.ones((1, 32, 32, 3)), count=(None, 12, None)), model)
    with pytest.raises(ValueError, match="one for each of 3"):
        nnx.eval_shape(lambda m: m(jnp.ones((1, 32, 32, 3)), keep_rate=(0.5, 0.5)), model)


def test_a_trained_model_is_reorganised_without_training():
    images = jax.random.normal(jax.random.key(0), (2, 32, 32, 3))
    trained, run = DeiT(**SMALL | {"depth": 2}, num_classes=3, rngs=nnx.Rngs(0)), nnx.jit(lambda m, x: m(x))
    whole = reorganised(trained, 1.0, layers=(1,))
    fewer = reorganised(trained, 0.25, layers=(1,))
    np.testing.assert_allclose(run(whole, images), run(trained, images), atol=1e-6)
    assert nnx.eval_shape(lambda m: m.tokens(images), fewer).shape == (2, 1 + 4 + 1, 8)
    assert type(fewer) is DeiT and isinstance(fewer.blocks[0], TokenReorganisationParts)
    weights = [nnx.state(model, nnx.Param) for model in (trained, fewer)]
    for one, other in zip(*map(jax.tree.leaves, weights), strict=True):
        np.testing.assert_array_equal(one, other)


class Backwards(Intervention):
    def attention(self, weights, at, memory):
        return weights[..., ::-1], memory


def test_what_an_intervention_makes_of_attention_decides_which_tokens_stay():
    model = EViT(**SMALL | {"depth": 1}, num_classes=3, keep_rate=0.25, layers=(0,), rngs=nnx.Rngs(0))
    images = jax.random.normal(jax.random.key(0), (2, 32, 32, 3))
    run = nnx.jit(lambda m, x: m.with_kept(x)[1][0])
    kept, other = (np.sort(run(m, images)) for m in (model, attach(model, Backwards())))
    assert kept.shape == (2, 4) and (kept != other).any()


def test_rates_of_a_training_and_of_blocks():
    given = {"start": 10, "stop": 30, "base": 0.7}
    np.testing.assert_allclose([keep_rate_at(s, **given) for s in (0, 10, 20, 30, 99)], [1, 1, 0.85, 0.7, 0.7])
    assert keep_rates(0.5, 4, (1, 3)) == (1, 0.5, 1, 0.5)
    for arguments, words in (((0.5, 4), "layers must be below the depth 4"), (([0.5], 2), "one for each of 2 blocks")):
        with pytest.raises(ValueError, match=words):
            keep_rates(*arguments)


def test_refuses_what_has_no_attention_map():
    with pytest.raises(UnsupportedArgument, match="got HedgehogAttention"):
        TokenReorganisationParts.around(
            Block(HedgehogAttention(8, num_heads=2, rngs=nnx.Rngs(0)), None, None, None), keep_rate=0.5, fuse_token=True
        )
    with pytest.raises(ValueError, match=r"keep_rate must be in \(0, 1\], got 0"):
        EViT(**SMALL, keep_rate=0.0, layers=(0,), rngs=nnx.Rngs(0))
