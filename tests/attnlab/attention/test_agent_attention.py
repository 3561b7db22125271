import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import Layout, Site, UnsupportedArgument
from attnlab.attention.linear.agent_attention import AgentAttention, agent_attention


def build(**options):
    return AgentAttention(8, **({"num_heads": 2, "grid": (6, 6), "num_agents": 4, "rngs": nnx.Rngs(0)} | options))


def test_equals_generalised_linear_attention():
    keys = jax.random.split(jax.random.key(0), 6)
    q, k, v = (jax.random.normal(key, (2, 50, 3, 8)) for key in keys[:3])
    agents = jax.random.normal(keys[3], (2, 9, 3, 8))
    p1, p2 = jax.random.normal(keys[4], (3, 9, 50)), jax.random.normal(keys[5], (3, 50, 9))
    got = agent_attention(q, k, v, agents, aggregate_bias=p1, broadcast_bias=p2)

    q, k, v, agents, p1, p2 = (np.asarray(a, np.float64) for a in (q, k, v, agents, p1, p2))
    softmax = lambda s: np.exp(s) / np.exp(s).sum(-1, keepdims=True)  # noqa: E731
    phi_q = softmax(np.einsum("bnhd,bahd->bhna", q, agents) / 8**0.5 + p2)
    phi_k = softmax(np.einsum("bahd,bmhd->bham", agents, k) / 8**0.5 + p1).swapaxes(-1, -2)
    want = np.einsum("bhna,bhma,bmhe->bnhe", phi_q, phi_k, v, optimize=True)
    assert np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2)) < 1e-6


def test_recorded_map_gives_the_output_without_the_local_term():
    mixer = build(window=3, shift=1)
    mixer.core.local.kernel[...] = jnp.zeros_like(mixer.core.local.kernel[...])
    mixer.core.local.bias[...] = jnp.zeros_like(mixer.core.local.bias[...])
    x = jax.random.normal(jax.random.key(0), (2, 6, 6, 8))
    y, intermediates = nnx.capture(mixer, nnx.Intermediate)(x)
    weights = intermediates["attention"][0]
    v = mixer.key_value(x)[..., 8:].reshape(2, 36, 2, 4)
    want = mixer.projection(jnp.einsum("bhnm,bmhe->bnhe", weights, v).reshape(2, 6, 6, 8))
    np.testing.assert_allclose(y, want, atol=1e-5)


def test_dropout_acts_on_both_softmaxes_and_on_the_result():
    x = jax.random.normal(jax.random.key(0), (1, 6, 6, 8))
    for option in ("attention_dropout", "projection_dropout"):
        mixer = build(**{option: 0.5}, rngs=nnx.Rngs(params=0, dropout=1))
        np.testing.assert_array_equal(mixer(x), build()(x))
        assert not np.allclose(mixer(x, deterministic=False), mixer(x))


def test_agents_fit_small_grids():
    for grid, agents in (((56, 56), 49), ((14, 14), 49), ((8, 8), 16), ((5, 3), 4), ((1, 1), 1)):
        assert AgentAttention.site_defaults(Site(8, 2, layout=Layout.IMAGE, grid=grid)) == {"num_agents": agents}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grid": None}, "needs the grid"),
        ({"num_agents": 5}, "num_agents must be a square number .*got 5"),
        ({"num_heads": 3}, "num_heads must divide the 8 channels, got 3"),
        ({"window": 4}, r"windows of \(4, 4\) do not tile a grid of \(6, 6\)"),
        ({"window": 3, "shift": 3}, "shift must be .*less than the window"),
        ({"shift": 1}, "without a window"),
        ({"reduction": 4}, r"reduction must divide the window \(6, 6\), got 4"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_refuses_windows_with_a_class_token_and_other_grids():
    with pytest.raises(UnsupportedArgument, match="class token"):
        build(class_token=True, window=3)
    with pytest.raises(ValueError, match=r"built for tokens \(6, 6\), got x of shape \(1, 4, 4, 8\)"):
        build()(jnp.ones((1, 4, 4, 8)))
