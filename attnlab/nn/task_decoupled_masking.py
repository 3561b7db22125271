"""Task-decoupled masking of Video-o3 (2026, arXiv:2601.23224; code: ZZQ987/Video-o3-Qwen3VL): in training alone.

A conversation shows a video as a whole, and then clips of it that the model asked for. So that an answer reads the
clips, and a search for the next clip reads the whole, tokens have roles, and some pairs do not see each other:

    allowed_ij = j ≤ i  and  not (i answers and j is inside the first video)
                        and  not (i searches and j < i is inside a later video)

    first video, later videos   what stands strictly between the outer tags of a video; runs of frames with fewer than
                                `gap` tokens from one to the next are one video; of one video alone there are no roles
    answers                     the last answer: from behind its whole opening tag to before the last token of its
                                closing tag, so that the closing tag's first tokens are in it
    searches                    every grounding span but the first, likewise: before that there are no clips

Tags of answers and groundings are looked for in what the assistant says. Starts and ends are paired in their order, an
end in front of its start is left out. The rules hold in one batch of ten; all others, and inference, are causal. Roles
are two integers per token: with `block_sparse_attention` no mask of N² booleans is ever built.
"""

import dataclasses
import enum
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from attnlab.contract import View
from attnlab.nn.masking import allowed_by
from attnlab.nn.visibility import RolePairs
from attnlab.registry import Cost, Example, Kind, Paper, Source, register
from pallas_kernels.array_masks import ArrayMask
from pallas_kernels.masks import Causal, Mask, SlidingWindow

IGNORED = -100
"""Label of a token that the assistant did not say."""


class Role(enum.IntFlag):
    """What a token is part of; it may be several things."""

    NONE = 0
    ANSWER = 1
    GROUNDING = 2
    FIRST_VIDEO = 4
    LATER_VIDEO = 8


@dataclasses.dataclass(frozen=True)
class Tags:
    """Token ids that mark spans, those of Qwen's tokenizer by default.

    Attributes:
      vision_start: opens a frame.
      vision_end: closes it.
      answer_start: opens an answer.
      answer_end: closes it.
      grounding_start: opens a search for a clip.
      grounding_end: closes it.
    """

    vision_start: int = 151652
    vision_end: int = 151653
    answer_start: tuple[int, ...] = (27, 9217)
    answer_end: tuple[int, ...] = (522, 9217)
    grounding_start: tuple[int, ...] = (27, 1951, 287)
    grounding_end: tuple[int, ...] = (5361, 1951, 287)


QWEN = Tags()


def roles_from_tokens(
    ids: ArrayLike, labels: ArrayLike | None = None, *, tags: Tags = QWEN, gap: int = 30
) -> np.ndarray:
    """Roles of tokens, made on the host when a batch is put together.

    Args:
      ids: `(B, N)` integers.
      labels: `(B, N)`, -100 outside of what the assistant says; all of it when None.
      tags: what marks spans.
      gap: tokens from the end of a frame to the start of the next one from which on that is of another video.

    Returns:
      `(B, N)` int32, sums of `Role`.

    Raises:
      ValueError: for shapes that do not fit.
    """
    tokens = np.asarray(ids)
    spoken = tokens if labels is None else np.asarray(labels)
    if tokens.ndim != 2 or spoken.shape != tokens.shape:
        raise ValueError(f"ids and labels must be (B, N) alike, got {tokens.shape} and {spoken.shape}")
    said = tokens if labels is None else np.where(spoken == IGNORED, -1, tokens)
    roles = np.zeros(tokens.shape, np.int32)
    for row, own, of in zip(tokens, said, roles, strict=True):
        videos = _videos(row, tags, gap)
        if len(videos) < 2:
            continue
        for number, (start, end) in enumerate(videos):
            of[start + 1 : end] |= Role.LATER_VIDEO if number else Role.FIRST_VIDEO
        for start, end in _spans(own, tags.answer_start, tags.answer_end)[-1:]:
            of[start:end] |= Role.ANSWER
        for start, end in _spans(own, tags.grounding_start, tags.grounding_end)[1:]:
            of[start:end] |= Role.GROUNDING
    return roles


def sometimes(roles: np.ndarray, generator: np.random.Generator, ratio: float = 0.1) -> np.ndarray:
    """The roles of a batch with this probability, else none: then all is causal.

    Raises:
      ValueError: for a ratio out of 0..1.
    """
    if not 0 <= ratio <= 1:
        raise ValueError(f"ratio must be in 0..1, got {ratio}")
    return roles if generator.random() < ratio else np.zeros_like(roles)


def task_decoupled_rule(*, answer: bool = True, grounding: bool = True) -> Mask:
    """Who sees whom by order and roles, for a `View` whose labels are roles.

    Args:
      answer: whether answers do not see the first video.
      grounding: whether searches do not see later videos.
    """
    rule: Mask = Causal()
    if answer:
        rule = rule & ~RolePairs((Role.ANSWER, Role.FIRST_VIDEO))
    if grounding:
        rule = rule & ~(RolePairs((Role.GROUNDING, Role.LATER_VIDEO)) & SlidingWindow(None, -1))
    return rule


def task_decoupled_view(
    roles: ArrayLike, real: ArrayLike | None = None, *, answer: bool = True, grounding: bool = True
) -> View:
    """The rule as what a mixer or a language model takes for its mask: `model(ids, mask=view)`.

    Args:
      roles: `(B, N)`, as `roles_from_tokens` makes them.
      real: `(B, N)` boolean, which tokens are no padding; all when None.
      answer: see `task_decoupled_rule`.
      grounding: likewise.
    """
    rule = task_decoupled_rule(answer=answer, grounding=grounding)
    return View(rule=rule, q_labels=jnp.asarray(roles), mask=None if real is None else jnp.asarray(real))


