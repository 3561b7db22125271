"""Tensor attention: each query weighs tuples of keys (Alman and Song, ICLR 2024, arXiv:2310.04064).

With m sets of keys and values, for pairs (m = 2), where ⊘ is the column-wise Kronecker product:

    L_i,(j,k) = τ Σ_c q_ic k1_jc k2_kc,   A = softmax of L over all pairs (j, k) together
    y_ie = Σ_jk A_i,(j,k) v1_je v2_ke                          y = A (V1 ⊘ V2)

and likewise for triples; m = 1 is ordinary attention. Causal, every member of a tuple is a key j ≤ i; a masked key
takes all its tuples with it. The paper has τ = 1 (1/D in its theory), the code that this is checked against D^-1/2
(lucidrains/simplicial-attention), the default here. Exact it is O(N^(m+1)·D), in blocks of tuples with a running
maximum, so that memory is O(N²) for pairs.

Where entries of q and k are small, o((log N)^(1/(m+1))), a polynomial p_g of degree g in place of exp is near, and
linear in the monomials of q and of each set of keys, which are the same for all:

    y_i ~ Σ_a w_a m_a(q_i) Π_s (Σ_j m_a(k^s_j) v^s_j) / Σ_a w_a m_a(q_i) Π_s (Σ_j m_a(k^s_j))

binomial(D + g, g) of them (`attnlab.nn.feature_maps`): time linear in N, and causal by prefix sums of inner factors.
Where entries are Ω((log N)^(1/(m+1))), nothing much faster than the exact form exists, the paper shows (under SETH).
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from attnlab.contract import View, record
from attnlab.nn.dense_mixer import HeadSizes
from attnlab.nn.feature_maps import monomial_weights, monomials
from attnlab.nn.heads import ToHeads
from attnlab.nn.masking import both, full_mask, visible_keys
from attnlab.nn.prefix_scans import NOTHING, prefix_sum
from attnlab.nn.projected_mixer import ProjectedMixer
from attnlab.nn.softmax_core import ProductCore
from attnlab.points import Edits
from attnlab.registry import Cost, Paper, Source, register
from pallas_kernels.dtypes import at_least_float32
from pallas_kernels.masks import Causal

PAPER = Paper(
    "How to Capture Higher-order Correlations? Generalizing Matrix Softmax Attention to Kronecker Computation",
    "Alman and Song",
    2024,
    arxiv="2310.04064",
    number=149,
)
_REPOSITORY = "lucidrains/simplicial-attention"


def tensor_attention(
    q: ArrayLike,
    keys: Sequence[ArrayLike],
    values: Sequence[ArrayLike],
    *,
    causal: bool = False,
    mask: ArrayLike | None = None,
    scale: float | None = None,
    block_size: int = 32,
) -> jax.Array:
    """Attention to tuples of keys, exactly.

    Args:
      q: queries, (B, N, H, D).
      keys: m sets of keys, each (B, M, G, D), G a divisor of H.
      values: as many sets of values, (B, M, G, E).
      causal: query i sees keys j ≤ i of every set.
      mask: boolean, (B, M), or broadcastable to (B, H, N, M): which keys, of every set, each query may see.
      scale: τ; D^-1/2 when None.
      block_size: tuples of all sets but the last that are weighed at once.

    Returns:
      (B, N, H, E) in the dtype of `q`; zeros for a query that sees no tuple.

    Raises:
      ValueError: for sets that do not fit.
    """
    q, keys, values = _checked(q, keys, values)
    (b, n, h, d), (g, m) = q.shape, (keys[0].shape[2], keys[0].shape[1])
    r, e, wide = h // g, values[0].shape[-1], at_least_float32(q.dtype)
    tau = d**-0.5 if scale is None else scale
    seen = _seen(b, g, r, n, m, mask, causal)
    queries = q.reshape(b, n, g, r, d).astype(wide)
    # The tuples of all sets but the last, as one set: products of their keys, and of their values.
    firsts = _tuples([part.astype(wide) for part in keys[:-1]], (b, 1, g, d), wide)
    firsts_v = _tuples([part.astype(wide) for part in values[:-1]], (b, 1, g, e), wide)
    last, last_v = keys[-1].astype(wide), values[-1].astype(wide)
    firsts_seen = functools.reduce(_pairs_seen, [seen] * (len(keys) - 1), jnp.ones((1, 1, 1, 1, 1), bool))
    count = firsts.shape[1]
    size = min(block_size, count)
    padding = -count % size
    blocks = tuple(
        jnp.moveaxis(jnp.pad(part, ((0, 0), (0, padding), (0, 0), (0, 0))).reshape(b, -1, size, *part.shape[2:]), 1, 0)
        for part in (firsts, firsts_v)
    )
    shown = jnp.broadcast_to(firsts_seen, (*firsts_seen.shape[:4], count))
    shown = jnp.pad(shown, ((0, 0),) * 4 + ((0, padding),))
    shown = jnp.moveaxis(shown.reshape(*shown.shape[:4], -1, size), 4, 0)

    @jax.checkpoint
    def block(carry: tuple[jax.Array, ...], part: tuple[jax.Array, ...]) -> tuple[tuple[jax.Array, ...], None]:
        top, total, sums = carry
        k, v, there = part
        scores = tau * jnp.einsum("bngrd,bjgd,bkgd->bgrnjk", queries, k, last, optimize=[(0, 1), (0, 1)])
        allowed = there[..., None] & seen[..., None, :]
        scores = jnp.where(allowed, scores, NOTHING)
        new = jax.lax.stop_gradient(jnp.maximum(top, scores.max((-1, -2))))
        weights = jnp.where(allowed, jnp.exp(scores - new[..., None, None]), 0)
        faded = jnp.exp(top - new)
        inner = jnp.einsum("bgrnjk,bkge->bgrnje", weights, last_v)
        added = jnp.einsum("bgrnje,bjge->bgrne", inner, v)
        return (new, faded * total + weights.sum((-1, -2)), faded[..., None] * sums + added), None

    start = (jnp.full((b, g, r, n), NOTHING, wide), jnp.zeros((b, g, r, n), wide), jnp.zeros((b, g, r, n, e), wide))
    (_, total, sums), _ = jax.lax.scan(block, start, (*blocks, shown))
    y = sums / jnp.where(total > 0, total, 1)[..., None]
    return jnp.moveaxis(y, 3, 1).reshape(b, n, h, e).astype(q.dtype)


def tensor_attention_poly(
    q: ArrayLike,
    keys: Sequence[ArrayLike],
    values: Sequence[ArrayLike],
    *,
    degree: int = 2,
    coefficients: Sequence[float] | None = None,
    causal: bool = False,
    mask: ArrayLike | None = None,
    segment_ids: ArrayLike | None = None,
    scale: float | None = None,
) -> jax.Array:
    """Attention to tuples of keys with a polynomial in place of exp; in time linear in N unless masked by pairs.

    Args:
      q: queries, (B, N, H, D).
      keys: m sets of keys, each (B, M, G, D).
      values: as many sets of values, (B, M, G, E).
      degree: of the polynomial; weights are positive for Taylor polynomials of even degree.
      coefficients: p_0..p_g of the polynomial; those of exp's Taylor series when None.
      causal: query i sees keys j ≤ i of every set.
      mask: boolean, (B, M), or broadcastable to (B, H, N, M), which costs O(N·M).
      segment_ids: (B, N), packed sequences; causal only.
      scale: τ; D^-1/2 when None.

    Returns:
      (B, N, H, E) in the dtype of `q`.

    Raises:
      ValueError: for sets that do not fit, or segments that are not causal.
    """
    q, keys, values = _checked(q, keys, values)
    if segment_ids is not None and not causal:
        raise ValueError("segment_ids are for causal=True; without it give the mask")
    (b, n, h, d), (g, m) = q.shape, (keys[0].shape[2], keys[0].shape[1])
    r, wide = h // g, at_least_float32(q.dtype)
    weights = monomial_weights(d, degree, scale=d**-0.5 if scale is None else scale, coefficients=coefficients)
    phi = monomials(q.astype(wide), degree) * jnp.asarray(weights, wide)
    by_pair = mask is not None and jnp.ndim(mask) == 4
    product: Any = 1
    for k, v in zip(keys, values, strict=True):
        features = monomials(k.astype(wide), degree)
        with_one = jnp.concatenate([v.astype(wide), jnp.ones((*v.shape[:-1], 1), wide)], -1)
        if by_pair:
            seen = _seen(b, g, r, n, m, mask, causal).astype(wide)
            if segment_ids is not None:
                ids = jnp.asarray(segment_ids)
                seen = seen * (ids[:, None, None, :, None] == ids[:, None, None, None, :])
            sums = jnp.einsum("bgrnm,bmga,bmge->bngrae", jnp.broadcast_to(seen, (b, g, r, n, m)), features, with_one)
        else:
            terms = jnp.einsum("bmga,bmge->bmgae", features, with_one)
            terms = terms if mask is None else jnp.where(jnp.asarray(mask)[:, :, None, None, None], terms, 0)
            sums = prefix_sum(terms, segment_ids=segment_ids) if causal else terms.sum(1, keepdims=True)
            sums = sums[:, :, :, None]
        product = product * sums
    queries = phi.reshape(b, n, g, r, -1)
    y = jnp.einsum("bngra,bngrae->bngre", queries, jnp.broadcast_to(product, (b, n, g, r, *product.shape[-2:])))
    total = y[..., -1:]
    y = jnp.where(total == 0, 0, y[..., :-1] / jnp.where(total == 0, 1, total))
    return y.reshape(b, n, h, -1).astype(q.dtype)


def _checked(
    q: ArrayLike, keys: Sequence[ArrayLike], values: Sequence[ArrayLike]
) -> tuple[jax.Array, list[jax.Array], list[jax.Array]]:
    q, keys, values = jnp.asarray(q), [jnp.asarray(k) for k in keys], [jnp.asarray(v) for v in values]
    if not keys or len(keys) != len(values):
        raise ValueError(f"keys and values must be as many sets, at least one: {len(keys)} and {len(values)}")
    for name, sets in (("keys", keys), ("values", values)):
        if any(part.ndim != 4 or part.shape != sets[0].shape for part in sets):
            raise ValueError(f"{name} must be sets of one shape (B, M, G, ·), got {[part.shape for part in sets]}")
    fits = q.ndim == 4 and q.shape[0] == keys[0].shape[0] and q.shape[3] == keys[0].shape[3]
    if not fits or keys[0].shape[:3] != values[0].shape[:3] or q.shape[2] % keys[0].shape[2]:
        raise ValueError(f"q {q.shape}, keys {keys[0].shape} and values {values[0].shape} do not fit")
    return q, keys, values


def _seen(b: int, g: int, r: int, n: int, m: int, mask: ArrayLike | None, causal: bool) -> jax.Array:
    """Which keys each query sees, boolean, broadcastable to (B, G, R, N, M)."""
    seen = jnp.tri(n, m, dtype=bool)[None, None] if causal else jnp.ones((1, 1, 1, m), bool)
    if mask is not None:
        seen = both(seen, full_mask(jnp.asarray(mask)))
    heads = (g, r) if seen.shape[1] == g * r and seen.shape[1] > 1 else (1, 1)
    return seen.reshape(seen.shape[0], *heads, *seen.shape[2:])


def _tuples(sets: Sequence[jax.Array], empty: tuple[int, ...], dtype: Any) -> jax.Array:
    """Products of one of each set, (B, M^s, G, D), the last set's index fastest; one tuple of nothing for no sets."""
    result = jnp.ones(empty, dtype)
    for part in sets:
        result = (result[:, :, None] * part[:, None]).reshape(part.shape[0], -1, *part.shape[2:])
    return result


