"""FNet's mixing by Fourier transforms (Lee-Thorp et al., 2022, arXiv:2105.03824): no weights at all.

    y = Re(F_s x F_h)        F_s along the tokens, F_h along the channels, neither normalised

It is a case of the template of "A Unified View of Long-Sequence Models" (2023, arXiv:2302.06218): two fixed matrices,
which do not look at x. With x F_h = a + i b and F_s = C - i S, y = C a + S b. Cost O(N log N) per channel.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from attnlab.registry import Cost, Example, Kind, Paper, Source, register
from pallas_kernels.dtypes import at_least_float32


def _example() -> Example:
    return Example(fourier_mixing, (jax.random.normal(jax.random.key(0), (2, 6, 4)),))


@register(
    "unified_long_sequence.fnet",
    kind=Kind.FUNCTION,
    paper=Paper("FNet: Mixing Tokens with Fourier Transforms", "Lee-Thorp et al.", 2022, arxiv="2105.03824"),
    source=Source.PAPER_TEXT,
    cost=Cost(time="O(N·log(N)·C)", memory="O(N·C)"),
    summary="the real part of a Fourier transform over tokens and channels, without weights",
    small=_example,
)
def fourier_mixing(x: ArrayLike) -> jax.Array:
    """Mixes tokens; the transforms are float32 or wider.

    Args:
      x: tokens `(…, N, C)`.

    Returns:
      The same shape and dtype.

    Raises:
      ValueError: for fewer than two axes.
    """
    x = jnp.asarray(x)
    if x.ndim < 2:
        raise ValueError(f"x must be (…, N, C), got {x.shape}")
    wide = x.astype(at_least_float32(x.dtype))
    return jnp.fft.fft2(wide).real.astype(x.dtype)
