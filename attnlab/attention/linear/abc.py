"""ABC: attention with bounded-memory control (Peng et al., ACL 2022, arXiv:2110.02488), as the benchmark CAB (Zhang et
al., ICML 2023, arXiv:2210.07661) has it.

Keys and values are written into m slots, by learned maps of them, and queries attend to the slots. Per head:

    K̃_r = Σ_j softmax_j(k_j·a_r) k_j,   Ṽ_r = Σ_j softmax_j(v_j·b_r) v_j            a, b (D, m)
    y_i = Σ_r softmax_r(q_i·K̃_r D^-1/2) Ṽ_r

Causal, the sums are over the tokens so far, so that slots are a decode state of constant size. CAB's code lacks the
sums: with `accumulate=False` token t writes, and reads, exp(k_t·a_r - log Σ_{s ≤ t} exp(k_s·a_r)) k_t alone, and those
before it are in its normaliser only. The sums run as linear attention: for the scores q_i·K̃_r, whose decay is that of
the slot, slots are heads of one value each; for the result they are channels of the keys. Attention to a context reads
slots of all of it, whatever the queries, so it does in a decoder too. Cost O(N·m·(D+E)) per head.

Code: Shark-NLP/CAB.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from attnlab.contract import Given, Pattern, UnsupportedArgument, View, record
from attnlab.nn.dense_mixer import Heads
from attnlab.nn.key_masked_mixer import KeyMaskedMixer
from attnlab.nn.linear_mixer import linear_attention_map
from attnlab.nn.masking import masked_softmax
from attnlab.nn.prefix_scans import NOTHING, softmax_recurrence
from attnlab.points import Edits, visit
from attnlab.registry import Cost, Paper, Source, register
from pallas_kernels.dtypes import at_least_float32
from pallas_kernels.linear_attention import linear_attention


class Slots(NamedTuple):
    """The decode state: what is in the slots, float32.

    Attributes:
      keys: K̃, `(B, H·m, D, 1)`; zeros without sums.
      values: Ṽ, `(B, H, m, E)`; zeros without sums.
      key_total: log Σ exp(k·a), `(B, H, m)`.
      value_total: the same of values.
      length: `(B,)` int32, tokens seen so far.
    """

    keys: jax.Array
    values: jax.Array
    key_total: jax.Array
    value_total: jax.Array
    length: jax.Array


def slots(x: ArrayLike, control: ArrayLike, real: ArrayLike | None = None) -> tuple[jax.Array, jax.Array]:
    """All tokens in m slots.

    Args:
      x: keys or values `(B, M, H, D)`.
      control: a or b, `(D, m)`.
      real: `(B, M)` boolean, tokens that exist; all when None.

    Returns:
      Slots `(B, m, H, D)` and the weights of tokens `(B, M, H, m)` in float32 (or wider).
    """
    x = jnp.asarray(x)
    wide = x.astype(at_least_float32(x.dtype))
    logits = jnp.einsum("bnhd,dm->bnhm", wide, jnp.asarray(control, wide.dtype))
    weights = masked_softmax(logits, None if real is None else jnp.asarray(real)[:, :, None, None], axis=1)
    return jnp.einsum("bnhm,bnhd->bmhd", weights, wide), weights


def read_slots(q: ArrayLike, keys: jax.Array) -> jax.Array:
    """Weights `(B, N, H, m)` of queries `(B, N, H, D)` on slots `(B, m, H, D)`, in the slots' dtype."""
    q = jnp.asarray(q).astype(keys.dtype)
    return jax.nn.softmax(jnp.einsum("bnhd,bmhd->bnhm", q * q.shape[-1] ** -0.5, keys), axis=-1)


