"""Every argument that has no meaning is refused by name, with what came and what is allowed."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch, selective_scan, selective_scan_step
from pallas_kernels.selective_scan import explain, init_state

X, A, B = jnp.ones((2, 6, 4)), -jnp.ones((4, 3)), jnp.ones((2, 6, 3))
GIVEN = {"x": X, "delta": X, "a": A, "b": B, "c": B}

REFUSED = {
    "rank": ({"x": X[0]}, ValueError, r"x must be \(B, N, C\), got shape \(6, 4\)"),
    "empty": ({"x": X[:, :0]}, ValueError, r"x must have no empty axis, got shape \(2, 0, 4\)"),
    "integers": ({"x": X.astype(int)}, TypeError, "x must be one of float16, .* got int32"),
    "delta": ({"delta": X[..., :1]}, ValueError, r"delta must be \(B, N, C\) = \(2, 6, 4\), got shape \(2, 6, 1\)"),
    "gate": ({"gate": X[:, :1]}, ValueError, r"gate must be .*got shape \(2, 1, 4\)"),
    "rates": ({"a": A[:3]}, ValueError, r"a must be \(C, S\) with C = 4, got shape \(3, 3\)"),
    "state size": ({"b": B[..., :2]}, ValueError, r"b must be .*S = 3, got shape \(2, 6, 2\)"),
    "groups": ({"b": jnp.ones((2, 6, 2, 3))}, ValueError, "as many groups, got 2 and 1"),
    "indivisible": (
        {"b": jnp.ones((2, 6, 3, 3)), "c": jnp.ones((2, 6, 3, 3))},
        ValueError,
        "multiple of the groups of b, got 4 and 3",
    ),
    "mixed dtypes": ({"c": B.astype(jnp.bfloat16)}, TypeError, "c must have the dtype of x, float32, got bfloat16"),
    "skip": ({"skip": jnp.ones(3)}, ValueError, r"skip must be \(C,\) = \(4,\), got shape \(3,\)"),
    "integer bias": ({"delta_bias": jnp.ones(4, int)}, TypeError, "delta_bias must be floating, got int32"),
    "state": ({"initial_state": jnp.ones((2, 3, 4))}, ValueError, r"\(B, C, S\) = \(2, 4, 3\), got shape \(2, 3, 4\)"),
    "segments": ({"segment_ids": jnp.zeros((1, 6), int)}, ValueError, r"shape \(B, N\) = \(2, 6\), got \(1, 6\)"),
    "chunk of zero": ({"chunk_size": 0}, ValueError, "chunk_size must be a positive integer or None, got 0"),
    "unknown implementation": (
        {"implementation": "xlla"},
        ValueError,
        "'xlla' of selective_scan is unknown, did you mean 'xla'",
    ),
    "chunks of the reference": (
        {"implementation": "reference", "chunk_size": 64},
        dispatch.UnsupportedError,
        "implementation='reference' refuses: it has no chunks.*got 64",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusal(name):
    options, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        selective_scan(**(GIVEN | options))


def test_refusals_of_a_step():
    state = init_state(2, 4, 3)
    with pytest.raises(ValueError, match=r"x_t must be \(B, C\), got shape \(2, 6, 4\)"):
        selective_scan_step(X, X[:, 0], A, B[:, 0], B[:, 0], state)
    with pytest.raises(ValueError, match=r"b_t must be \(B, G, S\) or \(B, S\), got shape \(3,\)"):
        selective_scan_step(X[:, 0], X[:, 0], A, B[0, 0], B[:, 0], state)
    with pytest.raises(ValueError, match="state must be given"):
        selective_scan_step(X[:, 0], X[:, 0], A, B[:, 0], B[:, 0], None)


def test_explain_names_each_implementation_and_its_reason():
    answers = {answer.name: answer for answer in explain(platform="cpu")}
    assert answers["xla"].ok and answers["reference"].ok
    answers = {answer.name: answer for answer in explain(X, X, A, B, B, chunk_size=16)}
    assert answers["xla"].ok and "it has no chunks" in answers["reference"].reason


def test_numpy_arguments_are_welcome():
    x = np.ones((1, 1, 1), np.float32)
    np.testing.assert_array_equal(selective_scan(x, x, -x[0], x, x), x)
