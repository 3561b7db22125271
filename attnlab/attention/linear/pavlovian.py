"""Attention as Pavlovian conditioning: a fast memory with a choice of learning rules (2025, arXiv:2508.08289).

A key is the conditioned stimulus, a value the unconditioned one, a query the stimulus of the test. Attention without a
softmax writes associations into a matrix S (D, E) per head and reads it; that is Hebb's rule, and linear attention:

    hebb     S_t = S_{t-1} + k_t v_tᵀ,   y_t = scale · q_t S_t;    non-causal, S is the sum over all tokens

The identity is the paper's. Its further "biologically plausible" rules are our reading, since only the abstract could
be read (hebb, decay and delta are checked against fla's references; oja and gated are ours alone):

    decay    S_t = exp(g_t) S_{t-1} + k_t v_tᵀ                         forgetting, extinction; g_t ≤ 0
    delta    S_t = S̃ + β_t k_t (v_t - S̃ᵀ k_t)ᵀ,   S̃ = exp(g_t) S_{t-1}  Rescorla and Wagner, Widrow and Hoff: what is
             already predicted writes nothing (blocking); g = 0, or with both the gated delta rule
    oja      S_de ← (1 - min(β v_e², 1)) S_de + β v_e k_d              Hebb with a bound: a steady v_e = 1 leaves k_d
    gated    S_t = S_{t-1} + m_t k_t v_tᵀ                              neuromodulation by a third factor m_t in (0, 1)

The scale is D^-1/2 unless given. Hebb, decay and gated may be normalised: y_t / (scale · q_t · Σ_s k_s). In the mixer
β = sigmoid(x w), g = log sigmoid(x w) and m = sigmoid(x w) per head, and keys have unit length.
Hebb, decay and gated run on `linear_attention`, delta on `delta_rule_attention`; Oja's rule forgets each value channel
at its own rate, which is neither, and is scanned token by token. Cost O(N·D·E) per head.
`attnlab.analysis.associative_memory` measures how much such a memory holds.
"""

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from attnlab.contract import Layout, Pattern
from attnlab.nn.feature_maps import elu1
from attnlab.nn.heads import ToHeads
from attnlab.nn.linear_mixer import Places, Recurrence
from attnlab.nn.norms import unit_norm
from attnlab.nn.projected_mixer import ProjectedLinearMixer
from attnlab.registry import Cost, Paper, Source, register
from pallas_kernels.delta_rule_attention import delta_rule_attention
from pallas_kernels.dtypes import at_least_float32
from pallas_kernels.linear_attention import NormalizedState, init_state, linear_attention

Rule = Literal["hebb", "decay", "delta", "oja", "gated"]
PAPER = Paper(
    "Understanding Transformers through the Lens of Pavlovian Conditioning",
    "Qiao",
    2025,
    arxiv="2508.08289",
    number=123,
)
_TAKES = {
    "hebb": frozenset(),
    "decay": frozenset({"log_decay"}),
    "delta": frozenset({"beta", "log_decay"}),
    "oja": frozenset({"beta"}),
    "gated": frozenset({"gate"}),
}


