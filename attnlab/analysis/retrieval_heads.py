"""Retrieval heads (Wu et al., 2024, arXiv:2404.15574): heads that copy from a needle in a long context.

A prompt x holds a needle of m tokens at s..e-1, e = s + m. Greedy decoding takes steps t; a_t is the attention of a
head from the last token over all keys in that step, y_t the token that the same step yields. A head scores

    (1 / m) · |{t : one of the k keys i with the largest a_t is in s..e-1 and x_i = y_t}|

in a run: at most one hit a step, and more than 1 in all if tokens are copied twice. Its score is the mean over the runs
that succeeded, those where more than half of the needle's tokens are in the answer (ROUGE-1 recall). Heads above 0.1
are retrieval heads; without them (`HeadScaling` with 0) copying is lost.

The needle is found as the first i at which more than 0.9 of its distinct tokens are among x_i..x_{i+m-1}, so that a
needle of 11 distinct tokens or more may be found a token early.

    attention, answers = decoded_attention(model, prompts, steps=50)
    scores = retrieval_scores(attention, answers, prompts, needles).score          # (L, H)

Reference: nightdessert/Retrieval_Head, `LLMNeedleHaystackTester`. In the paper a head is scored by the set of tokens
that it copied; the code, which this follows, counts steps.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from attnlab.measure import watch
from attnlab.registry import Cost, Example, Kind, Paper, Source, register


class RetrievalScores(NamedTuple):
    """Scores of heads.

    Attributes:
      score: `(L, H)` float32, mean over the runs that count; 0 if none does.
      per_run: `(R, L, H)` float32.
      span: `(R, 2)` int32, start and end of the needle; -1 where it is not found, and such a run scores 0.
    """

    score: jax.Array
    per_run: jax.Array
    span: jax.Array


def needle_span(prompt: ArrayLike, needle: ArrayLike, *, overlap: float = 0.9) -> jax.Array:
    """Start and end of a needle `(m,)` in a prompt `(n,)`, int32 `(2,)`; -1, -1 if it is not there.

    Args:
      prompt: token ids.
      needle: token ids.
      overlap: share of the needle's distinct tokens that must be exceeded.
    """
    prompt, needle = jnp.asarray(prompt), jnp.asarray(needle)
    length = needle.shape[0]
    distinct = jnp.all((needle[:, None] != needle) | (jnp.arange(length)[:, None] <= jnp.arange(length)), 0)
    # Windows at the end are shorter.
    windows = jnp.arange(prompt.shape[0])[:, None] + jnp.arange(length)
    inside = windows < prompt.shape[0]
    tokens = prompt[jnp.minimum(windows, prompt.shape[0] - 1)]
    present = ((tokens[:, :, None] == needle) & inside[:, :, None]).any(1)
    found = (present & distinct).sum(1) > overlap * distinct.sum()
    start = jnp.argmax(found)
    return jnp.where(found.any(), jnp.stack([start, start + length]), -1).astype(jnp.int32)


def recalled(needle: ArrayLike, answer: ArrayLike) -> jax.Array:
    """ROUGE-1 recall of needles `(..., m)` in answers `(..., t)`: the share of their tokens that is there, counted."""
    needle, answer = jnp.asarray(needle), jnp.asarray(answer)
    length = needle.shape[-1]
    same = needle[..., :, None] == needle[..., None, :]
    # The j-th occurrence of a token in the needle needs j of them in the answer.
    rank = (same & (jnp.arange(length)[None] <= jnp.arange(length)[:, None])).sum(-1)
    count = (needle[..., :, None] == answer[..., None, :]).sum(-1)
    return (count >= rank).mean(-1)


def _example() -> Example:
    keys = jax.random.split(jax.random.key(0), 3)
    prompts = jax.random.randint(keys[0], (2, 9), 0, 5)
    attention = jax.nn.softmax(4 * jax.random.normal(keys[1], (2, 3, 2, 2, 12)))
    # Far from ties, in bfloat16 too.
    attention = jnp.round(attention.at[..., 4].add(1.0), 3)
    generated = jnp.broadcast_to(prompts[:, 4:5], (2, 3))
    given = (attention, generated, prompts, prompts[:, 3:6])
    # The score is over all runs.
    return Example(retrieval_scores, given, batched=(), differentiable=())


@register(
    "retrieval_heads",
    kind=Kind.ANALYSIS,
    paper=Paper(
        "Retrieval Head Mechanistically Explains Long-Context Factuality", "Wu et al.", 2024, "2404.15574", number=87
    ),
    source=Source.AUTHORS_CODE,
    repository="nightdessert/Retrieval_Head",
    cost=Cost("O(R·T·L·H·M)", "O(R·T·L·H·M)"),
    summary="how often a head attends to the token of a needle that is being copied",
    small=_example,
)
def retrieval_scores(
    attention: ArrayLike,
    generated: ArrayLike,
    prompts: ArrayLike,
    needles: ArrayLike,
    *,
    topk: int = 1,
    counted: ArrayLike | None = None,
) -> RetrievalScores:
    """Scores heads over runs of decoding.

    Args:
      attention: `(R, T, L, H, M)`: of R runs of T steps, the last token's attention over the keys; what is not there
        yet is 0.
      generated: `(R, T)`, the token that each step yields; -1 where a run has ended.
      prompts: `(R, n)` token ids, n at most M; or `(n,)` for all runs.
      needles: `(R, m)` token ids; or `(m,)` for all runs.
      topk: how many keys of each head are looked at in each step.
      counted: `(R,)` boolean, which runs succeeded; all when None. `recalled(needles, generated) > 0.5` in the paper.

    Raises:
      ValueError: for shapes that do not fit.
    """
    attention, generated = jnp.asarray(attention), jnp.asarray(generated)
    if attention.ndim != 5 or generated.shape != attention.shape[:2]:
        raise ValueError(
            f"attention must be (R, T, L, H, M) and generated (R, T), got {attention.shape} and {generated.shape}"
        )
    runs, keys = attention.shape[0], attention.shape[-1]
    if not 1 <= topk <= keys:
        raise ValueError(f"topk must lie in 1..{keys}, got {topk}")
    prompts, needles = (_for_each(name, ids, runs) for name, ids in (("prompts", prompts), ("needles", needles)))
    if prompts.shape[1] > keys:
        raise ValueError(f"prompts of {prompts.shape[1]} tokens do not fit into {keys} keys")
    span = _spans(prompts, needles)
    per_run = _runs(attention, generated, prompts, span, topk)
    weight = jnp.ones(runs) if counted is None else jnp.asarray(counted).astype(jnp.float32)
    score = jnp.tensordot(weight, per_run, 1) / jnp.maximum(weight.sum(), 1)
    return RetrievalScores(score, per_run, span)


def _for_each(name: str, ids: ArrayLike, runs: int) -> jax.Array:
    ids = jnp.asarray(ids)
    ids = jnp.broadcast_to(ids, (runs, *ids.shape)) if ids.ndim == 1 else ids
    if ids.ndim != 2 or ids.shape[0] != runs:
        raise ValueError(f"{name} must be (R, n) for {runs} runs, or (n,), got shape {ids.shape}")
    return ids


def _spans(prompts: jax.Array, needles: jax.Array) -> jax.Array:
    return jax.vmap(needle_span)(prompts, needles)


def _runs(attention: jax.Array, generated: jax.Array, prompts: jax.Array, span: jax.Array, topk: int) -> jax.Array:
    keys = attention.shape[-1]
    index = jax.lax.top_k(attention, topk)[1]
    place = jnp.arange(keys)
    inside = (place >= span[:, :1]) & (place < span[:, 1:])
    padded = jnp.pad(prompts, ((0, 0), (0, keys - prompts.shape[1])), constant_values=-1)
    copied = inside[:, None] & (padded[:, None] == generated[..., None]) & (padded[:, None] >= 0)
    hit = jnp.take_along_axis(copied[:, :, None, None], index, -1).any(-1)
    length = jnp.maximum(span[:, 1] - span[:, 0], 1)
    return hit.sum(1) / length[:, None, None].astype(jnp.float32)


def decoded_attention(model: Any, prompts: ArrayLike, *, steps: int) -> tuple[jax.Array, jax.Array]:
    """Greedy decoding that keeps the last token's attention in each step.

    Args:
      model: a causal `LanguageModel`, of mixers that record `attention` with the same number of heads.
      prompts: `(R, n)` token ids, n at least 2.
      steps: T.

    Returns:
      Attention `(R, T, L, H, n + T - 1)` float32 and the tokens that the steps yield, `(R, T)` int32.
    """
    prompts = jnp.asarray(prompts, jnp.int32)
    runs, length = prompts.shape
    graph, weights = nnx.split(model)

    @jax.jit
    def decode(weights, prompts):
        model = nnx.merge(graph, weights)
        state = model.init_state(runs, length + steps - 1)
        _, state = model.prefill(prompts[:, :-1], state)

        def advance(carry, _):
            token, state = carry
            (logits, state), seen = watch(nnx.merge(graph, weights), token, state, method="step")
            rows = jnp.stack([weights[:, :, -1] for weights in seen["attention"]], 1)
            token = jnp.argmax(logits, -1).astype(jnp.int32)
            return (token, state), (rows, token)

        _, (rows, tokens) = jax.lax.scan(advance, (prompts[:, -1], state), None, length=steps)
        return jnp.moveaxis(rows, 0, 1), tokens.T

    return decode(weights, prompts)