def _pairs_seen(first: jax.Array, second: jax.Array) -> jax.Array:
    together = first[..., :, None] & second[..., None, :]
    return together.reshape(*together.shape[:-2], -1)


class TupleCore(ProductCore):
    """Attention to tuples; head g·m + s of the cached heads is head g of set s.

    Args:
      order: m, sets of keys.
      degree: of the polynomial; None for the exact form.
      coefficients: of the polynomial; exp's Taylor series when None.
      scale: τ; D^-1/2 when None.
      block_size: of the exact form.

    Raises:
      ValueError: for an order below 1, or coefficients without a degree.
    """

    points = frozenset()

    def __init__(
        self,
        *,
        order: int = 2,
        degree: int | None = None,
        coefficients: Sequence[float] | None = None,
        scale: float | None = None,
        block_size: int = 32,
    ):
        super().__init__()
        if order < 1:
            raise ValueError(f"order must be at least 1, got {order}")
        if coefficients is not None and degree is None:
            raise ValueError(f"coefficients are of a polynomial: give its degree, got {coefficients}")
        self.order, self.degree, self.scale, self.block_size = order, degree, scale, block_size
        self.coefficients = None if coefficients is None else tuple(coefficients)

    def attend(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        view: View,
        *,
        edits: Edits | None = None,
        deterministic: bool = True,
        owner: nnx.Module | None = None,
    ) -> jax.Array:
        if owner is not None:
            record(owner, "attention", lambda: self.weights(q, k, view))
        return self._of_values(q, k, v, view)

    def weights(
        self, q: jax.Array, k: jax.Array, view: View, *, edits: Edits | None = None, owner: nnx.Module | None = None
    ) -> jax.Array:
        """`(B, H, N, M)`: the weight of all tuples with a key in them, averaged over its place."""
        groups, wide = k.shape[2] // self.order, jnp.float32
        one = jnp.broadcast_to(jnp.eye(k.shape[1], dtype=wide)[None, :, None], (*k.shape[:2], groups, k.shape[1]))
        marginals = []
        for place in range(self.order):
            sets = [one if place == s else jnp.ones_like(one) for s in range(self.order)]
            values = jnp.stack(sets, 3).reshape(*k.shape[:3], k.shape[1])
            marginals.append(self._of_values(q.astype(wide), k.astype(wide), values, view))
        return jnp.moveaxis(sum(marginals) / self.order, 1, 2)

    def _of_values(self, q: jax.Array, k: jax.Array, v: jax.Array, view: View) -> jax.Array:
        keys, values = (
            [part.reshape(*part.shape[:2], -1, self.order, part.shape[-1])[:, :, :, s] for s in range(self.order)]
            for part in (k, v)
        )
        if self.degree is None:
            mask = visible_keys(view)
            return tensor_attention(q, keys, values, mask=mask, scale=self.scale, block_size=self.block_size)
        options = {"degree": self.degree, "coefficients": self.coefficients, "scale": self.scale}
        by_key = view.mask is None or jnp.ndim(view.mask) == 2
        # Objects that are one and the same: nobody gave the tokens another order than that of the array.
        in_order = view.q_idx is view.k_idx is view.q_at and not isinstance(view.segment_ids, tuple)
        if by_key and view.rule == Causal() and in_order:
            linear = {"causal": True, "mask": view.mask, "segment_ids": view.segment_ids}
            return tensor_attention_poly(q, keys, values, **linear, **options)
        whole = by_key and view.rule is None and view.segment_ids is None
        return tensor_attention_poly(q, keys, values, mask=view.mask if whole else visible_keys(view), **options)


