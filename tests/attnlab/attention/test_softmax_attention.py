"""The softmax mixer: equality with the formula, its options, decoding, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab.attention.dense.softmax_attention import SoftmaxAttention
from attnlab.contract import Layout, Site, UnsupportedArgument, View
from attnlab.nn.dense_mixer import with_core
from attnlab.nn.masking import SameLabel
from attnlab.nn.rotary import Rotary
from attnlab.nn.softmax_core import SoftmaxCore
from attnlab.registry import create
from pallas_kernels.masks import Causal, SlidingWindow
from tests.accuracy import relative_rms


def build(features=16, *, num_heads=4, **options):
    return SoftmaxAttention(features, num_heads=num_heads, **options, rngs=nnx.Rngs(0, dropout=1))


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_equals_the_equations():
    mixer = build(12, num_heads=4, num_kv_heads=2, head_dim=6, value_dim=5, context_features=10, causal=True)
    x, context = draw(0, 2, 7, 12), draw(1, 2, 9, 10)
    weight = {name: np.asarray(getattr(mixer, name).kernel[...], np.float64) for name in ("query", "key", "value")}
    out = np.asarray(mixer.out.kernel[...], np.float64)
    q = np.einsum("bnc,chd->bnhd", x, weight["query"])
    k = np.einsum("bnc,chd->bnhd", context, weight["key"]).repeat(2, axis=2)
    v = np.einsum("bnc,chd->bnhd", context, weight["value"]).repeat(2, axis=2)
    scores = np.einsum("bnhd,bmhd->bhnm", q, k) / np.sqrt(6)
    e = np.exp(scores) * np.tri(7, 9)
    weights = e / e.sum(-1, keepdims=True)
    expected = np.einsum("bhnm,bmhe,hec->bnc", weights, v, out)
    y, seen = nnx.capture(mixer, nnx.Intermediate)(x, context)
    assert relative_rms(y, expected) < 1e-6
    assert relative_rms(seen["attention"][0], weights) < 1e-6


OPTIONS = {
    "plain": {},
    "grouped": {"num_kv_heads": 2, "value_dim": 6},
    "rotary": {"rotary": 10000.0, "qk_norm": True},
    "alibi": {"alibi": True},
    "window": {"structural_mask": SlidingWindow(2, 0), "rotary": Rotary(interleaved=True)},
    "blocks": {"block_size": 4, "softcap": 2.0},
}


def options_of(*quick):
    """All options, of which some are tested in `make test`."""
    return [pytest.param(o, id=n, marks=() if n in quick else pytest.mark.slow) for n, o in OPTIONS.items()]


@pytest.mark.parametrize("options", options_of("rotary", "blocks"))
def test_decoding_equals_the_whole(options):
    mixer = build(causal=True, **options)
    x = draw(2, 2, 9, 16)
    whole = mixer(x)
    state = mixer.init_state(2, 11)
    first, state = mixer.prefill(x[:, :4], state)
    second, state = mixer.prefill(x[:, 4:6], state)
    step = jax.jit(lambda x_t, state: mixer.step(x_t, state))
    rest = []
    for n in range(6, 9):
        y, state = step(x[:, n], state)
        rest.append(y[:, None])
    assert relative_rms(np.concatenate([first, second, *rest], 1), whole) < 1e-6
    np.testing.assert_array_equal(state.length, [9, 9])


@pytest.mark.parametrize("options", options_of("rotary", "blocks"))
def test_left_padding_changes_nothing(options):
    mixer = build(causal=True, **options)
    x = draw(3, 1, 8, 16)
    alone = mixer(x)
    padded = np.concatenate([draw(4, 1, 3, 16), x], 1)
    batch = np.concatenate([padded, draw(5, 1, 11, 16)], 0)
    mask = np.ones((2, 11), bool)
    mask[0, :3] = False
    y, state = mixer.prefill(batch[:, :10], mixer.init_state(2, 11), mask=mask[:, :10])
    last, state = mixer.step(batch[:, 10], state)
    assert relative_rms(y[:1, 3:], alone[:, :7]) < 1e-6 and relative_rms(last[:1], alone[:, 7]) < 1e-6
    np.testing.assert_array_equal(state.length, [8, 11])
    np.testing.assert_array_equal(y[0, :3], np.broadcast_to(mixer.out.bias[...], (3, 16)))


def test_a_scan_of_donated_steps_stays_in_place():
    mixer = build(causal=True, rotary=100.0)
    x = draw(6, 2, 6, 16)

    def advance(state, x_t):
        y, state = mixer.step(x_t, state)
        return state, y

    decode = jax.jit(lambda state, x: jax.lax.scan(advance, state, x.swapaxes(0, 1)), donate_argnums=0)
    state = mixer.init_state(2, 6, dtype=jnp.float32)
    _, y = decode(state, x)
    assert relative_rms(y.swapaxes(0, 1), mixer(x)) < 1e-6
    assert state.keys.is_deleted()


def test_a_full_cache_refuses():
    mixer = build(causal=True)
    with pytest.raises(ValueError, match="6 tokens do not fit a cache of max_length 5"):
        mixer.prefill(draw(0, 1, 6, 16), mixer.init_state(1, 5))
    with pytest.raises(ValueError, match="max_length 5"):
        jax.jit(lambda x, state: mixer.prefill(x, state))(draw(0, 1, 6, 16), mixer.init_state(1, 5))
    _, state = mixer.prefill(draw(0, 1, 5, 16), mixer.init_state(1, 5))
    with pytest.raises(ValueError, match="6 tokens"):
        mixer.step(draw(0, 1, 16), state)
    with pytest.raises(ValueError, match="needs max_length"):
        mixer.init_state(1)
    _, state = mixer.prefill(draw(0, 1, 6, 16), mixer.init_state(1, 5), mask=np.array([[False] + [True] * 5]))
    np.testing.assert_array_equal(state.length, [5])


@pytest.mark.parametrize("options", options_of("rotary", "blocks"))
def test_packed_segments_are_separate_runs(options):
    mixer = build(causal=True, **options)
    x = draw(7, 1, 9, 16)
    packed = mixer(x, segment_ids=np.array([[4] * 5 + [1] * 4]))
    assert relative_rms(packed, np.concatenate([mixer(x[:, :5]), mixer(x[:, 5:])], 1)) < 1e-6


@pytest.mark.parametrize("options", [{"rotary": 100.0}, {"alibi": True}])
def test_positions_are_used(options):
    mixer = build(**options)
    x = draw(8, 2, 5, 16)
    moved = mixer(x, positions=np.arange(5)[None] + 7)
    assert relative_rms(moved, mixer(x)) < 1e-5
    assert relative_rms(mixer(x, positions=np.arange(0, 10, 2)[None]), mixer(x)) > 1e-4


@pytest.mark.parametrize("layout, grid", [(Layout.IMAGE, (3, 4)), (Layout.VIDEO, (2, 3, 2))])
def test_grids_turn_by_their_axes(layout, grid):
    mixer = build(24, num_heads=2, layout=layout, rotary=100.0)
    plain = build(24, num_heads=2, layout=layout)
    x = draw(9, 2, *grid, 24)
    assert mixer(x).shape == x.shape
    flat = build(24, num_heads=2)
    assert relative_rms(plain(x).reshape(2, -1, 24), flat(x.reshape(2, -1, 24))) < 1e-6
    # Swapping two axes with their pairs of channels is the same mechanism: so is the result without pairs for one.
    one_axis = build(24, num_heads=2, layout=layout, rotary=Rotary(100.0, split=(6,) + (0,) * (len(grid) - 1)))
    assert relative_rms(one_axis(x), mixer(x)) > 1e-4
    key_mask = np.ones((2, x.reshape(2, -1, 24).shape[1]), bool)
    key_mask[:, -1] = False
    changed = x.copy()
    changed[(slice(None), *[-1] * len(grid))] += 1
    ys = mixer(x, mask=key_mask).reshape(2, -1, 24), mixer(changed, mask=key_mask).reshape(2, -1, 24)
    np.testing.assert_array_equal(ys[0][:, :-1], ys[1][:, :-1])


def test_dropout_acts_in_training_only():
    mixer = build(attention_dropout=0.5, projection_dropout=0.5)
    x = draw(10, 2, 5, 16)
    np.testing.assert_array_equal(mixer(x), mixer(x))
    assert not np.array_equal(mixer(x, deterministic=False), mixer(x, deterministic=False))


def test_bfloat16_tokens_keep_their_dtype():
    mixer = build(causal=True, rotary=100.0, num_kv_heads=2)
    x = draw(11, 2, 6, 16)
    y = mixer(jnp.asarray(x, jnp.bfloat16))
    assert y.dtype == jnp.bfloat16 and relative_rms(y, mixer(x)) < 1e-2
    z, state = mixer.prefill(jnp.asarray(x, jnp.bfloat16), mixer.init_state(2, 6))
    assert z.dtype == jnp.bfloat16 and state.keys.dtype == jnp.float32
    assert build(dtype=jnp.bfloat16)(x).dtype == jnp.bfloat16


def test_the_registry_builds_it():
    mixer = create("softmax_attention", Site(16, 4, causal=True), rngs=nnx.Rngs(0), rotary=10000.0)
    assert isinstance(mixer, SoftmaxAttention) and mixer.causal and mixer.core.rotary == Rotary(10000.0)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"num_heads": 3}, "not a multiple of num_heads 3"),
        ({"num_kv_heads": 3}, "multiple of num_kv_heads 3"),
        ({"head_dim": 5, "rotary": 10.0}, "their number must be even, got 5"),
        ({"rotary": Rotary(split=(1, 1))}, "split must give 1 axes 2 pairs"),
        ({"rotary": True}, "rotary must be"),
        ({"alibi": True, "layout": "image"}, "alibi is a distance"),
        ({"alibi": True, "block_size": 2}, "block_size does not go"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        build(**options)


def test_calls_that_mean_nothing_are_refused():
    x, context = draw(12, 2, 4, 16), draw(13, 2, 3, 10)
    with pytest.raises(ValueError, match="context is missing"):
        build(context_features=10)(x)
    with pytest.raises(ValueError, match="context must be"):
        build()(x, context)
    with pytest.raises(UnsupportedArgument, match="does not take positions"):
        build()(x, positions=np.arange(4)[None])
    with pytest.raises(UnsupportedArgument, match="does not take segment_ids"):
        build(layout="image")(x[:, None], segment_ids=np.zeros((2, 4), int))
    with pytest.raises(UnsupportedArgument, match="positions in the layout image do not reach"):
        build(layout="image", rotary=10.0)(x[:, None], draw(0, 2, 3, 16))
    with pytest.raises(ValueError, match=r"positions must be \(B, 4\)"):
        build(alibi=True)(x, positions=np.arange(4))
    with pytest.raises(ValueError, match=r"positions must be \(B, 4, 2\)"):
        build(layout="image", rotary=10.0)(x[:, None], positions=np.arange(4)[None])
    for options in ({}, {"causal": True, "layout": "image"}):
        with pytest.raises(UnsupportedArgument, match="decodes causal self-attention of a sequence"):
            build(**options).init_state(2, 4)
    with pytest.raises(ValueError, match="give init_state the context"):
        build(causal=True, context_features=16).init_state(2, 4)
    with pytest.raises(ValueError, match="mask must be boolean"):
        build()(x, mask=np.zeros((2, 4), np.float32))


@pytest.mark.parametrize("options", [{}, {"causal": True, "rotary": 100.0}, {"num_kv_heads": 2}])
def test_cross_attention_decodes(options):
    mixer = build(context_features=10, **options)
    x, context = draw(14, 2, 6, 16), draw(15, 2, 8, 10)
    mask = np.ones((2, 8), bool)
    mask[1, 5:] = False
    whole = mixer(x, context, mask=mask)
    state = mixer.init_state(2, context=context, context_mask=mask)
    first, state = mixer.prefill(x[:, :4], state)
    second, state = mixer.step(x[:, 4], state)
    third, state = mixer.step(x[:, 5], state)
    decoded = np.concatenate([first, second[:, None], third[:, None]], 1)
    assert relative_rms(decoded, whole) < 1e-6


def test_spans_are_unlocked_by_a_view():
    """A causal mixer whose tokens 2..4 see each other both ways, in the call, in one prefill, and in steps after it."""
    mixer = build(causal=True, rotary=100.0)
    x = draw(16, 1, 7, 16)
    labels = np.array([[-1, -1, 0, 0, 0, -1, -1]])
    view = View(rule=Causal() | SameLabel(), q_labels=labels)
    allowed = np.tri(7, dtype=bool) | ((labels[0][:, None] == labels[0]) & (labels[0] >= 0))
    want = build(rotary=100.0)(x, mask=allowed[None, None])
    assert relative_rms(mixer(x, mask=view), want) < 1e-6
    assert relative_rms(mixer(x), want) > 1e-3
    y, state = mixer.prefill(x[:, :6], mixer.init_state(1, 9), mask=View(rule=view.rule, q_labels=labels[:, :6]))
    last, _ = mixer.step(x[:, 6], state)
    assert relative_rms(np.concatenate([y, last[:, None]], 1), want) < 1e-6
    with pytest.raises(ValueError, match="needs a rule that looks at them"):
        mixer(x, mask=View(q_labels=labels))
    with pytest.raises(ValueError, match="needs labels"):
        mixer(x, mask=View(rule=SameLabel()))


def test_a_position_is_not_a_slot():
    mixer = build(causal=True, rotary=100.0)
    x, at = draw(17, 1, 6, 16), np.array([[0, 1, 1, 1, 2, 3]])
    whole = mixer(x, positions=at)
    y, state = mixer.prefill(x[:, :4], mixer.init_state(1, 8), positions=at[:, :4])
    np.testing.assert_array_equal((state.length, state.next_at), ([4], [2]))
    fifth, state = mixer.step(x[:, 4], state)
    sixth, state = mixer.step(x[:, 5], state, positions=np.array([3]))
    assert relative_rms(np.concatenate([y, fifth[:, None], sixth[:, None]], 1), whole) < 1e-6


def test_another_core_has_the_same_weights():
    model = nnx.List([build(causal=True), build(causal=True)])
    x = draw(18, 1, 5, 16)
    capped = with_core(model, lambda core: SoftmaxCore(4, softcap=2.0), layers=[1])
    assert capped[0].core.softcap is None and capped[1].core.softcap == 2.0 and model[1].core.softcap is None
    assert capped[1].query.kernel[...] is model[1].query.kernel[...]
    assert relative_rms(capped[1](x), build(causal=True, softcap=2.0)(x)) < 1e-6
    assert relative_rms(capped[0](x), model[0](x)) == 0
    with pytest.raises(ValueError, match="layers must be among the 2"):
        with_core(model, SoftmaxCore(4), layers=[2])
    with pytest.raises(ValueError, match="their number must be even, got 5"):
        with_core(build(20, num_heads=4), SoftmaxCore(4, rotary=10.0))