def _allowed(i: Any, j: Any, answers: Any, searches: Any, first: Any, later: Any) -> Any:
    """The rule on numbers that are 1 where a token has a role."""
    return (j <= i) & ~((answers > 0) & (first > 0)) & ~((searches > 0) & (later > 0) & (j < i))


def task_decoupled_kernel_mask(roles: ArrayLike, *, answer: bool = True, grounding: bool = True) -> ArrayMask:
    """The rule as a mask of `block_sparse_attention`, of four numbers per token; padding is a segment of its own.

    Args:
      roles: `(B, N)`.
      answer: see `task_decoupled_rule`.
      grounding: likewise.
    """
    of = jnp.asarray(roles)[:, None]

    def having(role: Role, counts: bool = True) -> jax.Array:
        return ((of & int(role)) > 0).astype(jnp.int32) * int(counts)

    queries = having(Role.ANSWER, answer), having(Role.GROUNDING, grounding)
    return ArrayMask(_allowed, queries, (having(Role.FIRST_VIDEO), having(Role.LATER_VIDEO)))


def _example() -> Example:
    roles = np.array([[0, 4, 4, 0, 2, 0, 8, 8, 0, 2, 1, 1], [0, 4, 0, 0, 8, 0, 0, 2, 0, 1, 0, 0]], np.int32)
    real = np.arange(12) < np.array([[12], [10]])
    return Example(task_decoupled_mask, (roles, real), {}, (0, 1), ())


@register(
    "task_decoupled_masking",
    kind=Kind.FUNCTION,
    paper=Paper(
        "Video-o3: Native Interleaved Clue Seeking for Long Video Multi-Hop Reasoning",
        "Zeng et al.",
        2026,
        arxiv="2601.23224",
        number=153,
    ),
    source=Source.AUTHORS_CODE,
    repository="ZZQ987/Video-o3-Qwen3VL",
    cost=Cost(time="O(N²)", memory="O(N²)"),
    kernel="block_sparse_attention",
    summary="a mask by which answers do not see the video as a whole, and searches for clips do not see earlier clips",
    small=_example,
)
def task_decoupled_mask(
    roles: ArrayLike, real: ArrayLike | None = None, *, answer: bool = True, grounding: bool = True
) -> jax.Array:
    """The mask `(B, 1, N, N)`, True where a query may attend to a key.

    Args:
      roles: `(B, N)` integers, as `roles_from_tokens` makes them.
      real: `(B, N)` boolean; padding sees nothing, and is seen by nothing. All tokens are real when None.
      answer: whether answers do not see the first video.
      grounding: whether searches do not see later videos.

    Raises:
      ValueError: for shapes that do not fit, roles that are no integers, or a mask that is not boolean.
    """
    of = jnp.asarray(roles)
    if of.ndim != 2 or not jnp.issubdtype(of.dtype, jnp.integer):
        raise ValueError(f"roles must be integers (B, N), got {of.dtype} {of.shape}")
    order = jnp.arange(of.shape[1])
    q, k = of[:, None, :, None], of[:, None, None, :]
    rule = task_decoupled_rule(answer=answer, grounding=grounding)
    allowed = allowed_by(rule, order[:, None], order[None, :], q, k)
    allowed = jnp.broadcast_to(allowed, (of.shape[0], 1, of.shape[1], of.shape[1]))
    if real is None:
        return allowed
    there = jnp.asarray(real)
    if there.shape != of.shape or there.dtype != jnp.bool_:
        raise ValueError(f"real must be boolean (B, N) = {of.shape}, got {there.dtype} {there.shape}")
    return allowed & there[:, None, :, None] & there[:, None, None, :]


def _paired(starts: np.ndarray, ends: np.ndarray) -> list[tuple[int, int]]:
    """Starts and ends in their order; an end that is not behind the start it is to close is left out."""
    pairs, next_start = [], 0
    for end in ends.tolist():
        if next_start < len(starts) and starts[next_start] < end:
            pairs.append((int(starts[next_start]), end))
            next_start += 1
    return pairs


def _videos(row: np.ndarray, tags: Tags, gap: int) -> list[tuple[int, int]]:
    """The first and the last tag of each video."""
    videos: list[tuple[int, int]] = []
    for start, end in _paired(np.flatnonzero(row == tags.vision_start), np.flatnonzero(row == tags.vision_end)):
        if videos and start - videos[-1][1] < gap:
            videos[-1] = videos[-1][0], end
        else:
            videos.append((start, end))
    return videos


def _spans(row: np.ndarray, opening: tuple[int, ...], closing: tuple[int, ...]) -> list[tuple[int, int]]:
    """From behind the opening tag to the last token of the closing tag, which is not in it."""
    pairs = _paired(_places(row, opening), _places(row, closing) + len(closing) - 1)
    return [(start + len(opening), end) for start, end in pairs]


def _places(row: np.ndarray, tag: tuple[int, ...]) -> np.ndarray:
    """Where a run of ids begins."""
    if not 0 < len(tag) <= len(row):
        return np.zeros(0, np.int64)
    return np.flatnonzero((np.lib.stride_tricks.sliding_window_view(row, len(tag)) == np.asarray(tag)).all(-1))
