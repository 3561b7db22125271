"""Task-decoupled masks: roles of odd conversations, and that all forms of the rule are one."""

import numpy as np
import pytest

from attnlab.contract import View
from attnlab.nn.masking import visible_keys
from attnlab.nn.softmax import softmax_attention
from attnlab.nn.task_decoupled_masking import (
    Role,
    Tags,
    roles_from_tokens,
    sometimes,
    task_decoupled_kernel_mask,
    task_decoupled_mask,
    task_decoupled_view,
)
from pallas_kernels.block_sparse_attention import block_sparse_attention
from tests.accuracy import relative_rms

S, E, A, Z, G, Y = 90, 91, (1, 2), (3, 2), (1, 4), (5, 4)
TAGS = Tags(S, E, A, Z, G, Y)


def roles(tokens, said=None, gap=4):
    labels = None if said is None else np.where(said, tokens, -100)[None]
    return roles_from_tokens(np.array([tokens]), labels, tags=TAGS, gap=gap)[0].tolist()


def test_roles_of_a_conversation():
    #         the whole video, two frames   search          clip             search           answer
    tokens = [S, 7, E, 8, S, 7, 7, E, 9, *G, 9, *Y, 8, S, 7, E, 8, *G, 9, 9, *Y, *A, 9, *Z, 8]
    want = [0, 4, 4, 4, 4, 4, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 8, 0, 0, 0, 0, 2, 2, 2, 0, 0, 0, 1, 1, 0, 0]
    assert roles(tokens) == want
    assert roles(tokens, gap=2)[3] == Role.NONE, "two frames are two videos then"
    assert roles(tokens, gap=40) == [0] * len(tokens), "and one video alone has no roles"


def test_tags_that_do_not_match_are_left_out():
    clip = [S, 7, E, 8, 8, 8, 8, S, 7, E]
    assert roles([E, *clip, S]) == [0, *roles(clip), 0]
    assert roles([*clip, *Z, *A, 9, *A, 9, *Z]) == [*roles(clip), 0, 0, 0, 0, 1, 1, 1, 1, 1, 0]
    both = [*clip, *A, 9, *Z, *A, 9, *Z]
    assert roles(both)[10:] == [0] * 5 + [0, 0, 1, 1, 0], "the last answer alone"
    said = np.arange(len(both)) < 15
    assert roles(both, said)[10:] == [0, 0, 1, 1, 0] + [0] * 5, "of what the assistant says"


def test_all_forms_of_the_rule_are_one():
    random = np.random.default_rng(0)
    of = random.integers(16, size=(2, 12)).astype(np.int32)
    real = np.arange(12) < np.array([[12], [9]])
    for flags in ({}, {"answer": False}, {"grounding": False}):
        mask = np.asarray(task_decoupled_mask(of, real, **flags))
        for b, i, j in np.ndindex(2, 12, 12):
            answers = flags.get("answer", True) and of[b, i] & 1 and of[b, j] & 4
            searches = flags.get("grounding", True) and of[b, i] & 2 and of[b, j] & 8 and j < i
            assert mask[b, 0, i, j] == (j <= i and real[b, i] and real[b, j] and not answers and not searches)
        view, order = task_decoupled_view(of, real, **flags), np.arange(12)[None]
        view = View(rule=view.rule, q_labels=view.q_labels, k_labels=of, mask=view.mask, q_idx=order, k_idx=order)
        np.testing.assert_array_equal(visible_keys(view)[real[:, None]], mask[real[:, None]])
    q, k, v = random.standard_normal((3, 2, 12, 2, 4)).astype(np.float32)
    segments = (~real).astype(np.int32)
    got = block_sparse_attention(q, k, v, mask=task_decoupled_kernel_mask(of), segment_ids=segments)
    want = softmax_attention(q, k, v, mask=task_decoupled_mask(of, real))
    assert relative_rms(np.asarray(got)[real], np.asarray(want)[real]) < 1e-6
    assert not np.any(np.asarray(want)[~real]), "a row of padding has no keys"


def test_rules_hold_in_some_batches():
    of, random = np.ones((1, 3), np.int32), np.random.default_rng(0)
    share = np.mean([sometimes(of, random).any() for _ in range(1000)])
    assert 0.07 < share < 0.13
    with pytest.raises(ValueError, match="ratio"):
        sometimes(of, random, 2.0)
    with pytest.raises(ValueError, match="roles must be integers"):
        task_decoupled_mask(of.astype(float))
