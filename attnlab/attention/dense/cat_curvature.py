"""CAT, a curvature-adaptive transformer: attention in three geometries, mixed per token (2025, arXiv:2510.01634).

A router weighs, for every token, attention in flat, hyperbolic and spherical space; all are computed:

    α = softmax(W_2 gelu(W_1 x + b_1) + b_2)        (N, branches), hidden C / 4
    y = concat_h(Σ_b α_b Y_b) W_o

Only this, and the names of the geometries, are the paper's, of which no full text and no code could be had. What
follows is our reading, per head, with q, k and v divided by √D in front of everything, and the result multiplied:

    flat          softmax(√D q·k) v
    hyperbolic    softmax(-τ d(q', k')) with q' = exp0(q), k' = exp0(k) in the ball of curvature -softplus(ρ); log0 of
                  the gyromidpoint of exp0(v) by these weights, or the mean of v in the tangent space at the origin
    spherical     softmax(τ cos(q, k)), or of -τ arccos; the mean of v / |v|, of unit length again, times that of |v|

ρ and τ are learned per head (curvature -1 and τ = 1 at the start). Points are kept off the rim of the ball by 4e-3 of
its radius. The distance needs only products of queries and keys, the midpoint only sums of λv and λ - 1
(`attnlab.nn.stereographic`, checked against geoopt). Each branch has queries, keys and values of its own, unless they
are shared, which leaves the few per cent of parameters that the paper reports. With `entropy_weight` the router's mean
entropy is added to the loss: above 0 it sharpens. Cost that of three attentions.
"""

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab.contract import Given, View, record
from attnlab.nn.aux_loss import AuxLoss
from attnlab.nn.dense_mixer import Heads, HeadSizes
from attnlab.nn.heads import FromHeads
from attnlab.nn.masking import masked_softmax, visible_keys
from attnlab.nn.mlp import MLP
from attnlab.nn.norms import unit_norm
from attnlab.nn.projected_mixer import ProjectedMixer
from attnlab.nn.softmax_core import ProductCore
from attnlab.nn.stereographic import distances, exp0, inside, tangent_midpoint
from attnlab.points import Edits
from attnlab.registry import Cost, Paper, Source, register

BRANCHES = ("euclidean", "hyperbolic", "spherical")
PAPER = Paper(
    "CAT: Curvature-Adaptive Transformers for Geometry-Aware Learning", "Lin et al.", 2025, "2510.01634", number=11
)


def hyperbolic_scores(q: jax.Array, k: jax.Array, curvature: jax.Array, tau: jax.Array) -> jax.Array:
    """-τ times the distance of exp0(q) and exp0(k); `(B, H, N, M)` float32.

    Args:
      q: vectors at the origin, `(B, N, H, D)`.
      k: the same, `(B, M, H, D)`.
      curvature: below 0, `(H,)`.
      tau: `(H,)`.
    """
    points = [inside(exp0(part, curvature), curvature).swapaxes(1, 2) for part in (q, k)]
    return -tau[:, None, None] * distances(*points, curvature[:, None, None])


def spherical_scores(q: jax.Array, k: jax.Array, tau: jax.Array, *, geodesic: bool = False) -> jax.Array:
    """τ times the cosine, or -τ times the angle, of q and k; `(B, H, N, M)` float32; arguments as above."""
    cosine = jnp.einsum("bnhd,bmhd->bhnm", *(unit_norm(part.astype(jnp.float32)) for part in (q, k)))
    if geodesic:
        cosine = -jnp.arccos(jnp.clip(cosine, -1 + 1e-6, 1 - 1e-6))
    return tau[:, None, None] * cosine


def hyperbolic_values(weights: jax.Array, v: jax.Array, curvature: jax.Array) -> jax.Array:
    """√E log0 of the midpoints of exp0(v / √E); weights `(B, H, N, M)`, v `(B, M, H, E)`, to `(B, N, H, E)` float32."""
    root = v.shape[-1] ** 0.5
    vectors = (v.astype(jnp.float32) / root).swapaxes(1, 2)
    return root * tangent_midpoint(vectors, weights, -curvature[:, None]).swapaxes(1, 2)


def spherical_values(weights: jax.Array, v: jax.Array) -> jax.Array:
    """The mean direction of the values times their mean length; as above."""
    v = v.astype(jnp.float32)
    length = jnp.sqrt(jnp.square(v).sum(-1) + 1e-12)
    direction = unit_norm(jnp.einsum("bhnm,bmhe->bnhe", weights, unit_norm(v)))
    return direction * jnp.einsum("bhnm,bmh->bnh", weights, length)[..., None]