@register(
    "kronecker_attention",
    paper=PAPER,
    source=Source.THIRD_PARTY,
    repository=_REPOSITORY,
    cost=Cost(time="O(N·M²·H·D), by a polynomial O(N·H·r·E)", memory="O(N·M·H)", state="2·M·G·(D+E)"),
    summary="every query weighs pairs, or tuples, of keys by one softmax; or by a polynomial in linear time",
)
class KroneckerAttention(ProjectedMixer):
    """Tokens of any layout to the same shape. See the module docstring for the equations.

    Args:
      features: channels C.
      num_heads: query heads H.
      num_kv_heads: heads G of every set of keys and values; H when None.
      head_dim: D; C / H when None.
      value_dim: E; D when None.
      order: m, sets of keys and values.
      degree: of the polynomial in place of exp; None for the exact form.
      coefficients: of the polynomial; exp's Taylor series when None.
      scale: τ; D^-1/2 when None.
      block_size: tuples of all sets but the last that the exact form weighs at once.
      causal: whether query i sees keys j ≤ i only.
      qkv_bias: whether the maps to queries, keys and values have a bias.
      param_dtype: of the parameters.
      rngs: stream `params`.
      **projections: pattern, layout and norms of queries and keys: see `ProjectedMixer`.

    Raises:
      ValueError: for sizes that do not fit.
    """

    def __init__(
        self,
        features: int,
        *,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        value_dim: int | None = None,
        order: int = 2,
        degree: int | None = None,
        coefficients: Sequence[float] | None = None,
        scale: float | None = None,
        block_size: int = 32,
        causal: bool = False,
        qkv_bias: bool = True,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
        **projections: Any,
    ):
        sizes = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim, "value_dim": value_dim}
        options = {"causal": causal, "qkv_bias": qkv_bias, "param_dtype": param_dtype, "rngs": rngs, **projections}
        super().__init__(features, **sizes, **options)
        core = TupleCore(order=order, degree=degree, coefficients=coefficients, scale=scale, block_size=block_size)
        groups, key_size, value_size = self.sizes
        self.sizes = HeadSizes(groups * order, key_size, value_size)
        source = features if self.context_features is None else self.context_features
        maps = {"use_bias": qkv_bias, "dtype": self.dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.key = ToHeads(source, groups * order, key_size, **maps)
        self.value = ToHeads(source, groups * order, value_size, **maps)
        self.set_core(core)
