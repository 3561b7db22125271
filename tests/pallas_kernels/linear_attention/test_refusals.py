"""Every argument that has no meaning is refused by name, with what came and what is allowed."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import NormalizedState, dispatch, init_state, linear_attention, linear_attention_step
from pallas_kernels.linear_attention import explain

Q, KV = jnp.ones((2, 6, 4, 3)), jnp.ones((2, 6, 2, 3))
LONG = jnp.ones((2, 9, 2, 3))
IDS = jnp.zeros((2, 6), int)

REFUSED = {
    "rank": ({"q": Q[0]}, ValueError, r"q must be \(B, N, H, D\), got shape \(6, 4, 3\)"),
    "empty": ({"v": KV[..., :0]}, ValueError, r"v must have no empty axis"),
    "integers": ({"q": jnp.ones(Q.shape, int)}, TypeError, "q must be one of float16, .*, got int32"),
    "mixed dtypes": ({"v": KV.astype(jnp.bfloat16)}, TypeError, "one dtype, got float32, float32 and bfloat16"),
    "batch": ({"q": Q[:1]}, ValueError, "must agree in B"),
    "head size": ({"q": Q[..., :2]}, ValueError, "must agree in D"),
    "keys and values": ({"v": KV[:, :, :1]}, ValueError, r"must agree in \(B, M, G\)"),
    "heads": ({"q": Q[:, :, :3]}, ValueError, "multiple of the heads of k, got 3 and 2"),
    "causal cross": ({"k": LONG, "v": LONG}, ValueError, "got N=6 and M=9"),
    "non-causal decay": ({"causal": False, "log_decay": jnp.zeros(4)}, ValueError, "must be None when causal=False"),
    "decay of kv heads": (
        {"log_decay": jnp.zeros(2)},
        ValueError,
        r"log_decay must be \(H,\) = \(4,\).*got shape \(2,\)",
    ),
    "decay per channel of kv heads": ({"log_decay": -KV}, ValueError, r"got shape \(2, 6, 2, 3\)"),
    "scale": ({"scale": jnp.ones(4)}, ValueError, r"scale must be a scalar or None, got shape \(4,\)"),
    "segment shape": ({"segment_ids": IDS[:1]}, ValueError, r"must have shape \(2, 6\), got \(1, 6\)"),
    "segment dtype": ({"segment_ids": jnp.zeros((2, 6))}, TypeError, "segment_ids must be integers, got float32"),
    "causal segment pair": ({"segment_ids": (IDS, IDS)}, ValueError, "one array .* when causal=True"),
    "three segment ids": ({"causal": False, "segment_ids": (IDS,) * 3}, ValueError, "a pair of them, got 3"),
    "cross segments": (
        {"causal": False, "k": LONG, "v": LONG, "segment_ids": IDS},
        ValueError,
        "a pair .* when N != M",
    ),
    "state of packed non-causal": (
        {"causal": False, "segment_ids": IDS, "return_state": True},
        ValueError,
        "return_state has no meaning",
    ),
    "initial state of packed non-causal": (
        {"causal": False, "segment_ids": IDS, "initial_state": init_state(2, 4, 3, 3)},
        ValueError,
        "initial_state has no meaning",
    ),
    "state shape": (
        {"initial_state": init_state(2, 2, 3, 3)},
        ValueError,
        r"shape \(2, 4, 3, 3\), got \(2, 2, 3, 3\)",
    ),
    "state sums shape": (
        {"normalize": True, "initial_state": NormalizedState(jnp.zeros((2, 4, 3, 3)), jnp.zeros((2, 2, 3)))},
        ValueError,
        r"shape \(2, 4, 3\), got \(2, 2, 3\)",
    ),
    "plain state when normalising": (
        {"normalize": True, "initial_state": init_state(2, 4, 3, 3)},
        TypeError,
        "must be a NormalizedState when normalize=True",
    ),
    "normalised state otherwise": (
        {"initial_state": init_state(2, 4, 3, 3, normalize=True)},
        TypeError,
        "must be an array .* when normalize=False",
    ),
    "integer state": ({"initial_state": jnp.zeros((2, 4, 3, 3), int)}, TypeError, "must be floating, got int32"),
    "chunk of zero": ({"chunk_size": 0}, ValueError, "chunk_size must be a positive integer or None, got 0"),
    "chunk of 1.5": ({"chunk_size": 1.5}, TypeError, "chunk_size must be a positive integer or None, got 1.5"),
    "feature map by name": ({"feature_map": "relu"}, TypeError, "feature_map must be None, a callable, or a pair"),
    "feature map of tokens": ({"feature_map": lambda x: x[:, 1:]}, ValueError, "may change the last axis alone"),
    "feature maps of two sizes": (
        {"feature_map": (lambda x: x, lambda x: x[..., :1])},
        ValueError,
        "must give q and k one size, got 3 and 1",
    ),
    "unknown implementation": (
        {"implementation": "refrence"},
        ValueError,
        "'refrence' of linear_attention is unknown, did you mean 'reference'.*there are .*xla, reference",
    ),
    "chunks of the reference": (
        {"implementation": "reference", "chunk_size": 64},
        dispatch.UnsupportedError,
        "implementation='reference' refuses: it has no chunks.*got 64",
    ),
    "chunks without causality": (
        {"causal": False, "chunk_size": 64},
        dispatch.UnsupportedError,
        "no implementation takes these arguments .*xla: .*got 64; reference: ",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusal(name):
    options, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        linear_attention(**({"q": Q, "k": KV, "v": KV} | options))


def test_refusals_of_a_step():
    state = init_state(2, 4, 3, 3)
    with pytest.raises(ValueError, match=r"k_t must be \(B, T, G, D\), got shape \(2, 2, 3\)"):
        linear_attention_step(Q, KV[:, 0], KV[:, 0], state)
    with pytest.raises(ValueError, match="state must be given"):
        linear_attention_step(Q[:, 0], KV[:, 0], KV[:, 0], None)
    with pytest.raises(ValueError, match=r"log_decay of a step must be .* got shape \(2, 1, 4, 3\)"):
        linear_attention_step(Q[:, 0], KV[:, 0], KV[:, 0], state, log_decay=jnp.zeros((2, 1, 4, 3)))


def test_explain_names_each_implementation_and_its_reason():
    everywhere = [answer for answer in explain() if answer.name in ("xla", "reference")]
    assert everywhere == [("xla", True, ""), ("reference", True, "")]
    assert ("tpu", False, "needs tpu; this machine has cpu") in explain()
    answers = {answer.name: answer for answer in explain(Q, KV, KV, chunk_size=16)}
    assert answers["xla"].ok and not answers["reference"].ok
    assert "chunk_size must be None, got 16" in answers["reference"].reason


def test_a_forced_implementation_runs_or_raises(monkeypatch):
    from pallas_kernels.linear_attention import reference, xla

    ran = []
    for module in (reference, xla):
        name = module.__name__.rsplit(".", 1)[1]
        monkeypatch.setattr(module, "run", lambda args, name=name: (ran.append(name), None))
    for name in ("reference", "xla", None):
        linear_attention(Q, KV, KV, implementation=name)
    assert ran == ["reference", "xla", "xla"]
    monkeypatch.setattr(xla, "supports", lambda args: "out of order")
    with pytest.raises(dispatch.UnsupportedError, match="implementation='xla' refuses: out of order"):
        linear_attention(Q, KV, KV, implementation="xla")
    linear_attention(Q, KV, KV)
    assert ran[-1] == "reference"


def test_numpy_arguments_are_welcome():
    x = np.ones((1, 2, 1, 2), np.float32)
    np.testing.assert_array_equal(linear_attention(x, x, x), [[[[2, 2]], [[4, 4]]]])
