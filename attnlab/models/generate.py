"""Sampling from a language model, one compiled loop over its decode states."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from attnlab.models.language_model import LanguageModel
from pallas_kernels.promotion import numpy_ranks


class Generation(NamedTuple):
    """What `generate` returns.

    Attributes:
      tokens: `(B, max_new_tokens)` int32, the continuation without the prompt; `pad_token` after a stop token.
      lengths: `(B,)` int32, tokens of each continuation, its stop token included.
    """

    tokens: jax.Array
    lengths: jax.Array


def sample_token(
    key: jax.Array,
    logits: jax.Array,
    *,
    temperature: ArrayLike = 1.0,
    top_k: ArrayLike | None = None,
    top_p: ArrayLike | None = None,
) -> jax.Array:
    """Draws token ids `(B,)` from logits `(B, V)`.

    Options that are arrays may change without another compilation.

    Args:
      key: random key.
      logits: `(B, V)`.
      temperature: divides the logits; 0 takes the most likely token.
      top_k: keep the k most likely tokens (and those that tie with the last of them).
      top_p: keep the smallest set of most likely tokens whose probability reaches p (Holtzman et al., 2020,
        arXiv:1904.09751); applied after `top_k`. At least one token is always kept.
    """
    likeliest = jnp.argmax(logits, -1).astype(jnp.int32)
    if not isinstance(temperature, jax.Array) and temperature == 0:
        return likeliest
    temperature = jnp.asarray(temperature, jnp.float32)
    logits = logits.astype(jnp.float32) / jnp.where(temperature == 0, 1, temperature)
    if top_k is not None or top_p is not None:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        if top_k is not None:
            place = jnp.clip(jnp.asarray(top_k, jnp.int32), 1, logits.shape[-1]) - 1
            least = jnp.take(ordered, place[None], axis=-1)
            logits, ordered = (jnp.where(some < least, -jnp.inf, some) for some in (logits, ordered))
        if top_p is not None:
            probability = jax.nn.softmax(ordered, axis=-1)
            before = jnp.cumsum(probability, axis=-1) - probability
            # The first is always kept; with p = 1 all are, whatever the sums were rounded to.
            kept = (before < top_p) | (jnp.asarray(top_p) >= 1)
            logits = jnp.where(logits < jnp.min(jnp.where(kept, ordered, jnp.inf), -1, keepdims=True), -jnp.inf, logits)
    drawn = jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)
    return jnp.where(temperature == 0, likeliest, drawn)


def generate(
    model: LanguageModel,
    prompt: ArrayLike,
    *,
    max_new_tokens: int,
    key: jax.Array | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_tokens: Sequence[int] = (),
    prompt_mask: ArrayLike | None = None,
    pad_token: int = 0,
) -> Generation:
    """Continues prompts.

    Memory is that of the mixers' decode states: constant in the number of tokens for linear mixers. The loop ends as
    soon as every sequence has met a stop token. Other values of the options compile nothing anew, nor do other lengths
    of about the same size, which share a program: prompts are padded to one length, of which nothing is seen.

    Args:
      model: language model.
      prompt: `(B, N)` token ids, N ≥ 1.
      max_new_tokens: most tokens to generate, at least 1.
      key: random key; needed unless `temperature` is 0.
      temperature: see `sample_token`.
      top_k: see `sample_token`.
      top_p: see `sample_token`.
      stop_tokens: ids that end a sequence.
      prompt_mask: `(B, N)` boolean, False at padding, which stands on the left of shorter prompts.
      pad_token: fills `tokens` after a stop token.

    Raises:
      ValueError: for an argument out of its range, a prompt of the wrong shape or padded on the right, or more tokens
        than a learned table of positions has rows.
    """
    prompt = np.asarray(prompt)
    _check(prompt, max_new_tokens, key, temperature, top_k, top_p, model.vocab_size, stop_tokens)
    if prompt_mask is not None:
        prompt_mask = np.asarray(prompt_mask)
        if prompt_mask.shape != prompt.shape or prompt_mask.dtype != bool:
            got = f"{prompt_mask.dtype} {prompt_mask.shape}"
            raise ValueError(f"prompt_mask must be boolean, of the prompt's shape {prompt.shape}, got {got}")
        if not prompt_mask[:, -1].all() or (np.diff(prompt_mask.astype(int), axis=1) < 0).any():
            raise ValueError("prompt_mask must be False at the left only: pad shorter prompts on the left")
    graph, state = nnx.split(model)
    length = prompt.shape[1]
    # Sizes are rounded up, so that prompts and continuations of about the same length share a program.
    width, rows = _rounded(length), _rounded(max_new_tokens)
    room = width + rows
    if model.max_length is not None:
        if length + max_new_tokens > model.max_length:
            raise ValueError(
                f"{length} + {max_new_tokens} tokens are beyond the position table of {model.max_length} rows"
            )
        room = min(room, model.max_length)
    # Interventions may look at all tokens: they are handed none that the caller did not give.
    if not model.interventions and (padding := min(width, room) - length):
        prompt_mask = np.ones(prompt.shape, bool) if prompt_mask is None else prompt_mask
        prompt, prompt_mask = (np.pad(a, ((0, 0), (padding, 0))) for a in (prompt, prompt_mask))
    tokens, lengths = _generate(
        graph,
        state,
        jnp.asarray(prompt, jnp.int32),
        None if prompt_mask is None else jnp.asarray(prompt_mask),
        jax.random.key(0) if key is None else key,
        jnp.asarray(sorted({*stop_tokens}) or [-1], jnp.int32),
        jnp.asarray(max_new_tokens, jnp.int32),
        jnp.asarray(0 if temperature == 0 else temperature, jnp.float32),
        jnp.asarray(model.vocab_size if top_k is None else top_k, jnp.int32),
        jnp.asarray(1 if top_p is None else top_p, jnp.float32),
        jnp.asarray(pad_token, jnp.int32),
        room=room,
        rows=rows,
        filters=top_k is not None or top_p is not None,
    )
    return Generation(tokens[:, :max_new_tokens], lengths)


def _rounded(size: int) -> int:
    """The next multiple of 8, and for more than 64 of an eighth of the next power of two: at most a quarter more."""
    step = max(8, 2 ** (size - 1).bit_length() // 8)
    return -(-size // step) * step


@functools.partial(jax.jit, static_argnums=0, static_argnames=("room", "rows", "filters"))
@numpy_ranks()
def _generate(
    graph, weights, prompt, real, key, stop_tokens, count, temperature, top_k, top_p, pad_token, *, room, rows, filters
):
    model = nnx.merge(graph, weights)
    batch = prompt.shape[0]
    options = {"top_k": top_k, "top_p": top_p} if filters else {}

    def choose(key, logits, done):
        token = sample_token(key, logits, temperature=temperature, **options)
        return jnp.where(done, pad_token, token), done | jnp.isin(token, stop_tokens)

    logits, state = model.prefill(prompt, model.init_state(batch, room), mask=real)
    nobody = jnp.zeros((batch,), bool)
    token, done = choose(jax.random.fold_in(key, 0), logits[:, -1], nobody)
    tokens = jnp.full((batch, rows), pad_token, jnp.int32).at[:, 0].set(token)

    def going(carry):
        number, _, _, done, _, _ = carry
        return (number < count) & ~done.all()

    def advance(carry):
        number, tokens, token, done, lengths, state = carry
        logits, state = model.step(token, state)
        lengths = lengths + (~done).astype(jnp.int32)
        token, done = choose(jax.random.fold_in(key, number), logits, done)
        return number + 1, tokens.at[:, number].set(token), token, done, lengths, state

    first = jnp.ones((), jnp.int32)
    carry = (first, tokens, token, done, jnp.ones((batch,), jnp.int32), state)
    _, tokens, _, _, lengths, _ = jax.lax.while_loop(going, advance, carry)
    return tokens, lengths


def _check(prompt, max_new_tokens, key, temperature, top_k, top_p, vocab_size, stop_tokens) -> None:
    if prompt.ndim != 2 or prompt.shape[1] < 1 or not np.issubdtype(prompt.dtype, np.integer):
        raise ValueError(f"prompt must be integers (B, N) with N ≥ 1, got {prompt.dtype} {prompt.shape}")
    if prompt.size and not (prompt.min() >= 0 and prompt.max() < vocab_size):
        raise ValueError(f"prompt has ids from {prompt.min()} to {prompt.max()}; the vocabulary is 0..{vocab_size - 1}")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if temperature < 0:
        raise ValueError(f"temperature must not be negative, got {temperature}")
    if temperature > 0 and key is None:
        raise ValueError("key is needed to sample; pass one, or temperature=0 for the most likely tokens")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")
    if wrong := [token for token in stop_tokens if not 0 <= token < vocab_size]:
        raise ValueError(f"stop_tokens {wrong} are not in the vocabulary 0..{vocab_size - 1}")
