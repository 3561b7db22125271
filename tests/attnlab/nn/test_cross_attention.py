"""Attention between sources and the layers made of it, against float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab.interop.names import resolve
from attnlab.interop.torch_layers import DECODER_LAYER, ENCODER_LAYER, MULTIHEAD, MULTIHEAD_APART
from attnlab.nn.cross_attention import CrossAttention
from attnlab.nn.transformer_layers import DecoderLayer, EncoderLayer
from tests.accuracy import relative_rms


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def filled(module, seed=0):
    """The module with all its parameters drawn, biases and norms too."""
    state = nnx.state(module, nnx.Param)
    leaves, tree = jax.tree.flatten(state)
    nnx.update(module, jax.tree.unflatten(tree, [0.4 * draw(seed + i, *leaf.shape) for i, leaf in enumerate(leaves)]))
    return module


def linear(x, layer, kernel_axes):
    return np.einsum(kernel_axes, np.float64(x), np.float64(layer.kernel[...])) + np.float64(layer.bias[...])


def attend(module, x, s, t, mask=None, bias=None):
    """`CrossAttention` by loops over heads and queries."""
    into = "bnc,chd->bnhd"
    q, k, v = linear(x, module.query, into), linear(s, module.key, into), linear(t, module.value, into)
    y = np.zeros((*q.shape[:3], v.shape[-1]))
    for b, i, h in np.ndindex(*q.shape[:3]):
        scores = k[b, :, h] @ q[b, i, h] * module.scale
        scores = scores if bias is None else scores + bias[h, i]
        weights = np.exp(scores - scores.max())
        weights = (
            weights if mask is None else np.where(np.broadcast_to(mask, (*q.shape[:2], k.shape[1]))[b, i], weights, 0)
        )
        y[b, i, h] = weights / max(weights.sum(), 1e-300) @ v[b, :, h]
    return linear(y, module.out, "bnhd,hdc->bnc")


def norm(layer, x):
    x = np.float64(x)
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + layer.eps)
    return x * np.float64(layer.scale[...]) + np.float64(layer.bias[...])


def feed_forward(mlp, x):
    return linear(np.maximum(linear(x, mlp.fc1, "bnc,cd->bnd"), 0), mlp.fc2, "bnc,cd->bnd")


def test_widths_positions_masks_and_bias():
    module = filled(
        CrossAttention(
            6, num_heads=2, key_features=5, value_features=3, out_features=7, head_dim=4, value_dim=2, rngs=nnx.Rngs(0)
        )
    )
    x, s, t, p, r = draw(1, 2, 3, 6), draw(2, 2, 5, 5), draw(3, 2, 5, 3), draw(4, 3, 6), draw(5, 5, 5)
    bias, mask = draw(6, 2, 3, 5), np.random.default_rng(7).random((2, 5)) < 0.6
    mask[1] = False
    given = {"query_positions": p, "key_positions": r, "mask": mask, "bias": bias}
    got, weights = module.with_weights(x, s, t, **given)
    want = attend(module, x + p, s + r, t, mask[:, None], bias)
    assert relative_rms(got, want) < 1e-6
    np.testing.assert_allclose(got[1], np.broadcast_to(module.out.bias[...], (3, 7)), atol=1e-6)
    y, seen = nnx.capture(module, nnx.Intermediate)(x, s, t, **given)
    np.testing.assert_array_equal(y, got)
    np.testing.assert_allclose(seen["attention"][0], weights, atol=1e-6)

    def loss(x, s, t, p, r):
        return (module(x, s, t, **(given | {"query_positions": p, "key_positions": r})) ** 2).sum()

    step, gradients = 1e-5, jax.jit(jax.grad(loss, range(5)))(x, s, t, p, r)
    for place, (value, gradient) in enumerate(zip((x, s, t, p, r), gradients, strict=True)):
        direction = draw(8, *value.shape)
        change = []
        for sign in (1, -1):
            moved = [np.float64(a) for a in (x, s, t, p, r)]
            moved[place] += sign * step * direction
            x_, s_, t_, p_, r_ = moved
            change.append((attend(module, x_ + p_, s_ + r_, t_, mask[:, None], bias) ** 2).sum())
        assert float((gradient * direction).sum()) == pytest.approx((change[0] - change[1]) / (2 * step), rel=1e-3)


def test_half_precision_dropout_blocks_and_refusals():
    x, s = draw(1, 2, 3, 8), draw(2, 2, 9, 8)
    module = filled(CrossAttention(8, num_heads=2, qk_norm=True, dropout=0.5, rngs=nnx.Rngs(0, dropout=1)))
    want = module(x, s)
    half = module(jnp.asarray(x, jnp.bfloat16), s)
    assert half.dtype == jnp.bfloat16 and relative_rms(half, want) < 2e-2
    assert relative_rms(module(x, s, deterministic=False), want) > 0.1
    blocked = CrossAttention(8, num_heads=2, qk_norm=True, block_size=4, rngs=nnx.Rngs(0))
    nnx.update(blocked, nnx.state(module, nnx.Param))
    assert relative_rms(blocked(x, s), want) < 1e-6
    with pytest.raises(ValueError, match="num_heads must divide the 8 channels, got 3"):
        CrossAttention(8, num_heads=3, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="dropout must be"):
        CrossAttention(8, num_heads=2, dropout=0.1, block_size=4, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("order", ["post", "pre"])
def test_layers_have_their_norms_in_order(order):
    x, m, p, r = draw(1, 2, 4, 6), draw(2, 2, 5, 6), draw(3, 4, 6), draw(4, 5, 6)
    real = np.random.default_rng(5).random((2, 5)) < 0.7
    causal = np.tril(np.ones((4, 4), bool))[None]
    decoder = filled(DecoderLayer(6, num_heads=2, hidden_features=9, order=order, rngs=nnx.Rngs(0)))
    encoder = filled(EncoderLayer(6, num_heads=2, hidden_features=9, order=order, eps=1e-3, rngs=nnx.Rngs(0)))
    got = decoder(x, m, positions=p, memory_positions=r, memory_mask=real, causal=True)
    memory = encoder(m, positions=r, mask=real)
    if order == "post":
        y = norm(decoder.norm1, x + attend(decoder.attention, x + p, x + p, x, causal))
        y = norm(decoder.norm2, y + attend(decoder.cross_attention, y + p, m + r, m, real[:, None]))
        y = norm(decoder.norm3, y + feed_forward(decoder.mlp, y))
        z = norm(encoder.norm1, m + attend(encoder.attention, m + r, m + r, m, real[:, None]))
        z = norm(encoder.norm2, z + feed_forward(encoder.mlp, z))
    else:
        h = norm(decoder.norm1, x)
        y = x + attend(decoder.attention, h + p, h + p, h, causal)
        y = y + attend(decoder.cross_attention, norm(decoder.norm2, y) + p, m + r, m, real[:, None])
        y = y + feed_forward(decoder.mlp, norm(decoder.norm3, y))
        h = norm(encoder.norm1, m)
        z = m + attend(encoder.attention, h + r, h + r, h, real[:, None])
        z = z + feed_forward(encoder.mlp, norm(encoder.norm2, z))
    assert relative_rms(got, y) < 2e-6
    assert relative_rms(memory, z) < 2e-6


def test_a_decoder_layer_without_self_attention():
    x, m = draw(1, 2, 4, 6), draw(2, 2, 5, 3)
    layer = filled(DecoderLayer(6, num_heads=2, memory_features=3, order="pre", self_attention=False, rngs=nnx.Rngs(0)))
    y = x + attend(layer.cross_attention, norm(layer.norm2, x), m, m)
    assert relative_rms(layer(x, m), y + feed_forward(layer.mlp, norm(layer.norm3, y))) < 2e-6
    with pytest.raises(ValueError, match="mask and causal"):
        layer(x, m, causal=True)
    with pytest.raises(ValueError, match="order must be 'post' or 'pre', got 'mid'"):
        EncoderLayer(6, num_heads=2, order="mid", rngs=nnx.Rngs(0))


def test_names_of_torch():
    rngs = nnx.Rngs(0)
    decoder = filled(DecoderLayer(4, num_heads=2, hidden_features=6, rngs=rngs))
    official = resolve(decoder, DECODER_LAYER).dump()
    shapes = {name: array.shape for name, array in official.items()}
    attention = {"in_proj_weight": (12, 4), "in_proj_bias": (12,), "out_proj.weight": (4, 4), "out_proj.bias": (4,)}
    want = {f"{part}.{name}": shape for part in ("self_attn", "multihead_attn") for name, shape in attention.items()}
    want |= {"linear1.weight": (6, 4), "linear1.bias": (6,), "linear2.weight": (4, 6), "linear2.bias": (4,)}
    want |= {f"norm{i}.{leaf}": (4,) for i in (1, 2, 3) for leaf in ("weight", "bias")}
    assert shapes == want
    rows = official["self_attn.in_proj_weight"][4:8]
    np.testing.assert_array_equal(rows, decoder.attention.key.kernel[...].reshape(4, 4).T)
    other = DecoderLayer(4, num_heads=2, hidden_features=6, rngs=rngs)
    resolve(other, DECODER_LAYER).load(official)
    x, m = draw(1, 1, 3, 4), draw(2, 1, 2, 4)
    np.testing.assert_array_equal(other(x, m), decoder(x, m))
    encoder = EncoderLayer(4, num_heads=2, hidden_features=6, rngs=rngs)
    assert set(resolve(encoder, ENCODER_LAYER).names()) == {
        n for n in want if "multihead" not in n and "norm3" not in n
    }
    plain = resolve(CrossAttention(4, num_heads=2, use_bias=False, rngs=rngs), MULTIHEAD)
    assert set(plain.names()) == {"in_proj_weight", "out_proj.weight", "out_proj.bias"}


def test_names_of_torch_where_widths_differ():
    module = filled(CrossAttention(4, num_heads=2, key_features=3, value_features=5, rngs=nnx.Rngs(0)))
    official = resolve(module, MULTIHEAD_APART, base="attn").dump()
    assert {name: array.shape for name, array in official.items()} == {
        "attn.q_proj_weight": (4, 4),
        "attn.k_proj_weight": (4, 3),
        "attn.v_proj_weight": (4, 5),
        "attn.in_proj_bias": (12,),
        "attn.out_proj.weight": (4, 4),
        "attn.out_proj.bias": (4,),
    }
    np.testing.assert_array_equal(official["attn.v_proj_weight"], module.value.kernel[...].reshape(5, 4).T)
    other = CrossAttention(4, num_heads=2, key_features=3, value_features=5, rngs=nnx.Rngs(1))
    resolve(other, MULTIHEAD_APART, base="attn").load(official)
    np.testing.assert_array_equal(other.key.kernel[...], module.key.kernel[...])
    np.testing.assert_array_equal(other.value.bias[...], module.value.bias[...])
