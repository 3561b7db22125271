"""Mixing matrices: that they are those of the mixers, and what they are like; FNet against SciPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy
from flax import nnx

import attnlab
from attnlab import Site
from attnlab.analysis.mixing_matrix import depends_on_input, influence, mixing_of, mixing_properties
from attnlab.contract import Layout, UnsupportedArgument
from attnlab.mixers.fnet import fourier_mixing

X = np.random.default_rng(0).standard_normal((2, 6, 8)).astype(np.float32)
# Name, causal, whether the matrix looks at the tokens, whether its rows are averages.
MIXERS = [
    ("softmax_attention", False, True, True),
    ("softmax_attention", True, True, True),
    ("hedgehog", True, True, True),
    ("lightning_attention_2", True, True, False),
    ("rcmha", True, True, True),
    ("spectformer", False, False, None),
]


def build(name, causal=False):
    variant = attnlab.get(name)
    site = Site(8, 2, layout=Layout.SEQUENCE, causal=causal, grid=(6,), num_layers=2)
    return variant.create(site, rngs=nnx.Rngs(0), **variant.options)


@pytest.mark.parametrize(("name", "causal", "looks", "averages"), MIXERS)
def test_matrices_are_those_of_the_mixers(name, causal, looks, averages):
    mixer = build(name, causal)
    mixing = jax.jit(lambda x: mixing_of(mixer, x))(X)
    assert np.asarray(mixing.error).max() < 1e-5
    assert mixing.matrix.shape == (2, mixing.values.shape[2], 6, 6)
    kind = mixing_properties(mixing.matrix)
    assert (np.asarray(kind.future).max() < 1e-12) == causal
    assert (depends_on_input(mixer, X, X[::-1]) > 1e-3) == looks
    if averages is not None:
        assert (np.abs(np.asarray(kind.row_sum) - 1).max() < 1e-5) == averages


def test_the_matrix_of_attention_is_its_weights():
    mixer = build("softmax_attention")
    _, seen = nnx.capture(mixer, nnx.Intermediate)(X)
    np.testing.assert_allclose(mixing_of(mixer, X).matrix, seen["attention"][0], rtol=1e-5, atol=1e-6)
    mask = np.arange(6) < np.array([[6], [4]])
    hidden = mixing_of(mixer, X, mask=mask).matrix
    assert not np.any(hidden[1, :, :, 4:])
    seen = mixing_of(mixer, X, X[:, :3])
    assert seen.matrix.shape == (2, 2, 6, 3)
    with pytest.raises(UnsupportedArgument, match="context"):
        mixing_of(build("spectformer"), X, X)


def test_properties_tell_matrices_apart():
    band = np.tril(np.triu(np.ones((6, 6)), -2))
    outer = np.outer(range(1, 7), -np.ones(6))
    for matrix, toeplitz, average in (
        (band, True, False),
        (band / band.sum(1, keepdims=True), False, True),
        (outer, 0, 0),
    ):
        kinds = mixing_properties(matrix[None, None].astype(np.float32))
        kind = jax.tree.map(lambda a: a[0, 0], kinds)
        assert (kind.toeplitz < 1e-6) == toeplitz
        assert (abs(kind.row_sum - 1) + kind.row_spread < 1e-5) == average
        assert (abs(kind.stable_rank - 1) < 1e-5) == (matrix is outer)
        assert (kind.future > 0) == (kind.negative > 0) == (matrix is outer)


def test_influence_is_of_any_module():
    weight = np.random.default_rng(1).standard_normal((3, 8, 6, 8)).astype(np.float32)
    got = influence(lambda x: jnp.einsum("bmc,ndmc->bnd", x, weight), X)
    np.testing.assert_allclose(got, np.broadcast_to(np.sqrt((weight**2).sum((1, 3))), (2, 3, 6)), rtol=1e-5)
    causal = influence(build("softmax_attention", causal=True), X)
    assert not np.any(np.triu(causal[0], 1))
    assert np.all(np.diagonal(causal[0]) > 0)


def test_fnet_is_the_transform_of_scipy_and_two_matrices():
    got = fourier_mixing(X)
    whole = scipy.fft.fft(scipy.fft.fft(X.astype(np.float64), axis=-1), axis=-2)
    np.testing.assert_allclose(got, whole.real, rtol=1e-5, atol=1e-5)
    matrix, inner = scipy.fft.fft(np.eye(6)), scipy.fft.fft(X.astype(np.float64), axis=-1)
    np.testing.assert_allclose(got, matrix.real @ inner.real - matrix.imag @ inner.imag, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="x must be"):
        fourier_mixing(X[0, 0])
