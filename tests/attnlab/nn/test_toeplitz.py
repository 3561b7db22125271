"""Toeplitz positions: the sum along each axis, and what is refused."""

import numpy as np
import pytest
from flax import nnx

from attnlab.nn.toeplitz import ToeplitzPositions
from tests.accuracy import relative_rms


def test_equals_the_sum_along_each_axis():
    module = ToeplitzPositions(4, 2, axes=(-2, -3), rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).normal(size=(2, 3, 5, 4)).astype(np.float32)
    want = np.zeros(x.shape)
    for axis, part in zip((2, 1), module.along, strict=True):
        strength = np.repeat((part.query[...] * part.key[...]).reshape(2, 2).sum(-1), 2)
        decay = np.repeat(1 / (1 + np.exp(-np.asarray(part.log_decay[...], np.float64))), 2)
        distance = np.arange(x.shape[axis])[:, None] - np.arange(x.shape[axis])
        kernel = np.where(distance[..., None] >= 0, strength * decay ** np.maximum(distance, 0)[..., None], 0)
        u = np.einsum("tsc,bhsc->bhtc" if axis == 2 else "tsc,bswc->btwc", kernel, x)
        u /= np.sqrt(np.square(u).mean(-1, keepdims=True) + 1e-5)
        want += u @ np.asarray(part.out.kernel[...])
    assert relative_rms(module(x), want) < 1e-5


def test_refusals():
    with pytest.raises(ValueError, match="axes must be at most -2"):
        ToeplitzPositions(4, 2, axes=(-1,), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="num_heads"):
        ToeplitzPositions(4, 3, rngs=nnx.Rngs(0))
