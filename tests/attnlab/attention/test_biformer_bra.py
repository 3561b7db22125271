"""Bi-level routing attention: which regions are read, and what options refuse."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab.attention.sparse.biformer_bra import (
    BiLevelRoutingAttention,
    RegionalRoutingAttention,
    listed_attention,
    route,
    routed_attention,
)
from attnlab.nn.depthwise import on_tokens

IMAGE = (2, 6, 4, 8)


def image(shape: tuple[int, ...] = IMAGE, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def attention_map(mixer: nnx.Module, x: jax.Array) -> np.ndarray:
    _, intermediates = nnx.capture(mixer, nnx.Intermediate)(x)
    return np.asarray(intermediates["attention"][0])


def test_route_keeps_the_best_regions_in_order():
    q = jnp.eye(3)[None]
    k = jnp.asarray([[[0.0, 3.0, 1.0], [2.0, -1.0, 5.0], [1.0, 7.0, -2.0]]])
    indices, weights = route(q, k, 2, scale=0.5)
    np.testing.assert_array_equal(indices, [[[1, 2], [2, 0], [1, 0]]])
    expected = np.exp([[1.0, 0.5], [3.5, 1.5], [2.5, 0.5]])
    np.testing.assert_allclose(weights[0], expected / expected.sum(-1, keepdims=True), rtol=1e-6)
    with pytest.raises(ValueError, match="topk must be from 1 to the number of regions 3, got 4"):
        route(q, k, 4)


@pytest.mark.parametrize("cls", [BiLevelRoutingAttention, RegionalRoutingAttention])
def test_with_every_region_kept_it_is_softmax_attention(cls: type):
    mixer = cls(8, num_heads=2, n_win=2, topk=4, rngs=nnx.Rngs(0))
    x = image()
    q, k, v = (layer(x).reshape(2, 24, 2, 4) for layer in (mixer.query, mixer.key, mixer.value))
    weights = jax.nn.softmax(jnp.einsum("bnhd,bmhd->bhnm", q, k) * 8**-0.5)
    y = jnp.einsum("bhnm,bmhd->bnhd", weights, v) + on_tokens(mixer.lepe, v, x.shape[1:3])
    np.testing.assert_allclose(mixer(x), mixer.out(y).reshape(x.shape), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(attention_map(mixer, x), weights, rtol=1e-4, atol=1e-6)


def test_tokens_read_the_routed_regions_alone():
    mixer = BiLevelRoutingAttention(8, num_heads=2, n_win=2, topk=1, rngs=nnx.Rngs(0))
    x = image()
    indices, _ = mixer.routing(x)
    region = np.add.outer(2 * (np.arange(6) // 3), np.arange(4) // 2).reshape(-1)
    allowed = np.asarray(indices)[:, region, 0][:, :, None] == region
    weights = attention_map(mixer, x)
    assert (weights > 0).sum() == 2 * allowed.sum()
    np.testing.assert_array_equal(weights > 0, np.broadcast_to(allowed[:, None], weights.shape))


@pytest.mark.parametrize("mode", ["ada_avgpool", "ada_maxpool", "avgpool", "maxpool"])
def test_pooled_keys_share_their_weight_among_their_tokens(mode: str):
    options = {"kv_per_win": 2} if mode.startswith("ada") else {"kv_downsample_ratio": 2}
    mixer = BiLevelRoutingAttention(
        8, num_heads=2, n_win=2, topk=2, kv_downsample_mode=mode, side_dwconv=0, **options, rngs=nnx.Rngs(0)
    )
    x = image((1, 8, 8, 8))
    weights = attention_map(mixer, x)
    assert weights.shape == (1, 2, 64, 64)
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
    if "avg" in mode:
        y = jnp.einsum("bhnm,bmhd->bnhd", weights, mixer.value(x).reshape(1, 64, 2, 4))
        np.testing.assert_allclose(mixer.out(y).reshape(x.shape), mixer(x), rtol=1e-4, atol=1e-6)


def test_padding_is_attended_to_but_not_on_the_map():
    mixer = BiLevelRoutingAttention(8, num_heads=2, n_win=4, topk=16, auto_pad=True, rngs=nnx.Rngs(0))
    weights = attention_map(mixer, image((1, 5, 7, 8)))
    assert weights.shape == (1, 2, 35, 35)
    assert (weights.sum(-1) < 1).all()


@pytest.mark.slow
def test_soft_routing_lets_gradients_through_the_scores():
    def gradient(**options):
        mixer = BiLevelRoutingAttention(8, num_heads=2, n_win=2, topk=2, **options, rngs=nnx.Rngs(0))
        graph, state = nnx.split(mixer)
        return jax.grad(lambda s: jnp.square(nnx.merge(graph, s)(image())).sum())(state)

    blocked = gradient(soft_routing=True)
    through = gradient(soft_routing=True, diff_routing=True)
    # Values do not take part in routing.
    np.testing.assert_allclose(blocked.value.kernel[...], through.value.kernel[...], rtol=1e-5, atol=1e-7)
    assert not np.allclose(blocked.query.kernel[...], through.query.kernel[...], rtol=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"topk": 5}, "topk must be at most the number of regions 4, got 5"),
        ({"diff_routing": True}, "diff_routing needs soft_routing"),
        ({"param_routing": True, "soft_routing": True}, "param_routing learns nothing without diff_routing"),
        ({"kv_downsample_mode": "conv"}, "kv_downsample_mode must be one of identity, .*, got 'conv'"),
        ({"param_attention": "none"}, "param_attention must be 'qkvo' or 'qkv', got 'none'"),
        ({"side_dwconv": 4}, "side_dwconv must be odd, or 0 for none, got 4"),
        ({"num_heads": 3}, "num_heads must divide features 8 and qk_dim 8, got 3"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        BiLevelRoutingAttention(8, **{"num_heads": 2, "n_win": 2, "topk": 2} | options, rngs=nnx.Rngs(0))


def test_images_that_do_not_fit_are_refused():
    options = {"num_heads": 2, "n_win": 4, "topk": 2, "rngs": nnx.Rngs(0)}
    with pytest.raises(ValueError, match=r"n_win 4 does not divide the image \(6, 4\); auto_pad=True"):
        BiLevelRoutingAttention(8, **options)(image())
    with pytest.raises(ValueError, match=r"n_win 4 is more than the image \(3, 9\) has"):
        RegionalRoutingAttention(8, **options)(image((1, 3, 9, 8)))


def test_regions_read_in_place_give_what_gathered_ones_do():
    rng = np.random.default_rng(0)
    q, k, v, dy = (rng.standard_normal((2, 9, 4, 2, 6)).astype(np.float32) for _ in range(4))
    chosen = np.argsort(rng.random((2, 9, 9)), -1)[..., :3].astype(np.int32)

    def both(function):
        y, pull = jax.vjp(functools.partial(function, indices=chosen, scale=0.4), q, k, v)
        return y, *pull(dy)

    gathered = jax.jit(lambda: both(lambda *a, **options: routed_attention(*a, **options)[0]))()
    for got, want in zip(jax.jit(lambda: both(listed_attention))(), gathered, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)
