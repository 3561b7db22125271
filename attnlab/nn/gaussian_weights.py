"""Weights by a product of Gaussians around the mean of a set of values (GAAM, arXiv:2401.11143).

For a set of n numbers x with mean μ and unbiased variance σ² + eps, and G Gaussians of offsets δ_g and widths c_g:

    p_i = Π_g exp(-z_ig² / 2c_g²) / √(2π c_g²),   z_ig = (x_i - μ - δ_g) / σ,        w_i = p_i / max(Σ_j p_j, eps)

The product of Gaussians is one Gaussian, and is computed as that, G multiplications for a set and not for a number:

    ln p_i = (b d_i - a d_i² - e) / σ² + h,    d_i = x_i - μ
    a = Σ_g 1/2c_g²,    b = Σ_g δ_g/c_g²,    e = Σ_g δ_g²/2c_g²,    h = -Σ_g ln √(2π c_g²)

Only b d - a d², over σ², differs inside a set; e and h decide nothing but whether the sum is above its floor eps.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from pallas_kernels.dtypes import at_least_float32


class Gaussian(NamedTuple):
    """A product of Gaussians in the terms of the module docstring, each of the shape of the sets' axes.

    Attributes:
      curvature: a.
      slope: b.
      depth: e.
      height: h.
    """

    curvature: jax.Array
    slope: jax.Array
    depth: jax.Array
    height: jax.Array

    def exponent(self, difference: jax.Array, variance: jax.Array) -> jax.Array:
        """(b d - a d²) / σ², in a form that keeps small differences beside large offsets."""
        return difference * (self.slope - self.curvature * difference) / variance

    def take(self, index: ArrayLike) -> "Gaussian":
        """The terms of the sets of these indices."""
        return Gaussian(*(term[index] for term in self))


def product(mean_offsets: ArrayLike, widths: ArrayLike) -> Gaussian:
    """The product over the last axis of offsets δ and widths c, both (..., G); computed in float32 or wider."""
    offsets, widths = (jnp.asarray(a, at_least_float32(jnp.result_type(a))) for a in (mean_offsets, widths))
    square = jnp.square(widths)
    return Gaussian(
        0.5 * (1 / square).sum(-1),
        (offsets / square).sum(-1),
        0.5 * (jnp.square(offsets) / square).sum(-1),
        -0.5 * jnp.log(2 * np.pi * square).sum(-1),
    )


class GaussianHead(nnx.Module):
    """Offsets and widths of one head.

    Args:
      num_gaussians: G.
      param_dtype: of the parameters.
      rngs: stream `params`.

    Attributes:
      mean_offsets: δ (G,), in the units of the values; zeros at first.
      widths: c (G,), in standard deviations; exponentials of normal numbers at first. Their signs have no effect.
    """

    def __init__(self, num_gaussians: int, *, param_dtype: jax.typing.DTypeLike = jnp.float32, rngs: nnx.Rngs):
        if num_gaussians < 1:
            raise ValueError(f"num_gaussians must be at least 1, got {num_gaussians}")
        self.mean_offsets = nnx.Param(jnp.zeros((num_gaussians,), param_dtype), logical_axes=(None,))
        widths = jnp.exp(jax.random.normal(rngs.params(), (num_gaussians,), param_dtype))
        self.widths = nnx.Param(widths, logical_axes=(None,))


def head_arrays(heads: nnx.List) -> tuple[jax.Array, jax.Array]:
    """Offsets and widths (H, G) of H heads."""
    return jnp.stack([head.mean_offsets[...] for head in heads]), jnp.stack([head.widths[...] for head in heads])