def linear_memory(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    rule: Rule = "hebb",
    beta: ArrayLike | None = None,
    log_decay: ArrayLike | None = None,
    gate: ArrayLike | None = None,
    causal: bool = True,
    scale: float | None = None,
    normalize: bool = False,
    initial_state: Any = None,
    segment_ids: ArrayLike | None = None,
) -> tuple[jax.Array, jax.Array | NormalizedState]:
    """Writes values under keys into a memory by a learning rule, and reads it with queries.

    Args:
      q: queries, (B, N, H, D).
      k: keys, (B, M, G, D), G a divisor of H; M = N if causal.
      v: values, (B, M, G, E).
      rule: "hebb", "decay", "delta", "oja" or "gated".
      beta: strength of each write, (B, N, H), of the rules "delta" and "oja"; 1 when None. Under the delta rule keys
        should have unit length.
      log_decay: (H,) or (B, N, H), at most 0; of "decay", and if wanted of "delta".
      gate: third factor, (B, M, G), of "gated".
      causal: token t reads what tokens s ≤ t wrote. "hebb" and "gated" also read everything.
      scale: of the result; D^-1/2 when None.
      normalize: divides by the sum of the weights; "hebb", "decay" and "gated" alone.
      initial_state: memory before the first token, (B, H, D, E), or a `NormalizedState`.
      segment_ids: (B, N), packed sequences with a memory each.

    Returns:
      (B, N, H, E) in the dtype of `q`, and the memory after the last token, float32: (B, H, D, E), or with `normalize`
      a `NormalizedState` with the sums of keys too.

    Raises:
      ValueError: for an unknown rule, or an argument that the rule does not have or lacks.
    """
    _check_rule(rule, causal, normalize)
    given = {"beta": beta, "log_decay": log_decay, "gate": gate}
    for name, value in given.items():
        if value is not None and name not in _TAKES[rule]:
            takes = ", ".join(sorted(_TAKES[rule])) or "none of them"
            raise ValueError(f"{name} is no part of the rule {rule!r}, which takes {takes}")
    for needed, by in (("log_decay", "decay"), ("gate", "gated")):
        if rule == by and given[needed] is None:
            raise ValueError(f"{needed} is missing: the rule {rule!r} needs it")
    q, k, v = jnp.asarray(q), jnp.asarray(k), jnp.asarray(v)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    common = {"initial_state": initial_state, "segment_ids": segment_ids}
    if rule in ("delta", "oja"):
        strength = jnp.ones(q.shape[:3], jnp.float32) if beta is None else jnp.asarray(beta)
        if rule == "oja":
            return oja_memory(q, k, v, strength, scale=scale, **common)
        return delta_rule_attention(q, k, v, strength, log_decay=log_decay, scale=scale, return_state=True, **common)
    if gate is not None:
        k = k * jnp.asarray(gate, k.dtype)[..., None]
    options = {"causal": causal, "normalize": normalize, "scale": None if normalize else scale, "return_state": True}
    return linear_attention(q, k, v, log_decay=log_decay, **options, **common)


