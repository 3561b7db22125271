"""Every argument that has no meaning is refused by name, with what came and what is allowed."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import NormalizedState, delta_rule_attention, delta_rule_attention_step, dispatch
from pallas_kernels.delta_rule_attention import explain, init_state

Q, KV, BETA = jnp.ones((2, 6, 4, 3)), jnp.ones((2, 6, 2, 3)), jnp.ones((2, 6, 4))
IDS = jnp.zeros((2, 6), int)

REFUSED = {
    "rank": ({"q": Q[0]}, ValueError, r"q must be \(B, N, H, D\), got shape \(6, 4, 3\)"),
    "mixed dtypes": ({"v": KV.astype(jnp.bfloat16)}, TypeError, "one dtype, got float32, float32 and bfloat16"),
    "cross": ({"k": jnp.ones((2, 9, 2, 3)), "v": jnp.ones((2, 9, 2, 3))}, ValueError, "got N=6 and M=9"),
    "beta of kv heads": ({"beta": BETA[..., :2]}, ValueError, r"beta must be \(B, N, H\) = \(2, 6, 4\), .*\(2, 6, 2\)"),
    "beta per channel": ({"beta": Q}, ValueError, r"beta must be .* got shape \(2, 6, 4, 3\)"),
    "integer beta": ({"beta": BETA.astype(int)}, TypeError, "beta must be floating, got int32"),
    "decay of kv heads": (
        {"log_decay": jnp.zeros(2)},
        ValueError,
        r"log_decay must be \(H,\) = \(4,\) or \(B, N, H\) = \(2, 6, 4\), got shape \(2,\)",
    ),
    "decay per channel": ({"log_decay": -Q}, ValueError, r"log_decay must be .* got shape \(2, 6, 4, 3\)"),
    "scale": ({"scale": jnp.ones(4)}, ValueError, r"scale must be a scalar or None, got shape \(4,\)"),
    "segment shape": ({"segment_ids": IDS[:1]}, ValueError, r"must have shape \(2, 6\), got \(1, 6\)"),
    "segment pair": ({"segment_ids": (IDS, IDS)}, ValueError, r"segment_ids must be one array \(B, N\)"),
    "state shape": ({"initial_state": init_state(2, 2, 3, 3)}, ValueError, r"shape \(2, 4, 3, 3\), got \(2, 2, 3, 3\)"),
    "normalised state": (
        {"initial_state": NormalizedState(jnp.zeros((2, 4, 3, 3)), jnp.zeros((2, 4, 3)))},
        TypeError,
        r"must be an array \(B, H, D, E\)",
    ),
    "chunk of zero": ({"chunk_size": 0}, ValueError, "chunk_size must be a positive integer or None, got 0"),
    "unknown implementation": (
        {"implementation": "xlla"},
        ValueError,
        "'xlla' of delta_rule_attention is unknown, did you mean 'xla'.*there are tpu, xla, reference",
    ),
    "chunks of the reference": (
        {"implementation": "reference", "chunk_size": 64},
        dispatch.UnsupportedError,
        "implementation='reference' refuses: it has no chunks.*got 64",
    ),
    "TPU elsewhere": (
        {"implementation": "tpu"},
        dispatch.UnsupportedError,
        "implementation='tpu' refuses: needs tpu; this machine has cpu",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusal(name):
    options, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        delta_rule_attention(**({"q": Q, "k": KV, "v": KV, "beta": BETA} | options))


ON_TPU = {
    "float16": ({"dtype": jnp.float16}, {}, "it takes bfloat16 and float32, got float16"),
    "large heads": ({"size": 257}, {}, "D and E may be at most 256, got 257 and 257"),
    "chunks": ({}, {"chunk_size": 48}, "chunk_size must be None or one of 32, 64, 128, got 48"),
}


@pytest.mark.parametrize("name", ON_TPU)
def test_refusals_of_the_tpu_kernels(name):
    arrays, options, message = ON_TPU[name]
    x = jnp.ones((1, 6, 2, arrays.get("size", 4)), arrays.get("dtype", jnp.float32))
    with dispatch.target("tpu", qualified_only=False):
        answers = {answer.name: answer for answer in explain(x, x, x, x[..., 0], **options)}
        with pytest.raises(dispatch.UnsupportedError, match=message):
            delta_rule_attention(x, x, x, x[..., 0], **options, implementation="tpu")
    assert not answers["tpu"].ok and answers["xla"].ok and message in answers["tpu"].reason


def test_refusals_of_a_step():
    state, token = init_state(2, 4, 3, 3), (Q[:, 0], KV[:, 0], KV[:, 0])
    with pytest.raises(ValueError, match=r"q_t must be \(B, H, D\), got shape \(2, 6, 4, 3\)"):
        delta_rule_attention_step(Q, *token[1:], BETA[:, 0], state)
    with pytest.raises(ValueError, match="state must be given"):
        delta_rule_attention_step(*token, BETA[:, 0], None)
    with pytest.raises(ValueError, match=r"beta_t must be \(B, H\), got shape \(2, 6, 4\)"):
        delta_rule_attention_step(*token, BETA, state)
    with pytest.raises(ValueError, match=r"log_decay of a step must be \(H,\) or \(B, H\), got shape \(2, 1, 4\)"):
        delta_rule_attention_step(*token, BETA[:, 0], state, log_decay=jnp.zeros((2, 1, 4)))


def test_explain_names_each_implementation_and_its_reason():
    assert explain() == [("tpu", False, "needs tpu; this machine has cpu"), ("xla", True, ""), ("reference", True, "")]
    answers = explain(Q, KV, KV, BETA, chunk_size=16)
    assert [(answer.name, answer.ok) for answer in answers] == [("tpu", False), ("xla", True), ("reference", False)]
    with dispatch.target("tpu", qualified_only=False):
        assert explain(Q, KV, KV, BETA)[0] == ("tpu", True, "")


def test_numpy_arguments_are_welcome():
    x = np.ones((1, 2, 1, 1), np.float32)
    np.testing.assert_array_equal(delta_rule_attention(x, x, x, x[..., 0]), x)
