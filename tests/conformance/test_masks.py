"""Masks, packed segments and causality, for the mixers that take them."""

import functools

import numpy as np
import pytest

from attnlab import Layout
from tests.conformance.programs import MixerPrograms, programs, random_cotangent
from tests.conformance.subjects import Subject, accepts, close, finite, flat, those


def taking(argument: str, *layouts: Layout) -> pytest.MarkDecorator:
    """The subjects that take an argument, in these layouts or in all."""
    return those(lambda s: s.layout in (layouts or Layout) and argument in accepts(s))


def only(its: MixerPrograms, part: slice) -> np.ndarray:
    """What the call gives for some of the tokens of a sequence alone.

    A causal mixer tells it without another program: tokens are moved to the front, where those behind do not matter.
    """
    count = part.stop - part.start
    if its.subject.causal:
        return its.pull(tuple(np.roll(a, -part.start, axis=1) for a in its.arguments)).y[:, :count]
    return its.call(*(a[:, part] for a in its.arguments))


@those(lambda subject: subject.causal)
def test_causality_by_gradients(subject: Subject):
    """The gradient of token i, in row-major order, reaches no later token, and reaches its own."""
    its = programs(subject)
    random = flat(random_cotangent(its.arguments[0]))
    for i in (0, 4, random.shape[1] - 1):
        cotangent = np.zeros_like(random)
        cotangent[:, i] = random[:, i]
        pulled = its.pull(its.arguments, cotangent.reshape(its.arguments[0].shape))
        parts = [flat(part) for part in pulled.arguments]
        for part in parts:
            assert not np.any(part[:, i + 1 :]), f"token {i} sees the future"
        assert np.any(parts[-1][:, i]), f"token {i} does not see itself"


@taking("key_mask", Layout.SEQUENCE)
def test_key_mask_is_as_if_the_tokens_were_not_there(subject: Subject):
    its = programs(subject)
    x, *context = its.arguments
    real = 7
    keep = np.arange(x.shape[1]) < real
    mask = np.broadcast_to(keep, x.shape[:2])
    masked = its.pull(its.arguments, mask=mask).y[:, :real]
    if context and not its.module.independent_queries:
        close(masked, its.call(x, context[0][:, :real])[:, :real])
    else:
        close(masked, only(its, slice(0, real)))
    source = its.arguments[-1]
    other = np.where(keep[:, None], source, 10 * source + 1)
    changed = its.pull((x, other) if context else (other,), mask=mask).y
    np.testing.assert_allclose(changed[:, :real], masked, rtol=1e-5, atol=1e-6)


@taking("mask")
def test_full_mask(subject: Subject):
    its = programs(subject)
    tokens = int(np.prod(its.arguments[0].shape[1:-1]))
    masked = functools.partial(its.pull, its.arguments)
    close(masked(mask=np.ones((1, 1, tokens, tokens), bool)).y, its.plain.y)
    keys = np.arange(tokens) % 3 != 1
    full = np.broadcast_to(keys, (1, 1, tokens, tokens))
    by_key = np.broadcast_to(keys, (its.arguments[0].shape[0], tokens))
    close(masked(mask=full).y, masked(mask=by_key).y)


@taking("mask", Layout.SEQUENCE)
def test_row_without_keys_is_zero(subject: Subject):
    tokens = subject.tokens().shape[1]
    mask = np.ones((1, 1, tokens, tokens), bool)
    mask[:, :, 3] = False
    check_zero_rows(subject, mask, slice(3, 4))


@taking("key_mask", Layout.SEQUENCE)
def test_example_without_keys_is_zero(subject: Subject):
    mask = np.ones(subject.tokens().shape[:2], bool)
    mask[0] = False
    check_zero_rows(subject, mask, slice(None))


def check_zero_rows(subject: Subject, mask: np.ndarray, rows: slice):
    """With its initial biases of zero, the whole mixer gives zeros where no key may be seen, and zero gradients."""
    its = programs(subject)
    cotangent = np.zeros_like(its.arguments[0])
    cotangent[0, rows] = 3.0
    pulled = its.pull(its.arguments, cotangent, state=its.untouched, mask=mask)
    assert finite(pulled.y)
    assert not np.any(pulled.y[0, rows])
    for gradient in pulled.arguments:
        assert finite(gradient)
        assert not np.any(gradient)


@taking("segment_ids", Layout.SEQUENCE)
def test_packed_segments_equal_separate_runs(subject: Subject):
    its = programs(subject)
    lengths = (4, 1, 7)
    # In self-attention an id that comes back is a segment of its own.
    ids = np.repeat([3, 7, 8 if subject.cross else 3], lengths)[None].repeat(its.arguments[0].shape[0], 0)
    packed = its.call(*its.arguments, segment_ids=(ids, ids) if subject.cross else ids)
    start = 0
    for length in lengths:
        part = slice(start, start + length)
        close(packed[:, part], only(its, part))
        start += length


@taking("positions", Layout.SEQUENCE)
def test_positions_default_to_the_order(subject: Subject):
    its = programs(subject)
    x = its.arguments[0]
    order = np.broadcast_to(np.arange(x.shape[1]), x.shape[:2])
    close(its.call(*its.arguments, positions=order), its.plain.y)
    stretched = its.call(*its.arguments, positions=3 * order)
    assert not np.allclose(stretched, its.plain.y, rtol=1e-3, atol=1e-5)