def oja_memory(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    beta: jax.Array,
    *,
    scale: float | None = None,
    initial_state: ArrayLike | None = None,
    segment_ids: ArrayLike | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Oja's rule, token by token; arguments and results as `linear_memory`.

    What a token forgets is at most everything, whatever the size of its value: the state stays finite.
    """
    heads, wide = q.shape[2], at_least_float32(q.dtype)
    keys, values = (jnp.repeat(a.astype(wide), heads // a.shape[2], axis=2) for a in (k, v))
    beta = beta.astype(wide)[..., None]
    keep = _oja_keeps(values, beta)
    if segment_ids is not None:
        ids = jnp.asarray(segment_ids)
        first = jnp.pad(ids[:, 1:] != ids[:, :-1], ((0, 0), (1, 0)))  # an initial state belongs to the first segment
        keep = jnp.where(first[..., None, None], 0, keep)
    if initial_state is None:
        state = init_state(q.shape[0], heads, q.shape[-1], values.shape[-1]).astype(wide)
    else:
        state = jnp.asarray(initial_state, wide)

    def one(state: jax.Array, token: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        q, k, written, keep = token
        state = keep[:, :, None] * state + k[..., None] * written[:, :, None]
        return state, jnp.einsum("bhd,bhde->bhe", q, state)

    tokens = (q.astype(wide), keys, beta * values, keep)
    state, y = jax.lax.scan(one, state, jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), tokens))
    y = jnp.moveaxis(y, 0, 1)
    return (y if scale is None else y * scale).astype(q.dtype), state


def _oja_keeps(values: jax.Array, beta: jax.Array) -> jax.Array:
    """What of the memory of each value channel a token leaves, from 0 to 1: `(B, N, H, E)`."""
    return 1 - jnp.minimum(beta * jnp.square(values), 1)


def _check_rule(rule: str, causal: bool, normalize: bool) -> None:
    if rule not in get_args(Rule):
        raise ValueError(f"rule must be one of {', '.join(get_args(Rule))}, got {rule!r}")
    if not causal and rule not in ("hebb", "gated"):
        raise ValueError(f"causal must be True for the rule {rule!r}, in which the order of tokens matters")
    if normalize and rule in ("delta", "oja"):
        raise ValueError(f"normalize is for the rules hebb, decay and gated, not for {rule!r}")


@register(
    "pavlovian",
    paper=PAPER,
    source=Source.ABSTRACT_ONLY,
    repository="fla-org/flash-linear-attention",
    cost=Cost(time="O(N·H·D·E)", memory="O(N·H·(D+E))", state="H·D·E"),
    kernel="linear_attention",
    summary="a fast memory written by Hebb's, a decaying, the delta, Oja's or a gated rule",
)
class AssociativeMemory(ProjectedLinearMixer):
    """Tokens of any layout to the same shape. See the module docstring for the equations.

    Args:
      features: channels C.
      num_heads: heads H.
      rule: "hebb", "decay", "delta", "oja" or "gated"; only "hebb" and "gated" have a non-causal form.
      forget: whether the state also decays under the delta rule.
      unit_keys: whether keys are scaled to unit length, without which the state of the delta rule may grow.
      normalize: whether sums are divided by q · Σ k; both then pass elu + 1, so that it is positive.
      scale: of the result; D^-1/2 when None, and without effect if normalised.
      causal: whether token i sees tokens up to i only.
      rngs: stream `params`.
      **projections: sizes of heads, biases, layout and context: see `ProjectedLinearMixer`.

    Raises:
      ValueError: for an unknown rule, or an option that it does not have.
    """

    patterns = frozenset(Pattern)
    layouts = frozenset(Layout)
    permutation_equivariant = True

    def __init__(
        self,
        features: int,
        *,
        num_heads: int,
        rule: Rule = "hebb",
        forget: bool = False,
        unit_keys: bool = True,
        normalize: bool = False,
        scale: float | None = None,
        causal: bool = True,
        rngs: nnx.Rngs,
        **projections: Any,
    ):
        _check_rule(rule, causal, normalize)
        if forget and rule != "delta":
            raise ValueError(f"forget is an option of the rule 'delta', not of {rule!r}")
        super().__init__(features, num_heads=num_heads, causal=causal, **projections, rngs=rngs)
        self.rule, self.normalize, self.unit_keys = rule, normalize, unit_keys
        self.scale = self.key_size**-0.5 if scale is None else scale
        source = features if self.context_features is None else self.context_features
        rate = {"dtype": self.dtype, "param_dtype": self.param_dtype, "rngs": rngs}
        self.strength = self.decay = self.gate = nnx.data(None)
        if rule in ("delta", "oja"):
            self.strength = ToHeads(source, num_heads, 1, **rate)
        if rule == "decay" or forget:
            self.decay = ToHeads(source, num_heads, 1, **rate)
        if rule == "gated":
            self.gate = ToHeads(source, self.key.num_heads, 1, **rate)

    def project(self, x: jax.Array, source: jax.Array, at: Places, carry: Any) -> tuple[Recurrence, Any]:
        q, k, v = self.query(x), self.key(source), self.value(source)
        if self.normalize:
            q, k = elu1(q), elu1(k)
        if self.unit_keys:
            k = unit_norm(k)
        beta = decay = None
        if self.strength is not None:
            beta = jax.nn.sigmoid(_per_head(self.strength, source))
        if self.decay is not None:
            decay = jax.nn.log_sigmoid(_per_head(self.decay, source))
        if self.gate is not None:
            k = k * jax.nn.sigmoid(_per_head(self.gate, source)).astype(k.dtype)[..., None]
        return Recurrence(q, k, v, decay, beta), carry

    def merge(self, y: jax.Array, x: jax.Array) -> jax.Array:
        return self.out(y)

    def _recur(self, parts: Recurrence, segment_ids: Any, *, return_state: bool = False, **state: Any) -> Any:
        if self.rule != "oja":
            return super()._recur(parts, segment_ids, return_state=return_state, **state)
        assert parts.beta is not None
        y, after = oja_memory(*parts[:3], parts.beta, scale=self.scale, segment_ids=segment_ids, **state)
        return (y, after) if return_state else y

    def _recur_step(self, parts: Recurrence, memory: Any) -> tuple[jax.Array, Any]:
        if self.rule != "oja":
            return super()._recur_step(parts, memory)
        y, after = self._recur(parts, None, initial_state=memory, return_state=True)
        return y[:, 0], after

    def _map(self, parts: Recurrence, segment_ids: Any) -> jax.Array:
        """Under Oja's rule each value channel has weights of its own: their mean."""
        if self.rule != "oja":
            return super()._map(parts, segment_ids)
        assert parts.beta is not None
        beta = parts.beta.astype(jnp.float32)
        values = jnp.repeat(parts.v.astype(jnp.float32), self.num_heads // parts.v.shape[2], axis=2)
        keep = _oja_keeps(values, beta[..., None])
        total = jnp.cumsum(jnp.log(jnp.maximum(keep, 1e-30)), axis=1)
        kept = jnp.exp(jnp.minimum(total[:, :, None] - total[:, None], 0)).mean(-1)  # (B, N, M, H)
        plain = parts._replace(k=jnp.repeat(parts.k, self.num_heads // parts.k.shape[2], axis=2), beta=None)
        weights = super()._map(plain._replace(k=plain.k * beta[..., None].astype(plain.k.dtype)), segment_ids)
        return weights * jnp.moveaxis(kept, -1, 1)


def _per_head(part: ToHeads, source: jax.Array) -> jax.Array:
    return part(source)[..., 0].astype(jnp.float32)
