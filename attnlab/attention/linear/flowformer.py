"""Flow-Attention (Flowformer, Wu et al., ICML 2022, arXiv:2202.06258): linear attention with conserved flows.

Sinks i (queries, L of them) and sources j (keys, S of them) with Q = sigmoid(q), K = sigmoid(k), per head. What flows
into each sink and out of each source is held at 1, which makes sources compete and sinks differ:

    I_i = 1 / (Q_i · Σ_j K_j),               O_j = 1 / (K_j · Σ_i Q_i)             incoming, outgoing flow
    a_i = sigmoid(L/S · Q_i · Σ_j O_j K_j)                                         allocation
    c_j = S softmax_j(clip(K_j · Σ_i I_i Q_i))                                     competition
    y_i = a_i I_i Q_i Σ_j c_j K_j v_jᵀ

Causal, every sum is over the tokens up to t, and with n_t of them

    I_t = n_t / (Q_t · Σ K),                 O_t = n_t / (K_t · Σ Q)
    a_t = sigmoid(Q_t · Σ O K / n_t),        c_t = n_t exp(s_t) / Σ exp(s),    s_t = clip(K_t · Σ I Q / n_t)
    y_t = a_t (I_t / n_t) Q_t Σ c K vᵀ

A token's competition is settled when it comes, so five sums of vectors and numbers beside Σ c K vᵀ are the whole decode
state. ε = 1e-6 is added to both vectors of every product Q · Σ and K · Σ; the code for images adds it once more, to the
product. clip is to [-1, 1] in the core code, to [-5, 5] in that for language and none in that for time series. For as
many sources as sinks s averages 1, so about half of the tokens are clipped and pass no gradient there.

The code for the Long Range Arena (in Flax) has ReLU features, and its softmax runs over the heads, not the sources; we
follow the core code. Attention to a context is not causal: its sums run over all queries. Masks, segments, images and
videos (sets of tokens; causal: in row-major order) are our extension. Cost O(N·D·E) per head. Names and
defaults: thuml/Flowformer.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from attnlab.contract import Layout, Pattern, UnsupportedArgument
from attnlab.nn import feature_maps
from attnlab.nn.linear_mixer import Places, Recurrence
from attnlab.nn.prefix_scans import NOTHING, prefix_sum, segment_sum, softmax_recurrence
from attnlab.nn.projected_mixer import ProjectedLinearMixer
from attnlab.registry import Cost, Paper, Source, register
from pallas_kernels.dtypes import at_least_float32
from pallas_kernels.linear_attention import linear_attention

PAPER = Paper(
    "Flowformer: Linearizing Transformers with Conservation Flows", "Wu et al.", 2022, arxiv="2202.06258", number=113
)


class Flows(NamedTuple):
    """Sums over the tokens so far, float32: what the causal form carries beside the memory.

    Attributes:
      count: tokens, `(B,)`.
      keys: Σ K, `(B, H, D)`.
      queries: Σ Q.
      outgoing: Σ O K.
      incoming: Σ I Q.
      competition: log Σ exp(s), `(B, H)`.
    """

    count: jax.Array
    keys: jax.Array
    queries: jax.Array
    outgoing: jax.Array
    incoming: jax.Array
    competition: jax.Array

    @classmethod
    def none(cls, batch_size: int, num_heads: int, size: int) -> "Flows":
        """Those of no tokens; each an array of its own."""
        vectors = (jnp.zeros((batch_size, num_heads, size), jnp.float32) for _ in range(4))
        return cls(jnp.zeros((batch_size,), jnp.float32), *vectors, jnp.full((batch_size, num_heads), NOTHING))


def flow_features(
    q: ArrayLike,
    k: ArrayLike,
    *,
    causal: bool = False,
    clip: float | None = 1.0,
    eps: float = 1e-6,
    flow_eps: float = 0.0,
    real: ArrayLike | None = None,
    real_queries: ArrayLike | None = None,
    segment_ids: ArrayLike | None = None,
    before: Flows | None = None,
) -> tuple[jax.Array, jax.Array, Flows | None]:
    """Queries and keys whose linear attention, without a denominator, is Flow-Attention.

    Args:
      q: Q, positive features of queries, `(B, N, H, D)`.
      k: K, of keys, `(B, M, H, D)`; M = N if causal.
      causal: whether all sums are over the tokens up to each one.
      clip: bound of the conserved flow of a source; none when None.
      eps: added to both vectors of a product.
      flow_eps: added to the products.
      real: `(B, M)` boolean, which keys exist; all when None. What comes out for others means nothing.
      real_queries: `(B, N)`, which queries exist; all when None. In the causal form they are the keys.
      segment_ids: `(B, N)` of queries and keys alike; flows are conserved in each segment.
      before: sums of the tokens before the first; of the causal form.

    Returns:
      `(B, N, H, D)` and `(B, M, H, D)` in the dtypes of `q` and `k`, and the sums after the last token if causal.
    """
    q, k = jnp.asarray(q), jnp.asarray(k)
    types, wide = (q.dtype, k.dtype), at_least_float32(q.dtype)
    q, k, ids = q.astype(wide), k.astype(wide), segment_ids
    sources = jnp.ones(k.shape[:2], bool) if real is None else jnp.asarray(real)
    sinks = jnp.ones(q.shape[:2], bool) if real_queries is None else jnp.asarray(real_queries)
    sinks = sources if causal else sinks
    first: Flows | tuple[None, ...] = (None,) * 6 if before is None else before

    def total(x: jax.Array, exist: jax.Array, initial: jax.Array | None) -> jax.Array:
        x = jnp.where(exist.reshape(*exist.shape, *(1,) * (x.ndim - 2)), x, 0)
        if causal:
            return prefix_sum(x, segment_ids=ids, initial=initial)
        return segment_sum(x, segment_ids=ids)

    def flow(x: jax.Array, sums: jax.Array) -> jax.Array:
        return jnp.einsum("bnhd,bnhd->bnh", x + eps, jnp.broadcast_to(sums + eps, x.shape)) + flow_eps

    keys, queries = total(k, sources, first[1]), total(q, sinks, first[2])
    count = total(sources.astype(wide), sources, first[0])
    received = jnp.maximum(count, 1)[..., None]
    sent = received if causal else jnp.maximum(total(sinks.astype(wide), sinks, None), 1)[..., None]
    normal = received if causal else 1.0
    incoming = jnp.where(count[..., None] > 0, normal / flow(q, keys), 0)
    outgoing = normal / flow(k, queries)
    out_flow = total(k * outgoing[..., None], sources, first[3])
    in_flow = total(q * incoming[..., None], sinks, first[4])
    allocation = jax.nn.sigmoid(flow(q, out_flow) / normal * (sent / received))
    strength = flow(k, in_flow) / normal
    strength = strength if clip is None else jnp.clip(strength, -clip, clip)
    share, _, after = softmax_recurrence(strength, causal=causal, real=sources, segment_ids=ids, initial=first[5])
    q = q * (incoming * allocation / normal)[..., None]
    k = k * (share * received)[..., None]
    flows = None
    if causal:
        flows = Flows(*(part[:, -1] for part in (count, keys, queries, out_flow, in_flow)), after)
    return q.astype(types[0]), k.astype(types[1]), flows


def flow_attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    causal: bool = False,
    clip: float | None = 1.0,
    eps: float = 1e-6,
    flow_eps: float = 0.0,
) -> jax.Array:
    """Flow-Attention of positive features.

    Args:
      q: Q, `(B, N, H, D)`.
      k: K, `(B, M, H, D)`; M = N if causal.
      v: values, `(B, M, H, E)`.
      causal: token t reads tokens s ≤ t.
      clip: bound of the conserved flow of a source; none when None.
      eps: added to both vectors of a product.
      flow_eps: added to the products.

    Returns:
      `(B, N, H, E)` in the dtype of `q`; flows are float32.
    """
    q, k, _ = flow_features(q, k, causal=causal, clip=clip, eps=eps, flow_eps=flow_eps)
    return linear_attention(q, k, v, causal=causal)


@register(
    "flowformer",
    paper=PAPER,
    source=Source.AUTHORS_CODE,
    repository="thuml/Flowformer",
    cost=Cost(time="O(N·H·D·E)", memory="O(N·H·(D+E))", state="H·D·(E+4) + H"),
    kernel="linear_attention",
    summary="linear attention with conserved flows: sources compete, sinks are allotted",
)
class FlowAttention(ProjectedLinearMixer):
    """Tokens of any layout to the same shape. See the module docstring for the equations.

    Args:
      features: channels C.
      num_heads: heads H.
      causal: whether token t sees tokens up to t only.
      feature_map: name of the map to positive features, see `attnlab.nn.feature_maps`.
      clip: bound of the conserved flow of a source; none when None.
      eps: added to both vectors of a product.
      flow_eps: added to the products; 1e-6 in the authors' code for images.
      qkv_bias: whether the maps to queries, keys and values have a bias; the last map has.
      rngs: stream `params`.
      **projections: sizes of the heads, layout, context and dtypes: see `ProjectedLinearMixer`.

    Raises:
      ValueError: for sizes that do not fit, or an unknown feature map.
      UnsupportedArgument: for causal attention to a context, or grouped heads.
    """

    patterns = frozenset({Pattern.SELF, Pattern.CAUSAL_SELF, Pattern.CROSS})
    layouts = frozenset(Layout)
    permutation_equivariant = True
    independent_queries = False

    def __init__(
        self,
        features: int,
        *,
        num_heads: int,
        causal: bool = False,
        feature_map: str = "sigmoid",
        clip: float | None = 1.0,
        eps: float = 1e-6,
        flow_eps: float = 0.0,
        qkv_bias: bool = True,
        rngs: nnx.Rngs,
        **projections: Any,
    ):
        options = {"out_bias": True, **projections, "num_heads": num_heads, "causal": causal, "use_bias": qkv_bias}
        super().__init__(features, **options, rngs=rngs)
        if self.key.kernel.shape[1] != num_heads:
            raise UnsupportedArgument("FlowAttention conserves flows per head: num_kv_heads must be num_heads")
        if causal and self.context_features is not None:
            raise UnsupportedArgument("FlowAttention has no causal cross form: flows to a context are of all queries")
        if self.context_features is not None:
            self.accepts = self.accepts - {"segment_ids"}
        self.feature_map, self.clip, self.eps, self.flow_eps = feature_map, clip, eps, flow_eps
        feature_maps.feature_map(feature_map)

    def carry(self, batch_size: int) -> Any:
        return Flows.none(batch_size, self.num_heads, self.key_size) if self.causal else ()

    def check_decodes(self, cross: bool) -> None:
        if cross or self.context_features is not None:
            raise UnsupportedArgument("FlowAttention does not decode attention to a context: it sums over all queries")
        super().check_decodes(cross)

    def project(self, x: jax.Array, source: jax.Array, at: Places, carry: Any) -> tuple[Recurrence, Any]:
        if at.segment_ids is not None and isinstance(at.segment_ids, tuple):
            raise UnsupportedArgument("FlowAttention takes segment_ids of one sequence, not of a pair")
        phi = feature_maps.feature_map(self.feature_map)
        q, k, flows = flow_features(
            phi(self.query(x)),
            phi(self.key(source)),
            causal=self.causal,
            clip=self.clip,
            eps=self.eps,
            flow_eps=self.flow_eps,
            real=at.real,
            real_queries=at.real_queries,
            segment_ids=at.segment_ids,
            before=carry if self.causal else None,
        )
        return Recurrence(q, k, self.value(source)), carry if flows is None else flows

    def merge(self, y: jax.Array, x: jax.Array) -> jax.Array:
        return self.out(y)
