import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.analysis.spectra import matrix_entropy, numerical_rank, singular_values

RANDOM = np.random.default_rng(0)


@pytest.mark.parametrize("shape", [(2, 4, 7), (2, 7, 4)])
def test_entropy_is_that_of_the_squared_singular_values(shape):
    x = RANDOM.standard_normal(shape)
    share = np.linalg.svd(x, compute_uv=False) ** 2
    share /= share.sum(-1, keepdims=True)
    found = matrix_entropy(x.astype(np.float32))
    np.testing.assert_allclose(found.entropy, -(share * np.log(share)).sum(-1), rtol=1e-5)
    np.testing.assert_allclose(
        matrix_entropy(x.astype(np.float32), alpha=2).entropy, -np.log((share**2).sum(-1)), rtol=1e-5
    )
    np.testing.assert_allclose(
        found.eigenvalues[..., ::-1], singular_values(x.astype(np.float32)) ** 2, rtol=1e-4, atol=1e-5
    )


def test_orthogonal_tokens_of_equal_length_take_all_directions_and_equal_ones_a_single():
    equal = jnp.eye(5)[None] * 3
    np.testing.assert_allclose(matrix_entropy(equal).entropy, np.log(5), rtol=1e-6)
    np.testing.assert_allclose(matrix_entropy(jnp.ones((1, 5, 3))).entropy, 0, atol=1e-5)
    assert matrix_entropy(jnp.zeros((1, 5, 3))).entropy == 0
    slope = jax.grad(lambda x: matrix_entropy(x, alpha=0.5).entropy.sum())(jnp.zeros((1, 5, 3)))
    assert jnp.isfinite(slope).all()


def test_rank_counts_what_exceeds_a_share_of_the_largest():
    x = RANDOM.standard_normal((3, 20, 4)) @ RANDOM.standard_normal((3, 4, 9))
    assert numerical_rank(x.astype(np.float32)).tolist() == [4, 4, 4]
    scaled = jnp.diag(jnp.asarray([1.0, 1e-2, 1e-4, 0.0]))
    assert (numerical_rank(scaled), numerical_rank(scaled, tolerance=1e-5), numerical_rank(0 * scaled)) == (2, 3, 0)
    for call, message in (
        (lambda: numerical_rank(scaled, tolerance=2), "tolerance"),
        (lambda: matrix_entropy(scaled, alpha=0), "alpha"),
        (lambda: singular_values(jnp.ones(3)), "features must be"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
