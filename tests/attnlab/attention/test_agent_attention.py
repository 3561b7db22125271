import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import Layout, Site, UnsupportedArgument
from attnlab.attention.dense.softmax_attention import SoftmaxAttention
from attnlab.attention.linear.agent_attention import AgentAttention, AgentCore, agent_attention
from attnlab.nn.dense_mixer import with_core


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
    for parameter in (mixer.local.kernel, mixer.local.bias):
        parameter[...] = jnp.zeros_like(parameter[...])
    x = jax.random.normal(jax.random.key(0), (2, 6, 6, 8))
    y, intermediates = nnx.capture(mixer, nnx.Intermediate)(x)
    weights = intermediates["attention"][0]
    v = mixer.value(x).reshape(2, 36, 2, 4)
    want = mixer.out(jnp.einsum("bhnm,bmhe->bnhe", weights, v)).reshape(x.shape)
    np.testing.assert_allclose(y, want, atol=1e-5)


def test_dropout_acts_on_both_softmaxes_and_on_the_result():
    x = jax.random.normal(jax.random.key(0), (1, 6, 6, 8))
    for option in ("attention_dropout", "projection_dropout"):
        mixer = build(**{option: 0.5}, rngs=nnx.Rngs(params=0, dropout=1))
        np.testing.assert_array_equal(mixer(x), build()(x))
        assert not np.allclose(mixer(x, deterministic=False), mixer(x))


def test_a_prefix_is_read_and_written_but_not_pooled():
    mixer, x = build(prefix=2), jax.random.normal(jax.random.key(0), (1, 38, 8))
    assert mixer.layout is Layout.SEQUENCE
    moved = x.at[:, 1].add(1.0)
    y, changed = mixer(x), mixer(moved)
    assert (jnp.abs(y - changed).max((0, 2)) > 1e-6).all()
    q = mixer.query(x)
    np.testing.assert_array_equal(mixer.core.agents(q), mixer.core.agents(q.at[:, :2].set(5.0)))


def test_its_core_fits_a_dense_mixer_and_refuses_masks():
    dense = SoftmaxAttention(8, num_heads=2, layout=Layout.IMAGE, rngs=nnx.Rngs(0))
    core = AgentCore(8, num_heads=2, grid=(4, 4), num_agents=4, rngs=nnx.Rngs(1))
    mixer, x = with_core(dense, core), jax.random.normal(jax.random.key(0), (2, 4, 4, 8))
    y, intermediates = nnx.capture(mixer, nnx.Intermediate)(x)
    want = jnp.einsum("bhnm,bmhe->bnhe", intermediates["attention"][0], mixer.value(x).reshape(2, 16, 2, 4))
    np.testing.assert_allclose(y, mixer.out(want).reshape(x.shape), atol=1e-5)
    with pytest.raises(UnsupportedArgument, match="AgentCore does not take mask"):
        mixer(x, mask=jnp.ones((2, 16), bool))


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
        ({"reduction": 4}, r"reduction must be at least 1 and divide the grid \(6, 6\), got 4"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_refuses_windows_with_a_prefix_or_a_reduction_and_other_grids():
    with pytest.raises(UnsupportedArgument, match="no windows with tokens in front, got prefix=1 and window=3"):
        build(prefix=1, window=3)
    with pytest.raises(UnsupportedArgument, match="reduces whole images without tokens in front, got reduction=3"):
        build(reduction=3, window=3)
    with pytest.raises(ValueError, match=r"built for tokens \(6, 6\), got x of shape \(1, 4, 4, 8\)"):
        build()(jnp.ones((1, 4, 4, 8)))
