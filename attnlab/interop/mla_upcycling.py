"""Multi-head latent attention with the weights of a trained softmax attention (X-EcoMLA, 2025, arXiv:2503.11132).

Queries: W_q (H·D, C) = U S Vᵀ. The first r_q rows of S Vᵀ are the map to the latent; of U each head keeps its first Dn
and its last Dr rows.
Keys and values: the G key heads are repeated for all H query heads, and [W_k; W_v] (2·H·D, C) = U S Vᵀ. The first r
rows of S Vᵀ are the map to the latent; of U each head keeps the first Dn rows of its keys, and all D of its values. The
one rotated key is the mean of the last Dr rows of the G heads.

A rank is given, or follows from the energy: as many singular values as have a sum of squares of at most that part of
the whole. Either is rounded up to a multiple of `divisor`. A bias is one more column of its matrix, which meets an
input of ones: the authors' code has none.
"""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from attnlab.attention.dense.mla import MultiHeadLatentAttention
from attnlab.attention.dense.softmax_attention import SoftmaxAttention
from attnlab.contract import UnsupportedArgument
from attnlab.nn.rotary import Rotary


class Factors(NamedTuple):
    """Matrices `(out, in)` of latent attention, float32.

    Attributes:
      q_a: `(r_q, C)`.
      q_b: `(H·(Dn + Dr), r_q)`.
      kv_a: `(r + Dr, C)`, the last Dr rows for the rotated key.
      kv_b: `(H·(Dn + D), r)`, head by head keys and values.
    """

    q_a: np.ndarray
    q_b: np.ndarray
    kv_a: np.ndarray
    kv_b: np.ndarray

    @property
    def ranks(self) -> tuple[int, int]:
        """r_q and r."""
        return self.q_a.shape[0], self.kv_b.shape[1]


