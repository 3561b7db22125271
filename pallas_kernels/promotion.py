"""How arrays of two ranks or dtypes meet inside the library, whatever a user has set for programs of their own.

Ranks meet as in NumPy: a bias `(C,)` is added to tokens `(B, N, C)` as it is. So ops, mixers and models work under
`jax_numpy_rank_promotion="raise"`, and so do their derivatives, which run when the call is over. Dtypes meet nowhere
unasked but in Optax.
"""

import contextlib
from collections.abc import Iterator

import jax


@contextlib.contextmanager
def numpy_ranks() -> Iterator[None]:
    """Inside, and in a function that it decorates, arrays of two ranks meet as in NumPy."""
    with jax.numpy_rank_promotion("allow"):
        yield


@contextlib.contextmanager
def numpy_rules() -> Iterator[None]:
    """The same of ranks and of dtypes."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield
