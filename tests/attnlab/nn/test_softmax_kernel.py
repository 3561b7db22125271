"""Softmax attention on the block-sparse op: the numbers of the dense one, and blocks that are left out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import registry
from pallas_kernels.block_masks import Block
from pallas_kernels.masks import SlidingWindow

X = jnp.asarray(np.random.default_rng(0).standard_normal((2, 40, 16)), jnp.float32)
IDS = jnp.asarray(np.sort(np.random.default_rng(1).integers(0, 3, (2, 40)), 1)).at[:, -3:].set(0)
KEYS = jnp.asarray(np.random.default_rng(2).random((2, 40)) < 0.7).at[0, :5].set(False)


def built(kernel, **options):
    given = {"num_heads": 4, "num_kv_heads": 2, "kernel": kernel, "rngs": nnx.Rngs(0)} | options
    return registry.get("softmax_attention").cls(16, **given)


@pytest.mark.parametrize(
    ("options", "call"),
    [
        ({"causal": True}, {"segment_ids": IDS}),
        ({"structural_mask": SlidingWindow(5, 2), "softcap": 2.0}, {"mask": KEYS}),
        ({"causal": True, "alibi": True}, {"mask": KEYS, "segment_ids": IDS}),
        ({"structural_mask": Block(8)}, {"segment_ids": IDS}),  # no rule on places in segments: dense
    ],
)
def test_equals_dense_attention(options, call):
    def evaluated(mixer):
        return nnx.jit(nnx.value_and_grad(lambda m: jnp.sum(jnp.sin(m(X, **call)))))(mixer)

    got, want = (evaluated(built(kernel, **options)) for kernel in ("xla", None))
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-4, atol=2e-5)


def test_a_causal_mixer_decodes_on_the_kernel_too():
    mixer = built("xla", causal=True)
    state = mixer.init_state(2, 40)
    y, state = mixer.prefill(X[:, :30], state)
    last, _ = mixer.step(X[:, 30], state)
    whole = mixer(X)
    np.testing.assert_allclose(y, whole[:, :30], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(last, whole[:, 30], rtol=1e-4, atol=1e-5)


def test_refusals():
    with pytest.raises(ValueError, match="one of auto, tpu, triton, xla, reference, got 'splash'"):
        built("splash")
    with pytest.raises(ValueError, match="kernel does not go with block_size"):
        built("auto", block_size=8)
