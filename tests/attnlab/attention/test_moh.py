"""Mixture-of-head attention: what gates are without preference, and whose load counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab.attention.dense.moh import MixtureOfHeadAttention, NormRoutedAttention, head_counts
from attnlab.attention.dense.softmax_attention import SoftmaxAttention
from attnlab.nn.aux_loss import total_aux_loss
from attnlab.nn.dense_mixer import with_core
from attnlab.nn.softmax_core import SoftmaxCore
from tests.accuracy import relative_rms

X = np.random.default_rng(0).standard_normal((2, 6, 8)).astype(np.float32)


def plain_of(mixer, **options):
    plain = SoftmaxAttention(8, num_heads=4, **options, rngs=nnx.Rngs(1))
    for name in ("query", "key", "value", "out"):
        setattr(plain, name, getattr(mixer, name))
    return plain


def test_gates_without_preference_are_one():
    mixer = MixtureOfHeadAttention(8, num_heads=4, shared_heads=2, active_heads=2, rngs=nnx.Rngs(0))
    for layer in (mixer.router.routed.logits, mixer.router.shared, mixer.router.balance):
        layer.kernel[...] = jnp.zeros_like(layer.kernel[...])
    assert relative_rms(mixer(X), plain_of(mixer)(X)) < 1e-6


def test_all_heads_routed_by_their_norms_is_plain_attention():
    mixer = NormRoutedAttention(8, num_heads=4, shared_heads=1, active_heads=3, rngs=nnx.Rngs(0))
    assert relative_rms(mixer(X), plain_of(mixer, causal=True, qkv_bias=False, out_bias=False)(X)) < 1e-6


def test_load_of_tokens_that_exist_averaged_over_layers():
    options = {"num_heads": 4, "shared_heads": 1, "active_heads": 2}
    mixer, alone = (MixtureOfHeadAttention(8, **options, num_layers=4, rngs=nnx.Rngs(0)) for _ in range(2))
    real = np.arange(6) < 4
    mixer(X, mask=np.broadcast_to(real, (2, 6)), deterministic=False)
    alone(X[:, :4], deterministic=False)
    np.testing.assert_allclose(total_aux_loss(mixer), total_aux_loss(alone), rtol=1e-6)
    # At most all of the load on two heads of three, at least that of even use.
    assert 0.01 / 4 * 2 * 0.5 < float(total_aux_loss(mixer)) < 0.01 / 4 * 3


def test_counts_and_cores_that_do_not_fit():
    assert head_counts(8, None, None) == (4, 2), "the authors' LLaMA"
    with pytest.raises(ValueError, match=r"active_heads must be in 1\.\.3"):
        MixtureOfHeadAttention(8, num_heads=4, shared_heads=1, active_heads=0, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"shared_heads must be in 0\.\.4"):
        NormRoutedAttention(8, num_heads=4, shared_heads=5, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="GatedCore"):
        with_core(MixtureOfHeadAttention(8, num_heads=4, rngs=nnx.Rngs(0)), SoftmaxCore(4))
    y = jax.eval_shape(MixtureOfHeadAttention(8, num_heads=4, shared_heads=4, rngs=nnx.Rngs(0)), X)
    assert y.shape == X.shape, "all heads may be shared"
