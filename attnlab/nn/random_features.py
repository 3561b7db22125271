"""Random features of the softmax kernel (Choromanski et al., ICLR 2021, arXiv:2009.14794).

    exp(q·k) = E_w[exp(w·q - |q|²/2) exp(w·k - |k|²/2)],   w ~ N(0, I)

so that m rows w give m positive features of a vector. Rows that are orthogonal in blocks, with the lengths of Gaussian
vectors, estimate the same with less variance.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from pallas_kernels.dtypes import at_least_float32


def gaussian_rows(key: jax.Array, num_heads: int, count: int, size: int, *, orthogonal: bool = True) -> jax.Array:
    """Rows of random features, `(H, count, size)` in float32.

    Args:
      key: random key.
      num_heads: heads H, drawn apart.
      count: rows of each head.
      size: D.
      orthogonal: whether rows are orthogonal, D at a time; else all are independent.
    """
    of_rows, of_lengths = jax.random.split(key)
    if not orthogonal:
        return jax.random.normal(of_rows, (num_heads, count, size))
    blocks = -(-count // size)
    rotations, triangle = jnp.linalg.qr(jax.random.normal(of_rows, (num_heads, blocks, size, size)))
    # The factorisation fixes signs, which would leave half of all directions out.
    rotations = rotations * jnp.sign(jnp.diagonal(triangle, axis1=-2, axis2=-1))[..., None, :]
    rows = rotations.mT.reshape(num_heads, blocks * size, size)[:, :count]
    return rows * jnp.linalg.norm(jax.random.normal(of_lengths, rows.shape), axis=-1, keepdims=True)


def log_features(x: ArrayLike, rows: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """w·x and |x|²/2, whose difference is the logarithm of the features, for x scaled by D^-1/4.

    Args:
      x: queries or keys `(B, N, H, D)`.
      rows: w, `(H, m, D)`, or `(B, H, m, D)` for rows of each example's own.

    Returns:
      `(B, N, H, m)` and `(B, N, H, 1)` in float32 (or wider).
    """
    x = jnp.asarray(x)
    wide = x.astype(at_least_float32(x.dtype))
    wide = wide * x.shape[-1] ** -0.25
    rows = jnp.asarray(rows, wide.dtype)
    products = jnp.einsum("bnhd,bhmd->bnhm" if rows.ndim == 4 else "bnhd,hmd->bnhm", wide, rows)
    return products, jnp.square(wide).sum(-1, keepdims=True) / 2