@register(
    "cab.abc",
    paper=Paper("ABC: Attention with Bounded-memory Control", "Peng et al.", 2022, arxiv="2110.02488"),
    source=Source.AUTHORS_CODE,
    repository="Shark-NLP/CAB",
    cost=Cost(time="O(N·H·m·(D+E))", memory="O(N·H·m·D), not causal O(N·H·m)", state="H·m·(D+E+2)"),
    kernel="linear_attention",
    summary="keys and values are written into a few slots, which queries attend to",
    small={"num_slots": 3},
)
class BoundedMemoryAttention(KeyMaskedMixer):
    """Tokens (B, N, C) to (B, N, C). See the module docstring for the equations.

    Args:
      features: channels C.
      num_heads: heads H.
      num_slots: m.
      causal: whether the slots of token i hold the tokens up to i.
      accumulate: whether they hold more than token i, if causal; not so in CAB's code.
      context_features: channels of the context for cross-attention; C when None.
      qkv_bias: whether the maps to queries, keys and values have a bias; the last map has.
      head_dim: D; C / H when None.
      dtype: of the computation and the result; that of the tokens when None.
      param_dtype: of the parameters.
      rngs: stream `params`.

    Raises:
      ValueError: for sizes that do not fit.
      UnsupportedArgument: for causal attention to a context.
    """

    patterns = frozenset({Pattern.SELF, Pattern.CAUSAL_SELF, Pattern.CROSS})
    permutation_equivariant = True

    def __init__(
        self,
        features: int,
        *,
        num_heads: int,
        num_slots: int = 16,
        causal: bool = False,
        accumulate: bool = True,
        context_features: int | None = None,
        qkv_bias: bool = True,
        head_dim: int | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if causal and context_features is not None:
            raise UnsupportedArgument("ABC has no causal cross form: a context is whole when it is read")
        if num_slots < 1:
            raise ValueError(f"num_slots must be at least 1, got {num_slots}")
        options = {"head_dim": head_dim, "context_features": context_features, "qkv_bias": qkv_bias}
        common = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        super().__init__(features, num_heads=num_heads, **options, **common)
        self.num_slots, self.causal, self.accumulate = num_slots, causal, accumulate
        if causal:
            self.accepts = self.accepts | {"segment_ids"}
        init = nnx.initializers.variance_scaling(0.5, "fan_avg", "uniform")
        for name, size in (("key_control", self.key_size), ("value_control", self.value_size)):
            control = init(rngs.params(), (size, num_slots), param_dtype)
            setattr(self, name, nnx.Param(control, weight_decay=True))

    def check_decodes(self, cross: bool) -> None:
        if cross or self.context_features is not None:
            raise UnsupportedArgument("ABC does not decode attention to a context: call it, its slots are few")
        super().check_decodes(cross)

    def mix(self, x: jax.Array, given: Given) -> jax.Array:
        if self.causal and given.context is not None:
            raise UnsupportedArgument("ABC has no causal cross form: it does not take context where it is causal")
        return super().mix(x, given)

    def attend(self, heads: Heads, given: Given) -> jax.Array:
        q, k, v = heads[:3]
        if self.causal:
            return self._run(q, k, v, given.mask, given.segment_ids, None)[0]
        key_slots, _ = slots(k, self.key_control[...], given.mask)
        value_slots, written = slots(v, self.value_control[...], given.mask)
        weights = read_slots(q, key_slots)
        record(self, "attention", lambda: jnp.einsum("bnhm,bshm->bhns", weights, written).astype(jnp.float32))
        return jnp.einsum("bnhm,bmhd->bnhd", weights, value_slots)

    def _run(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        real: jax.Array | None,
        segment_ids: Any,
        before: Slots | None,
    ) -> tuple[jax.Array, Slots | None]:
        """The causal form for a run of tokens; the slots after it where those before it are given."""
        wide = at_least_float32(q.dtype)
        q, k, v = (x.astype(wide) for x in (q, k, v))
        shares, decays, totals = [], [], []
        for x, control, total in (
            (k, self.key_control, None if before is None else before.key_total),
            (v, self.value_control, None if before is None else before.value_total),
        ):
            logits = jnp.einsum("bnhd,dm->bnhm", x, control[...].astype(wide))
            share, decay, last = softmax_recurrence(logits, real=real, segment_ids=segment_ids, initial=total)
            shares.append(share if real is None else jnp.where(real[:, :, None, None], share, 0))
            decays.append(decay)
            totals.append(last)
        q = q * q.shape[-1] ** -0.5
        state = before
        if not self.accumulate:
            scores = jnp.einsum("bnhd,bnhd->bnh", q, k)[..., None] * shares[0]
            own = (jax.nn.softmax(scores, axis=-1) * shares[1]).sum(-1)
            record(self, "attention", lambda: jnp.einsum("bnh,nm->bhnm", own, jnp.eye(own.shape[1])))
            if before is not None:
                state = before._replace(key_total=totals[0], value_total=totals[1])
            return own[..., None] * v, state
        b, n, h, m = shares[0].shape
        slot_q, slot_k = (jnp.repeat(x, m, axis=2) for x in (q, k))
        written = shares[0].reshape(b, n, h * m, 1)
        options = {"segment_ids": segment_ids, "return_state": True}
        first, second = (
            ({}, {}) if before is None else ({"initial_state": before.keys}, {"initial_state": before.values})
        )
        scores, keys = linear_attention(
            slot_q, slot_k, written, log_decay=decays[0].reshape(b, n, h * m), **options, **first
        )
        weights = jax.nn.softmax(scores.reshape(b, n, h, m), axis=-1)
        record(
            self,
            "attention",
            lambda: linear_attention_map(weights, shares[1], log_decay=decays[1], segment_ids=segment_ids),
        )
        y, values = linear_attention(weights, shares[1], v, log_decay=decays[1], **options, **second)
        if before is not None:
            state = before._replace(keys=keys, values=values, key_total=totals[0], value_total=totals[1])
        return y, state

    def init_state(
        self,
        batch_size: int,
        max_length: int | None = None,
        *,
        context: ArrayLike | None = None,
        context_mask: ArrayLike | None = None,
        dtype: Any = None,
    ) -> Slots:
        """Empty slots; their size does not depend on `max_length`, and they are float32."""
        self.check_decodes(context is not None)
        if context_mask is not None:
            raise ValueError("context_mask is given without a context")
        wide = at_least_float32(jnp.float32 if dtype is None else dtype)
        length = jnp.zeros((batch_size,), jnp.int32)
        heads, m = self.num_heads, self.num_slots
        return Slots(
            jnp.zeros((batch_size, heads * m, self.key_size, 1), wide),
            jnp.zeros((batch_size, heads, m, self.value_size), wide),
            *(jnp.full((batch_size, heads, m), NOTHING, wide) for _ in range(2)),
            length,
        )

    def prefill(
        self,
        x: ArrayLike,
        state: Slots,
        *,
        mask: ArrayLike | View | None = None,
        positions: ArrayLike | None = None,
        edits: Edits | None = None,
    ) -> tuple[jax.Array, Slots]:
        """Writes a run of tokens `(B, N, C)`, and reads; where `mask` is False nothing is written."""
        self.check_decodes(False)
        self.check_call(x, mask=mask, positions=positions, decoding=True)
        x = jnp.asarray(x, self.dtype)
        mask = mask.mask if isinstance(mask, View) else mask
        if mask is not None and jnp.shape(mask) != x.shape[:2]:
            raise ValueError(f"mask must be (B, N) = {x.shape[:2]}, got {jnp.shape(mask)}")
        real = None if mask is None else jnp.asarray(mask)
        seen = jnp.full((x.shape[0],), x.shape[1], jnp.int32) if real is None else real.sum(1, dtype=jnp.int32)
        q, k, v = visit(self, edits, "qkv", self.project(x, x))[:3]
        y, after = self._run(q, k, v, real, None, state)
        assert after is not None
        y = self.out(visit(self, edits, "heads", y).astype(x.dtype))
        return y, after._replace(length=state.length + seen)

    def step(
        self, x_t: ArrayLike, state: Slots, *, positions: ArrayLike | None = None, edits: Edits | None = None
    ) -> tuple[jax.Array, Slots]:
        """Writes one token `(B, C)`, and reads."""
        y, state = self.prefill(jnp.asarray(x_t)[:, None], state, positions=positions, edits=edits)
        return y[:, 0], state