def upcycle(
    q_matrix: ArrayLike,
    k_matrix: ArrayLike,
    v_matrix: ArrayLike,
    *,
    num_heads: int,
    num_kv_heads: int,
    kv_rank: int,
    query_rank: int,
    rope_dim: int,
    nope_dim: int,
    query_energy: float | None = None,
    kv_energy: float | None = None,
    divisor: int = 8,
) -> Factors:
    """The factors of the maps of grouped-query attention; see the module docstring.

    Args:
      q_matrix: `(H·D, C)`, rows head by head, as PyTorch has them.
      k_matrix: `(G·D, C)`.
      v_matrix: `(G·D, C)`.
      num_heads: H.
      num_kv_heads: G, a divisor of H.
      kv_rank: r, unless `kv_energy` is given.
      query_rank: r_q, unless `query_energy` is given.
      rope_dim: Dr, at most D.
      nope_dim: Dn, at most D. With Dn + Dr above D some rows serve twice, below it some are left out.
      query_energy: part of the squares of the singular values that is kept, in (0, 1].
      kv_energy: the same for keys and values.
      divisor: of the ranks.

    Raises:
      ValueError: for shapes or sizes that do not fit.
    """
    q, k, v = (np.asarray(matrix, np.float32) for matrix in (q_matrix, k_matrix, v_matrix))
    if q.ndim != 2 or k.shape != v.shape or q.shape[1] != k.shape[1] or num_heads % num_kv_heads:
        raise ValueError(
            f"q_matrix must be (H·D, C), k_matrix and v_matrix (G·D, C), H a multiple of G: got {q.shape}, {k.shape}, "
            f"{v.shape} with {num_heads} and {num_kv_heads} heads"
        )
    size, channels = q.shape[0] // num_heads, q.shape[1]
    if q.shape[0] != num_heads * size or k.shape[0] != num_kv_heads * size or max(rope_dim, nope_dim) > size:
        raise ValueError(
            f"the matrices {q.shape} and {k.shape} are not {num_heads} and {num_kv_heads} heads of one size, of at "
            f"least rope_dim {rope_dim} and nope_dim {nope_dim}"
        )
    u, q_a = _decompose(q, query_rank, query_energy, divisor)
    u = u.reshape(num_heads, size, -1)
    q_b = np.concatenate([u[:, :nope_dim], u[:, size - rope_dim :]], axis=1)
    heads_k, heads_v = (
        np.repeat(part.reshape(num_kv_heads, size, channels), num_heads // num_kv_heads, axis=0) for part in (k, v)
    )
    both = np.concatenate([heads_k.reshape(-1, channels), heads_v.reshape(-1, channels)])
    u, kv_a = _decompose(both, kv_rank, kv_energy, divisor)
    of_k, of_v = u.reshape(2, num_heads, size, -1)
    kv_b = np.concatenate([of_k[:, :nope_dim], of_v], axis=1)
    shared = k.reshape(num_kv_heads, size, channels)[:, size - rope_dim :].mean(0)
    return Factors(
        q_a, q_b.reshape(-1, q_b.shape[-1]), np.concatenate([kv_a, shared]), kv_b.reshape(-1, kv_b.shape[-1])
    )


def latent_attention(
    mixer: SoftmaxAttention,
    *,
    kv_rank: int,
    query_rank: int | None = None,
    rope_dim: int | None = None,
    nope_dim: int | None = None,
    query_energy: float | None = None,
    kv_energy: float | None = None,
    divisor: int = 8,
    **options: Any,
) -> MultiHeadLatentAttention:
    """Latent attention with the weights of a softmax attention, without norms of the latents.

    Args:
      mixer: to be imitated, with E = D.
      kv_rank: r.
      query_rank: r_q; C when None, which loses nothing.
      rope_dim: Dr; half of D when None.
      nope_dim: Dn; D - Dr when None.
      query_energy, kv_energy, divisor: as in `upcycle`.
      **options: further ones of `MultiHeadLatentAttention`.

    Raises:
      UnsupportedArgument: if the mixer has options that latent attention lacks.
      ValueError: for sizes that do not fit.
    """
    core, size = mixer.core, mixer.sizes.key_size
    lacking = {
        "qk_norm": mixer.query_norm is not None,
        "alibi": core.alibi,
        "softcap": core.softcap is not None,
        "structural_mask": core.structural_mask is not None,
        "value_dim": mixer.sizes.value_size != size,
        "rotate_keys": not core.rotate_keys,
    }
    if any(lacking.values()):
        names = ", ".join(name for name, found in lacking.items() if found)
        raise UnsupportedArgument(f"latent attention has no counterpart of the mixer's {names}")
    rope_dim = max(size // 4 * 2, 2) if rope_dim is None else rope_dim
    nope_dim = size - rope_dim if nope_dim is None else nope_dim
    biased = mixer.query.bias is not None
    matrices = [_matrix(part) for part in (mixer.query, mixer.key, mixer.value)]
    factors = upcycle(
        *matrices,
        num_heads=mixer.num_heads,
        num_kv_heads=mixer.sizes.num_kv_heads,
        kv_rank=kv_rank,
        query_rank=min(mixer.num_heads * size, mixer.features) if query_rank is None else query_rank,
        rope_dim=rope_dim,
        nope_dim=nope_dim,
        query_energy=query_energy,
        kv_energy=kv_energy,
        divisor=divisor,
    )
    rank_q, rank = factors.ranks
    given: dict[str, Any] = {
        "num_heads": mixer.num_heads,
        "rank": rank,
        "query_rank": rank_q,
        "rope_dim": rope_dim,
        "nope_dim": nope_dim,
        "value_dim": size,
        "latent_norm": False,
        "causal": mixer.causal,
        "layout": mixer.layout,
        "context_features": mixer.context_features,
        # The scores keep their scale: channels that are left out were never many.
        "scale": size**-0.5 if core.scale is None else core.scale,
        "rotary": _rotary(core.rotary, rope_dim),
        "use_bias": biased or mixer.out.bias is not None,
        "dtype": mixer.dtype,
    }
    new = MultiHeadLatentAttention(mixer.features, **(given | options), rngs=nnx.Rngs(0))
    heads, width = mixer.num_heads, nope_dim + rope_dim
    q_a, kv_a = factors.q_a, factors.kv_a
    if biased:
        new.query_latent.bias[...], new.latent.bias[...] = jnp.asarray(q_a[:, -1]), jnp.asarray(kv_a[:, -1])
        q_a, kv_a = q_a[:, :-1], kv_a[:, :-1]
    new.query_latent.kernel[...], new.latent.kernel[...] = jnp.asarray(q_a.T), jnp.asarray(kv_a.T)
    new.query.kernel[...] = jnp.asarray(factors.q_b.T.reshape(rank_q, heads, width))
    up = factors.kv_b.T.reshape(rank, heads, nope_dim + size)
    new.core.key.kernel[...], new.core.value.kernel[...] = (
        jnp.asarray(up[..., :nope_dim]),
        jnp.asarray(up[..., nope_dim:]),
    )
    new.out.kernel[...] = mixer.out.kernel[...]
    if mixer.out.bias is not None:
        new.out.bias[...] = mixer.out.bias[...]
    return new


def _matrix(part: Any) -> np.ndarray:
    """The map to heads as PyTorch has it, with its bias as one more column."""
    kernel = np.asarray(part.kernel[...], np.float32)
    rows = kernel.reshape(kernel.shape[0], -1).T
    return rows if part.bias is None else np.concatenate([rows, np.asarray(part.bias[...]).reshape(-1, 1)], axis=1)


def _rotary(rotary: Rotary | None, rope_dim: int) -> Rotary | None:
    """The last channels turn now, all at the frequencies of so many channels."""
    if rotary is None:
        return None
    if rotary.split is not None or rotary.channels is not None:
        raise UnsupportedArgument(f"latent attention turns all of its rotated channels alike, the mixer has {rotary}")
    return Rotary(rotary.theta, interleaved=rotary.interleaved, inclusive=rotary.inclusive, yarn=rotary.yarn)


def _decompose(matrix: np.ndarray, rank: int, energy: float | None, divisor: int) -> tuple[np.ndarray, np.ndarray]:
    """U and S Vᵀ of the largest singular values."""
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    if energy is not None:
        if not 0 < energy <= 1:
            raise ValueError(f"an energy must be in (0, 1], got {energy}")
        squares = s.astype(np.float64) ** 2
        rank = max(1, int((np.cumsum(squares) / squares.sum() <= energy).sum()))
    rank = math.ceil(rank / divisor) * divisor
    if rank > len(s):
        # What is missing is zero.
        more = (0, rank - len(s))
        u, s, vt = np.pad(u, ((0, 0), more)), np.pad(s, more), np.pad(vt, (more, (0, 0)))
    return u[:, :rank], s[:rank, None] * vt[:rank]
