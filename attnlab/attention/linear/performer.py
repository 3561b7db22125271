"""Performer: linear attention by random features of the softmax kernel (Choromanski et al., ICLR 2021,
arXiv:2009.14794), as the benchmark CAB (Zhang et al., ICML 2023, arXiv:2210.07661) has it.

Per head, with rows w of block-orthogonal random features and z = x D^-1/4:

    φ(q) = m^-1/2 (exp(w·z - |z|²/2 - max_m w·z) + ε)
    φ(k) = m^-1/2 (exp(w·z - |z|²/2 - max_j,m w·z_j) + ε)                       ε = 1e-4
    y_i  = φ(q_i) Σ_j φ(k_j) v_jᵀ / max(φ(q_i)·Σ_j φ(k_j), 0.1)

The maximum of the keys is over all features and all keys, which leaks the future: CAB allows no causal form. Ours has
it: the maximum is that of the keys so far, and what was summed under a lower one decays by their difference. ε is then
below that of its own key's maximum. Rows are drawn once and kept for inference; in training new ones, independent and
not orthogonal, are drawn at every call. Padding counts in CAB's maximum and does not here. Cost O(N·m·E) per head.

Code: Shark-NLP/CAB, after google-research/performer.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from attnlab.contract import Constant, Pattern, UnsupportedArgument
from attnlab.nn.clamped_mixer import ClampedLinearMixer, with_total
from attnlab.nn.linear_mixer import Places, Recurrence
from attnlab.nn.masking import segment_positions
from attnlab.nn.prefix_scans import NOTHING, prefix_max, segment_max
from attnlab.nn.random_features import gaussian_rows, log_features
from attnlab.registry import Cost, Paper, Source, register


def query_features(q: ArrayLike, rows: ArrayLike, *, eps: float = 1e-4) -> jax.Array:
    """φ(q): `(B, N, H, D)` by rows `(H, m, D)` to `(B, N, H, m)`, in the dtype of `q`."""
    products, half = log_features(q, rows)
    top = products.max(-1, keepdims=True)
    return _positive(products - half - top, eps).astype(jnp.result_type(q))


def key_features(
    k: ArrayLike,
    rows: ArrayLike,
    *,
    causal: bool = False,
    eps: float = 1e-4,
    real: ArrayLike | None = None,
    segment_ids: ArrayLike | None = None,
    before: ArrayLike | None = None,
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """φ(k), and if causal the decay that belongs to it.

    Args:
      k: `(B, M, H, D)`.
      rows: `(H, m, D)`.
      causal: whether the maximum is that of the keys so far.
      eps: ε.
      real: `(B, M)` boolean, keys that count in the maximum; all when None.
      segment_ids: `(B, M)`; the maximum is that of each segment.
      before: maximum `(B, H)` before the first key; causal only.

    Returns:
      `(B, M, H, m)` in the dtype of `k`; if causal the log decays `(B, M, H)` and the maximum after the last key
      `(B, H)`, else None.
    """
    products, half = log_features(k, rows)
    tops = products.max(-1)  # (B, M, H)
    if real is not None:
        tops = jnp.where(jnp.asarray(real)[..., None], tops, NOTHING)
    decay = last = None
    if causal:
        start = jnp.full_like(tops[:, 0], NOTHING) if before is None else jnp.asarray(before, tops.dtype)
        top = prefix_max(tops, segment_ids=segment_ids, initial=start)
        earlier = jnp.concatenate([start[:, None], top[:, :-1]], axis=1)
        first = earlier < NOTHING / 2
        if segment_ids is not None:
            first |= (segment_positions(segment_ids) == 0)[..., None]
        decay, last = jnp.where(first, 0, earlier - top), top[:, -1]
    else:
        top = segment_max(tops, segment_ids=segment_ids)
    # A key that is not there may lie above the maximum: its features mean nothing, and must not overflow.
    logits = jnp.minimum(products - half - top[..., None], 0)
    return _positive(logits, eps).astype(jnp.result_type(k)), decay, last


def _positive(logits: jax.Array, eps: float) -> jax.Array:
    return (jnp.exp(logits) + eps) * logits.shape[-1] ** -0.5


@register(
    "cab.performer",
    paper=Paper("Rethinking Attention with Performers", "Choromanski et al.", 2021, arxiv="2009.14794"),
    source=Source.AUTHORS_CODE,
    repository="Shark-NLP/CAB",
    cost=Cost(time="O(N·H·m·(D+E))", memory="O(N·H·(m+E))", state="H·m·(E+1) + H"),
    kernel="linear_attention",
    summary="linear attention by positive orthogonal random features of the softmax kernel",
    small={"redraw": False},
)
class Performer(ClampedLinearMixer):
    """Tokens (B, N, C) to (B, N, C). See the module docstring for the equations.

    Args:
      features: channels C.
      num_heads: heads H.
      num_features: m random features.
      eps: ε, added to the features.
      least: bound of the denominator.
      redraw: whether training draws features anew at each call.
      rngs: streams `params`, and `dropout` with `redraw`.
      **projections: sizes and biases of the heads, pattern and context: see `ClampedLinearMixer`.

    Raises:
      ValueError: for sizes that do not fit.
    """

    patterns = frozenset({Pattern.SELF, Pattern.CAUSAL_SELF, Pattern.CROSS})
    permutation_equivariant = True

    def __init__(
        self,
        features: int,
        *,
        num_heads: int,
        num_features: int = 16,
        eps: float = 1e-4,
        least: float = 0.1,
        redraw: bool = True,
        rngs: nnx.Rngs,
        **projections: Any,
    ):
        super().__init__(features, num_heads=num_heads, least=least, rngs=rngs, **projections)
        if num_features < 1:
            raise ValueError(f"num_features must be at least 1, got {num_features}")
        groups, size = self.key.kernel.shape[1:]
        if groups != num_heads:
            raise ValueError(f"every head has features of its own: num_kv_heads must be {num_heads}, got {groups}")
        self.eps, self.key_size = eps, num_features
        self.rows = Constant(gaussian_rows(rngs.params(), num_heads, num_features, size))
        self.draws = rngs["dropout"].fork() if redraw else nnx.data(None)
        if self.context_features is not None:
            self.accepts = self.accepts - {"segment_ids"}

    def carry(self, batch_size: int) -> Any:
        return jnp.full((batch_size, self.num_heads), NOTHING, jnp.float32) if self.causal else ()

    def project(self, x: jax.Array, source: jax.Array, at: Places, carry: Any) -> tuple[Recurrence, Any]:
        if isinstance(at.segment_ids, tuple):
            raise UnsupportedArgument("Performer takes segment_ids of one sequence, not of a pair")
        rows = self.rows[...]
        if self.draws is not None and not at.deterministic:
            rows = gaussian_rows(self.draws(), *rows.shape, orthogonal=False)
        q = query_features(self.query(x), rows, eps=self.eps)
        k, decay, last = key_features(
            self.key(source),
            rows,
            causal=self.causal,
            eps=self.eps,
            real=at.real,
            segment_ids=at.segment_ids,
            before=carry if self.causal else None,
        )
        return Recurrence(q, k, with_total(self.value(source)), decay), last if self.causal else carry
