"""Softmax attention with a principle taken away, in linear time (2025, arXiv:2510.11602), and mixing taken away whole.

The paper asks which of attention's principles language models need. Without the exponential, in its "approximate"
form, a score counts by the second-order Taylor polynomial, as in Based (Arora et al., 2024, arXiv:2402.18668; code:
fla-org/flash-linear-attention, against which the function is checked):

    A_ij = (1 + s_ij + s_ij² / 2) / Σ_{t ≤ i} (1 + s_it + s_it² / 2),   s_ij = q_i·k_j D^-1/2

Numerators and denominators are each summed over the three orders, then divided once; the paper's appendix prints three
fractions. Its "non-approximate" form takes away that scores depend on pairs: of each token and head there is a scalar,

    z_j = Σ_c silu(x_j W_q)_c (x_j W_k)_c D^-1/2,   A_ij = exp(z_j) / Σ_{t ≤ i} exp(z_t)

a softmax of the tokens so far, which knows the query by its normaliser alone. And without any mixing (`mlp`) a gated
feed-forward stands in its place, with 4C/3 hidden channels, as many parameters as attention has:

    y_i = W_down (silu(W_gate x_i) ⊙ (W_up x_i))

The paper's others, whose scores come from elsewhere, are in `attnlab.models.deconstructed`. There is no code of the
authors; beside the approximate form everything follows the paper's text.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from attnlab.contract import Given, Layout, Pattern, TokenMixer, View
from attnlab.nn.feature_maps import taylor
from attnlab.nn.linear_mixer import LinearState, Places, Recurrence
from attnlab.nn.masking import segment_pair
from attnlab.nn.mlp import GatedMLP
from attnlab.nn.norms import RMSNorm
from attnlab.nn.prefix_scans import NOTHING, softmax_recurrence
from attnlab.nn.projected_mixer import ProjectedLinearMixer
from attnlab.points import Edits
from attnlab.registry import Cost, Paper, Source, register
from pallas_kernels.dtypes import at_least_float32
from pallas_kernels.linear_attention import linear_attention

PAPER = Paper(
    "Deconstructing Attention: Investigating Design Principles for Effective Language Modeling",
    "Xue et al.",
    2025,
    arxiv="2510.11602",
    number=156,
)


def approximate_attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    causal: bool = True,
    scale: float | None = None,
    normalize: bool = True,
    eps: float = 1e-6,
) -> jax.Array:
    """Attention by the second-order Taylor polynomial of exp.

    Args:
      q: queries, (B, N, H, D).
      k: keys, (B, M, G, D); M = N if causal.
      v: values, (B, M, G, E).
      causal: query i sees keys j ≤ i.
      scale: of the scores; D^-1/2 when None.
      normalize: whether rows are divided by their sum.
      eps: added to it.

    Returns:
      (B, N, H, E) in the dtype of `q`.
    """
    q, k, v = jnp.asarray(q), jnp.asarray(k), jnp.asarray(v)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k = (taylor(part, 2, scale=scale) for part in (q, k))
    if not normalize:
        return linear_attention(q, k, v, causal=causal)
    with_one = jnp.concatenate([v, jnp.ones_like(v[..., :1])], -1)
    y = linear_attention(q, k, with_one, causal=causal).astype(at_least_float32(q.dtype))
    return (y[..., :-1] / (y[..., -1:] + eps)).astype(q.dtype)


@register(
    "deconstructed_attention.approximate",
    paper=PAPER,
    source=Source.THIRD_PARTY,
    repository="fla-org/flash-linear-attention",
    cost=Cost(time="O(N·H·D²·E)", memory="O(N·H·D²)", state="H·D²·(E+1)"),
    kernel="linear_attention",
    summary="softmax attention's exponential replaced by its second-order Taylor polynomial",
    small={"head_dim": 4},
)
class TaylorAttention(ProjectedLinearMixer):
    """Tokens of any layout to the same shape. See the module docstring for the equations.

    Args:
      features: channels C.
      num_heads: heads H.
      degree: of the polynomial; weights are positive for even ones.
      scale: of the scores; D^-1/2 when None.
      rngs: stream `params`.
      **projections: sizes of heads, biases, pattern and layout: see `ProjectedLinearMixer`.
    """

    patterns = frozenset(Pattern)
    layouts = frozenset(Layout)
    permutation_equivariant = True
    normalize = True

    def __init__(
        self,
        features: int,
        *,
        num_heads: int,
        degree: int = 2,
        scale: float | None = None,
        rngs: nnx.Rngs,
        **projections: Any,
    ):
        super().__init__(features, num_heads=num_heads, **projections, rngs=rngs)
        self.degree, self.score_scale = degree, self.key_size**-0.5 if scale is None else scale
        self.key_size = math.comb(self.key_size + degree, degree)

    def project(self, x: jax.Array, source: jax.Array, at: Places, carry: Any) -> tuple[Recurrence, Any]:
        q, k = (taylor(y, self.degree, scale=self.score_scale) for y in (self.query(x), self.key(source)))
        return Recurrence(q, k, self.value(source)), carry

    def merge(self, y: jax.Array, x: jax.Array) -> jax.Array:
        return self.out(y)


def prefix_softmax(z: ArrayLike, v: ArrayLike, *, causal: bool = True) -> jax.Array:
    """The softmax of one logit for each token, over the tokens so far, as weights of values.

    Args:
      z: logits, (B, N, H).
      v: values, (B, N, H, E).
      causal: False for the softmax over all tokens.

    Returns:
      (B, N, H, E) in the dtype of `v`.
    """
    v = jnp.asarray(v)
    weights, decay, _ = softmax_recurrence(z, causal=causal)
    k = weights[..., None].astype(v.dtype)
    return linear_attention(jnp.ones_like(k), k, v, log_decay=decay, causal=causal)


@register(
    "deconstructed_attention.non_approximate",
    paper=PAPER,
    source=Source.PAPER_TEXT,
    cost=Cost(time="O(N·H·E)", memory="O(N·H·E)", state="H·(E+1)"),
    kernel="linear_attention",
    summary="one logit for each token and head; every query takes the softmax of the tokens so far",
)
class PrefixSoftmaxAttention(ProjectedLinearMixer):
    """Tokens of any layout to the same shape. See the module docstring for the equations.

    Args:
      features: channels C.
      num_heads: heads H.
      head_dim: D, and E; C / H when None.
      qk_norm: whether q, behind its silu, and k pass an RMSNorm over D, as they do in the paper's largest model.
      scale: of the products; D^-1/2 when None.
      causal: whether token i takes the tokens up to i.
      layout: of the tokens.
      use_bias: whether the four maps have a bias.
      dtype: of the computation and the result; that of the tokens when None.
      param_dtype: of the parameters.
      rngs: stream `params`.
    """

    patterns = frozenset({Pattern.CAUSAL_SELF, Pattern.SELF})
    layouts = frozenset(Layout)
    permutation_equivariant = True

    def __init__(
        self,
        features: int,
        *,
        num_heads: int,
        head_dim: int | None = None,
        qk_norm: bool = False,
        scale: float | None = None,
        causal: bool = True,
        layout: Layout = Layout.SEQUENCE,
        use_bias: bool = False,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        options = {"head_dim": head_dim, "causal": causal, "layout": layout, "use_bias": use_bias}
        super().__init__(features, num_heads=num_heads, **options, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        size = self.key_size
        self.logit_scale, self.key_size = size**-0.5 if scale is None else scale, 1
        self.query_norm = self.key_norm = nnx.data(None)
        if qk_norm:
            self.query_norm, self.key_norm = (RMSNorm(size, param_dtype=param_dtype, rngs=rngs) for _ in range(2))

    def carry(self, batch_size: int) -> jax.Array:
        """The logarithm of the sum of no tokens."""
        return jnp.full((batch_size, self.num_heads), NOTHING, jnp.float32)

    def project(self, x: jax.Array, source: jax.Array, at: Places, carry: Any) -> tuple[Recurrence, Any]:
        q, k, v = jax.nn.silu(self.query(source)), self.key(source), self.value(source)
        if self.query_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        wide = at_least_float32(q.dtype)
        logits = self.logit_scale * (q.astype(wide) * k.astype(wide)).sum(-1)
        ids = None if at.segment_ids is None else segment_pair(at.segment_ids)[1]
        weights, decay, after = softmax_recurrence(
            logits, causal=self.causal, real=at.real, segment_ids=ids, initial=carry if self.causal else None
        )
        weights = weights[..., None].astype(v.dtype)
        return Recurrence(jnp.ones_like(weights), weights, v, decay), carry if after is None else after

    def merge(self, y: jax.Array, x: jax.Array) -> jax.Array:
        return self.out(y)


@register(
    "deconstructed_attention.mlp",
    paper=PAPER,
    source=Source.PAPER_TEXT,
    cost=Cost(time="O(N·C²)", memory="O(N·C)", state="0"),
    summary="no mixing at all: a gated feed-forward with as many parameters in the place of attention",
)
class NoMixing(TokenMixer):
    """Tokens of any layout to the same shape, each by itself; those that a mask hides are zeros.

    Args:
      features: channels C.
      hidden_features: of the feed-forward; 4C/3 when None, rounded down.
      causal: has no effect, a token sees itself alone; for models that ask for it.
      layout: of the tokens.
      use_bias: whether the three maps have a bias.
      dtype: of the computation and the result; that of the tokens when None.
      param_dtype: of the parameters.
      rngs: stream `params`.
    """

    patterns = frozenset({Pattern.CAUSAL_SELF, Pattern.SELF})
    layouts = frozenset(Layout)
    accepts = frozenset({"key_mask", "segment_ids"})
    permutation_equivariant = True

    def __init__(
        self,
        features: int,
        *,
        hidden_features: int | None = None,
        causal: bool = True,
        layout: Layout = Layout.SEQUENCE,
        use_bias: bool = False,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        hidden = 4 * features // 3 if hidden_features is None else hidden_features
        self.features, self.causal, self.layout, self.dtype = features, causal, Layout(layout), dtype
        self.mlp = GatedMLP(features, hidden, use_bias=use_bias, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

    def mix(self, x: jax.Array, given: Given) -> jax.Array:
        y = self.mlp(x)
        return y if given.mask is None else jnp.where(given.mask.reshape(*x.shape[:-1], 1), y, 0)

    def init_state(
        self,
        batch_size: int,
        max_length: int | None = None,
        *,
        context: ArrayLike | None = None,
        context_mask: ArrayLike | None = None,
        dtype: Any = None,
    ) -> LinearState:
        """How many tokens there were; nothing of them."""
        self.check_decodes(context is not None)
        length, next_at = jnp.zeros((batch_size,), jnp.int32), jnp.zeros((batch_size,), jnp.int32)
        return LinearState((), length, next_at)

    def prefill(
        self,
        x: ArrayLike,
        state: LinearState,
        *,
        mask: ArrayLike | View | None = None,
        positions: ArrayLike | None = None,
        edits: Edits | None = None,
    ) -> tuple[jax.Array, LinearState]:
        """The tokens by themselves."""
        self.check_decodes(False)
        self.check_call(x, mask=mask, positions=positions, decoding=True)
        mask = mask.mask if isinstance(mask, View) else mask
        x = jnp.asarray(x, self.dtype)
        count = x.shape[1] if mask is None else jnp.asarray(mask).sum(1, dtype=jnp.int32)
        y = self.mix(x, Given(mask=None if mask is None else jnp.asarray(mask)))
        return y, LinearState((), state.length + count, state.next_at + count)

    def step(
        self, x_t: ArrayLike, state: LinearState, *, positions: ArrayLike | None = None, edits: Edits | None = None
    ) -> tuple[jax.Array, LinearState]:
        """One token by itself."""
        y, state = self.prefill(jnp.asarray(x_t)[:, None], state, positions=positions, edits=edits)
        return y[:, 0], state