class CurvedCore(ProductCore):
    """Attention of heads in several geometries; head h·g + b of H·g is head h in geometry b of g.

    Args:
      num_heads: H.
      branches: the geometries.
      hyper_agg: "midpoint" or "tangent".
      sphere_logit: "cos" or "geodesic".
      dropout: rate on the weights.
      param_dtype: of curvatures and temperatures.
      rngs: stream `dropout` if there is any.

    Raises:
      ValueError: for other names.
    """

    def __init__(
        self,
        num_heads: int,
        *,
        branches: Sequence[str] = BRANCHES,
        hyper_agg: str = "midpoint",
        sphere_logit: str = "cos",
        dropout: float = 0.0,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        super().__init__(dropout=dropout, rngs=rngs)
        if not branches or set(branches) - set(BRANCHES) or len(set(branches)) < len(branches):
            raise ValueError(f"branches must be different ones of {', '.join(BRANCHES)}, got {tuple(branches)}")
        if hyper_agg not in ("midpoint", "tangent"):
            raise ValueError(f"hyper_agg must be 'midpoint' or 'tangent', got {hyper_agg!r}")
        if sphere_logit not in ("cos", "geodesic"):
            raise ValueError(f"sphere_logit must be 'cos' or 'geodesic', got {sphere_logit!r}")
        self.num_heads, self.branches = num_heads, tuple(branches)
        self.midpoint, self.geodesic = hyper_agg == "midpoint", sphere_logit == "geodesic"

        def per_head(start: float) -> nnx.Param:
            return nnx.Param(jnp.full((num_heads,), start, param_dtype), logical_axes=("heads",))

        hyperbolic, spherical = "hyperbolic" in branches, "spherical" in branches
        self.rho = per_head(0.5413) if hyperbolic else nnx.data(None)  # softplus of it is 1
        self.hyper_tau = per_head(1.0) if hyperbolic else nnx.data(None)
        self.sphere_tau = per_head(1.0) if spherical else nnx.data(None)

    def curvature(self) -> jax.Array:
        """Of the hyperbolic branch, `(H,)`, below 0."""
        return -jax.nn.softplus(self.rho[...].astype(jnp.float32))

    def weights(
        self, q: jax.Array, k: jax.Array, view: View, *, edits: Edits | None = None, owner: nnx.Module | None = None
    ) -> jax.Array:
        scale, scores = q.shape[-1] ** -0.5, []
        for branch, queries, keys in zip(self.branches, self._apart(q), self._apart(k), strict=True):
            queries, keys = (part.astype(jnp.float32) * scale for part in (queries, keys))
            if branch == "euclidean":
                scores.append(jnp.einsum("bnhd,bmhd->bhnm", queries, keys) / scale)
            elif branch == "hyperbolic":
                scores.append(hyperbolic_scores(queries, keys, self.curvature(), _wide(self.hyper_tau)))
            else:
                scores.append(spherical_scores(queries, keys, _wide(self.sphere_tau), geodesic=self.geodesic))
        together = jnp.stack(scores, 2).reshape(q.shape[0], -1, q.shape[1], k.shape[1])
        together = self.edited(edits, owner, "scores", together, view=view, q=q, k=k)
        seen = visible_keys(view)
        if seen is not None and seen.shape[1] == self.num_heads:
            seen = jnp.repeat(seen, len(self.branches), axis=1)
        return masked_softmax(together, seen)

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
        weights = self.weights(q, k, view, edits=edits, owner=owner)
        weights = self.edited(edits, owner, "attention", weights, q=q, k=k, v=v, view=view)
        weights = self.drop(weights, deterministic)
        results = []
        for index, (branch, values) in enumerate(zip(self.branches, self._apart(v), strict=True)):
            mine = weights[:, index :: len(self.branches)]
            if branch == "hyperbolic" and self.midpoint:
                results.append(hyperbolic_values(mine, values, self.curvature()))
            elif branch == "spherical":
                results.append(spherical_values(mine, values))
            else:
                results.append(jnp.einsum("bhnm,bmhe->bnhe", mine, values.astype(mine.dtype)))
        return jnp.stack(results, 3).reshape(*q.shape[:3], -1).astype(v.dtype)

    def _apart(self, x: jax.Array) -> list[jax.Array]:
        """`(B, N, H·g, D)` to g arrays `(B, N, H, D)`."""
        parts = x.reshape(*x.shape[:2], self.num_heads, len(self.branches), x.shape[-1])
        return [parts[:, :, :, index] for index in range(len(self.branches))]


def _wide(variable: nnx.Variable) -> jax.Array:
    return variable[...].astype(jnp.float32)


@register(
    "cat_curvature",
    paper=PAPER,
    source=Source.ABSTRACT_ONLY,
    repository="geoopt/geoopt",
    cost=Cost(time="O(N·M·H·(D+E))", memory="O(N·M·H)", state="M·H·(D+E)"),
    summary="attention in flat, hyperbolic and spherical space, mixed by a router for every token",
)
class CurvatureAdaptiveAttention(ProjectedMixer):
    """Tokens of any layout to the same shape. See the module docstring for the equations.

    Args:
      features: channels C.
      num_heads: heads H, of every geometry.
      head_dim: D, and E; C / H when None.
      branches: the geometries, of "euclidean", "hyperbolic" and "spherical"; one alone needs no router.
      share_qkv: whether all geometries have the same queries, keys and values.
      hyper_agg: "midpoint", or "tangent" for the mean of the vectors at the origin.
      sphere_logit: "cos", or "geodesic" for the angle.
      entropy_weight: factor of the router's entropy in the loss (`AuxLoss`).
      attention_dropout: rate on the weights.
      causal: whether query i sees keys j ≤ i only.
      param_dtype: of the parameters.
      rngs: streams `params`, and `dropout` if there is any.
      **projections: biases, pattern and layout: see `ProjectedMixer`; there are as many key heads as heads.

    Raises:
      ValueError: for sizes that do not fit, or names that are not known.
    """

    def __init__(
        self,
        features: int,
        *,
        num_heads: int,
        head_dim: int | None = None,
        branches: Sequence[str] = BRANCHES,
        share_qkv: bool = False,
        hyper_agg: Literal["midpoint", "tangent"] = "midpoint",
        sphere_logit: Literal["cos", "geodesic"] = "cos",
        entropy_weight: float = 0.0,
        attention_dropout: float = 0.0,
        causal: bool = False,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
        **projections: Any,
    ):
        _, head_dim, _ = HeadSizes.of(features, num_heads, None, head_dim)
        for name in ("num_kv_heads", "value_dim"):
            if projections.get(name) is not None:
                raise ValueError(f"{name} has no meaning here, keys and values are as many and as large as queries")
        count = len(branches)
        made = num_heads if share_qkv else num_heads * count
        options = {"causal": causal, "param_dtype": param_dtype, "rngs": rngs, **projections}
        super().__init__(features, num_heads=made, head_dim=head_dim, **options)
        self.num_heads, self.shared, self.entropy_weight = num_heads, share_qkv, entropy_weight
        common = {"dtype": self.dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.sizes = HeadSizes(num_heads * count, head_dim, head_dim)
        self.out = FromHeads(num_heads, head_dim, features, use_bias=projections.get("out_bias", True), **common)
        self.router = nnx.data(None)
        if count > 1:
            self.router = MLP(features, max(features // 4, 1), out_features=count, **common)
        self.entropy = AuxLoss(jnp.zeros((), jnp.float32)) if entropy_weight and count > 1 else nnx.data(None)
        core = {"hyper_agg": hyper_agg, "sphere_logit": sphere_logit, "dropout": attention_dropout}
        self.set_core(CurvedCore(num_heads, branches=branches, **core, param_dtype=param_dtype, rngs=rngs))

    def route(self, x: jax.Array) -> jax.Array:
        """How much each geometry weighs for tokens `(B, N, C)`: `(B, N, branches)` float32."""
        if self.router is None:
            return jnp.ones((*x.shape[:-1], 1), jnp.float32)
        return jax.nn.softmax(self.router(x).astype(jnp.float32))

    def project(self, x: jax.Array, source: jax.Array, given: Given) -> Heads:
        heads = super().project(x, source, given)
        if not self.shared:
            return heads
        count = self.sizes.num_kv_heads // self.num_heads
        return Heads(*(jnp.repeat(part, count, axis=2) for part in heads[:3]))

    def merge(self, y: jax.Array, x: jax.Array, *, deterministic: bool = True) -> jax.Array:
        shares = self.route(x)
        record(self, "gate", lambda: shares)
        if self.entropy is not None and not deterministic:
            logs = jnp.log(jnp.maximum(shares, 1e-30))
            self.entropy[...] = -self.entropy_weight * (shares * logs).sum(-1).mean()
        parts = y.reshape(*y.shape[:2], self.num_heads, -1, y.shape[-1])
        mixed = jnp.einsum("bnhge,bng->bnhe", parts, shares.astype(y.dtype))
        return super().merge(mixed, x, deterministic=deterministic)
