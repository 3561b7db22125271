"""Rules on roles against loops over pairs of tokens, and in decoding."""

import numpy as np
import pytest
from flax import nnx

from attnlab.attention.dense.softmax_attention import SoftmaxAttention
from attnlab.contract import View
from attnlab.nn.masking import visible_keys
from attnlab.nn.visibility import BothLabelled, LabelAtMost, LabelPairs, SameLabel, span_labels
from pallas_kernels.masks import Causal, SlidingWindow

LABELS = np.array([[-1, 0, 0, 1, 1, -1, 2, 0], [2, 2, -1, 0, 1, 1, 1, -1]])
RULES = [
    (Causal() | LabelPairs((None, 0)), lambda i, j, q, k: j <= i or k == 0),
    (Causal() | LabelPairs((0, 1), (2, 0)), lambda i, j, q, k: j <= i or (q, k) in ((0, 1), (2, 0))),
    (Causal() & ~LabelPairs((2, 0), (1, None)), lambda i, j, q, k: j <= i and (q, k) != (2, 0) and q != 1),
    (
        LabelPairs((0, 0)) & SlidingWindow(0, 0) | Causal() & ~LabelPairs((0, 0)),
        lambda i, j, q, k: i == j if q == k == 0 else j <= i,
    ),
    (Causal() & ~BothLabelled() | LabelAtMost(), lambda i, j, q, k: k <= q if min(q, k) >= 0 else j <= i),
    (Causal() | SameLabel(), lambda i, j, q, k: j <= i or q == k >= 0),
]


@pytest.mark.parametrize(("rule", "want"), RULES, ids=lambda value: str(value) if not callable(value) else "")
def test_rules_on_roles(rule, want):
    order = np.arange(8)[None]
    mask = visible_keys(View(rule=rule, q_idx=order, k_idx=order, q_labels=LABELS, k_labels=LABELS))
    for b, i, j in np.ndindex(2, 8, 8):
        assert mask[b, 0, i, j] == want(i, j, LABELS[b, i], LABELS[b, j]), (b, i, j)


def test_labels_of_spans():
    labels = span_labels(6, np.array([[[1, 3], [2, 5]], [[0, 0], [5, 9]]]), (7, 4))
    np.testing.assert_array_equal(labels, [[-1, 7, 4, 4, 4, -1], [-1, -1, -1, -1, -1, 4]])
    np.testing.assert_array_equal(span_labels(3, np.array([[[0, 1], [1, 2]]])), [[0, 1, -1]])
    with pytest.raises(ValueError, match="labels must be 2"):
        span_labels(6, np.zeros((1, 2, 2), int), (1,))
    with pytest.raises(ValueError, match=r"spans must be \(B, S, 2\)"):
        span_labels(6, np.zeros((2, 2), int))
    with pytest.raises(ValueError, match="pairs must be"):
        LabelPairs((-1, 2))


def test_roles_hold_for_what_is_in_the_cache():
    x = np.random.default_rng(0).normal(size=(2, 8, 8)).astype(np.float32)
    mixer = SoftmaxAttention(8, num_heads=2, causal=True, rngs=nnx.Rngs(0))
    rule = Causal() & ~LabelPairs((None, 0)) | LabelPairs((0, 1))
    whole = mixer(x, mask=View(rule=rule, q_labels=LABELS))
    state = mixer.init_state(2, 8)
    first, state = mixer.prefill(x[:, :7], state, mask=View(rule=rule, q_labels=LABELS[:, :7]))
    rest, _ = mixer.prefill(x[:, 7:], state, mask=View(rule=rule, q_labels=LABELS[:, 7:]))
    np.testing.assert_allclose(np.concatenate([first, rest], 1), whole, atol=1e-6)
