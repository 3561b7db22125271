"""The normal form of the arguments of delta rule attention: those of every recurrence, and β."""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels import recurrence


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments(recurrence.Arguments):
    """Checked arguments in one form: causal, not normalised, `log_decay` None, (H,) or (B, N, H).

    Attributes:
      beta: how much of the error each token corrects, (B, N, H), in `accumulator`.
    """

    beta: jax.Array


jax.tree_util.register_dataclass(
    Arguments,
    data_fields=["q", "k", "v", "beta", "log_decay", "scale", "initial_state", "query_ids", "key_ids"],
    meta_fields=["causal", "normalize", "return_state", "chunk_size"],
)


def per_head(x: jax.Array, heads: int, axis: int = 2) -> jax.Array:
    """Keys or values of G heads at `axis`, repeated to H: query head h reads key head h // (H / G)."""
    return jnp.repeat(x, heads // x.shape[axis], axis=axis)
