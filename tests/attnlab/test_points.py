import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import points
from attnlab.models import block
from attnlab.models.generate import generate
from attnlab.models.language_model import LanguageModel
from attnlab.models.vit import ViT
from attnlab.nn import dense_mixer, linear_mixer, softmax_core
from attnlab.points import LAYER_POINTS, POINTS, Intervention, Setting, attach, detach

VOCABULARY, DEPTH, HEADS, LENGTH = 13, 2, 2, 6


def language_model(mixer="softmax_attention", **options) -> LanguageModel:
    return LanguageModel(VOCABULARY, features=8, depth=DEPTH, num_heads=HEADS, mixer=mixer, rngs=nnx.Rngs(0), **options)


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return language_model()


def tokens(batch=2, length=LENGTH) -> jax.Array:
    return jax.random.randint(jax.random.key(0), (batch, length), 0, VOCABULARY)


def everywhere(act, *, points=POINTS, **members) -> Intervention:
    """An intervention that calls `act(point, value, at, memory)` at all points, or at some."""

    def method(point):
        return lambda self, value, at, memory: act(point, value, at, memory)

    return type("Everywhere", (Intervention,), {point: method(point) for point in points} | members)()


class Scaled(Intervention):
    """Factor on the heads."""

    def __init__(self, factor):
        self.factor = Setting(jnp.asarray(factor))

    def heads(self, value, at, memory):
        return value * self.factor[...], memory


class Shifted(Intervention):
    """Constant added to what the mixer returns."""

    def __init__(self, by):
        self.by = Setting(jnp.asarray(by))

    def mixed(self, value, at, memory):
        return value + self.by[...], memory


class Doubled(Intervention):
    def mixed(self, value, at, memory):
        return 2 * value, memory


class Trailing(Intervention):
    """Adds the sum over all tokens so far; it is told of them by its memory alone."""

    def init_memory(self, batch_size, max_length):
        return {"kept": jnp.zeros((batch_size, max_length, 8)), "passes": jnp.zeros((), jnp.int32)}

    def mixed(self, value, at, memory):
        kept = at.store(memory["kept"], value)
        sums = jnp.cumsum(kept, axis=1)
        places = jnp.arange(value.shape[1])[None] if at.order is None else at.order
        seen = jnp.take_along_axis(sums, jnp.broadcast_to(places, value.shape[:2])[..., None], axis=1)
        return value + 0.1 * seen, {"kept": kept, "passes": memory["passes"] + 1}


def run(model, ids, *, prompt=None, mask=None):
    """Logits of the call, or of a prefill over `prompt` tokens followed by steps; and the last decode state."""
    graph, weights = nnx.split(model)

    @jax.jit
    def compiled(weights, ids):
        model = nnx.merge(graph, weights)
        if prompt is None:
            return model(ids), None
        state = model.init_state(ids.shape[0], ids.shape[1])
        logits, state = model.prefill(ids[:, :prompt], state, mask=mask)
        rows = [logits]
        for index in range(prompt, ids.shape[1]):
            logits, state = model.step(ids[:, index], state)
            rows.append(logits[:, None])
        return jnp.concatenate(rows, axis=1), state

    return compiled(weights, ids)


# ---- What is refused


def test_refuses_methods_that_are_no_points():
    with pytest.raises(TypeError, match=r"Wrong.atention is no point: did you mean attention"):
        type("Wrong", (Intervention,), {"atention": lambda self, value, at, memory: (value, memory)})
    with pytest.raises(TypeError, match=r"Wrong.attention must take \(self, value, at, memory\)"):
        type("Wrong", (Intervention,), {"attention": lambda self, value: value})
    with pytest.raises(TypeError, match=r"Wrong.init_memory must take \(self, batch_size, max_length\)"):
        type("Wrong", (Intervention,), {"init_memory": lambda self: ()})


def test_attach_refuses_what_it_cannot_do(model):
    hybrid = language_model(("lightning_attention_2", "softmax_attention"))
    scores = type("Scores", (Intervention,), {"scores": lambda self, value, at, memory: (value, memory)})()
    with pytest.raises(ValueError, match="Scores acts at scores, which layer 0 does not have; it has stream, normed"):
        attach(hybrid, scores)
    attach(hybrid, scores, layers=[1])
    for layers in ([2], [-1], [True]):
        with pytest.raises(ValueError, match=r"layers must be among the 2 of the model, 0..1"):
            attach(model, Doubled(), layers=layers)
    with pytest.raises(ValueError, match=r"boolean array \(2,\), got shape \(3,\)"):
        attach(model, Doubled(), layers=jnp.ones(3, bool))
    with pytest.raises(ValueError, match=r"heads must be boolean \(H,\) or \(2, H\), got float32\[2\]"):
        attach(model, Scaled(0.0), heads=jnp.ones(2))
    with pytest.raises(ValueError, match="heads are given, but Doubled acts at mixed"):
        attach(model, Doubled(), heads=jnp.ones(2, bool))
    with pytest.raises(ValueError, match="Intervention acts at no point"):
        attach(model, Intervention())
    with pytest.raises(TypeError, match="must be instances of Intervention, got <function"):
        attach(model, lambda x: x)
    with pytest.raises(TypeError, match="model must be Editable, got Block"):
        attach(model.blocks.blocks[0], Doubled())


def test_refuses_what_an_intervention_may_not_return(model):
    def attached(act, **members):
        return attach(model, everywhere(act, **members))

    with pytest.raises(TypeError, match=r"Everywhere.stream must return a pair \(value, memory\), got"):
        attached(lambda point, value, at, memory: value)(tokens())
    with pytest.raises(
        ValueError, match=r"Everywhere.stream must keep the shape of its value: got float32\[2, 6\] for"
    ):
        attached(lambda point, value, at, memory: (value[..., 0], memory))(tokens())
    growing = attached(lambda point, value, at, memory: (value, (memory, memory)))
    with pytest.raises(ValueError, match="must keep the structure of its memory in decoding"):
        growing.prefill(tokens(), growing.init_state(2, LENGTH))


# ---- What is free


def test_a_model_without_interventions_is_the_same_program_as_one_without_points(model, monkeypatch):
    def programs(model):
        graph, weights = nnx.split(model)

        def decode(weights, ids):
            model = nnx.merge(graph, weights)
            _, state = model.prefill(ids[:, :4], model.init_state(2, LENGTH))
            return model(ids), model.step(ids[:, 4], state)

        return str(jax.make_jaxpr(decode)(weights, tokens()))

    hybrid = language_model(("lightning_attention_2", "softmax_attention"))
    edited = [attach(m, Doubled()) for m in (model, hybrid)]
    plain = [programs(m) for m in (model, hybrid)]
    assert [programs(detach(m)) for m in edited] == plain
    assert [programs(m) for m in edited] != plain
    for module in (points, block, dense_mixer, linear_mixer, softmax_core):
        monkeypatch.setattr(module, "visit", lambda module, edits, point, value, **about: value)
    assert [programs(m) for m in (model, hybrid)] == plain
    assert model.init_state(2, LENGTH).memories == ()


def test_attach_shares_the_arrays_and_detach_is_its_inverse(model):
    graph, state = nnx.split(model)
    edited = attach(attach(model, Scaled(0.5)), Doubled(), layers=[0])
    own = dict(nnx.to_flat_state(state))
    for other in (nnx.state(edited), nnx.state(detach(edited))):
        other = dict(nnx.to_flat_state(other))
        assert all(other[path].get_value() is variable.get_value() for path, variable in own.items())
    assert nnx.graphdef(model) == graph == nnx.graphdef(detach(edited)) == nnx.graphdef(detach(model))
    assert nnx.graphdef(edited) != graph
    intervention = Scaled(0.5)
    edited = attach(model, intervention)
    intervention.factor[...] = jnp.asarray(3.0)
    assert edited.interventions[0].intervention.factor[...] == 0.5


# ---- Where they act


@pytest.mark.parametrize("phase", ["call", "prefill", "step", "image"])
def test_every_point_is_visited_in_order(model, phase):
    visits = []

    def note(point, value, at, memory):
        shape = jax.tree.leaves(value)[0].shape
        visits.append((point, at.phase, shape))
        if point in ("scores", "attention"):
            assert at.q_idx.shape[-1] == value.shape[2] and at.k_idx.shape[-1] == value.shape[3]
            assert at.q.shape[1] == value.shape[2] and at.k.shape[1] == value.shape[3]
        return value, memory

    if phase == "image":
        vit = ViT((8, 8), 3, patch_size=4, features=8, depth=DEPTH, num_heads=HEADS, rngs=nnx.Rngs(0))
        # A mixer of images needs all tokens of its grid.
        there = [point for point in POINTS if point != "tokens"]
        jax.eval_shape(attach(vit, everywhere(note, points=there)), jnp.ones((2, 8, 8, 3)))
        n, m, logits, stream = 4, 4, (2, 3), (2, 2, 2, 8)
    else:
        edited, n = attach(model, everywhere(note)), 1 if phase == "step" else LENGTH
        state = edited.init_state(2, LENGTH + 1)
        calls = {"call": edited, "prefill": lambda ids: edited.prefill(ids, state)}
        calls["step"] = lambda ids: edited.step(ids[:, 0], state)
        jax.eval_shape(calls[phase], tokens())
        m = LENGTH if phase == "call" else LENGTH + 1
        logits, stream = (2, n, VOCABULARY), (2, n, 8)
    shapes = dict.fromkeys(LAYER_POINTS, stream) | {"qkv": (2, n, HEADS, 4), "heads": (2, n, HEADS, 4)}
    shapes |= {"scores": (2, HEADS, n, m), "attention": (2, HEADS, n, m)}
    phase = "call" if phase == "image" else phase
    layer = [p for p in LAYER_POINTS if p != "tokens" or stream == (2, n, 8)]
    assert visits == [(p, phase, shapes[p]) for p in layer] * DEPTH + [("logits", phase, logits)]


def test_edits_that_change_nothing_give_the_same_values(model):
    idle = everywhere(lambda point, value, at, memory: (value, memory))
    ids = tokens()
    for prompt in (None, 4):
        np.testing.assert_allclose(run(attach(model, idle), ids, prompt=prompt)[0], run(model, ids)[0], atol=1e-5)


def test_several_act_in_the_order_of_attachment(model):
    ids = tokens()
    first, second = (
        run(attach(model, *pair), ids)[0] for pair in ((Shifted(1.0), Doubled()), (Doubled(), Shifted(2.0)))
    )
    np.testing.assert_allclose(first, second, atol=1e-5)
    turned = run(attach(attach(model, Doubled()), Shifted(1.0)), ids)[0]
    assert not np.allclose(first, turned, atol=1e-2)


def test_edits_of_scores_cannot_unmask(model):
    class Forward(Intervention):
        def scores(self, value, at, memory):
            return value + jnp.where(jnp.arange(value.shape[3]) == value.shape[3] - 1, 1e4, 0), memory

    edited, ids = attach(model, Forward()), tokens()
    got, want = (run(m, ids)[0] for m in (edited, model))
    np.testing.assert_allclose(got[:, :-1], want[:, :-1], atol=1e-5)
    assert not np.allclose(got[:, -1], want[:, -1], atol=1e-3)


def test_edits_of_the_last_row_are_given_that_row_alone(monkeypatch):
    class Sharper(Intervention):
        def scores(self, value, at, memory):
            rows.append(value.shape[2])
            return value.at[:, :, -1:].multiply(3), memory

        def attention(self, value, at, memory):
            assert at.q.shape[1] == at.allowed.shape[2] == value.shape[2]
            return value.at[:, :, -1:].multiply(2), memory

    last = type("Last", (Sharper,), {"last_row": True})
    model, ids, rows = language_model(mixer_options={"softmax_attention": {"alibi": True}}), tokens(), []
    monkeypatch.setattr(softmax_core, "softmax_attention", fast := Counted(softmax_core.softmax_attention))

    def traced(model, **given):
        before, fast.calls = len(rows), 0
        logits = model(ids, **given)
        return logits, rows[before:], fast.calls

    everywhere, alone = attach(model, Sharper()), attach(model, last())
    packed = {"segment_ids": jnp.asarray([[0, 0, 1, 1, 1, 1]] * 2)}
    for given in ({}, packed):
        want, all_rows, calls = traced(everywhere, **given)
        assert (all_rows, calls) == ([LENGTH] * DEPTH, 0)
        got, one_row, calls = traced(alone, **given)
        assert (one_row, calls) == ([1] * DEPTH, DEPTH)
        np.testing.assert_allclose(got, want, atol=1e-5)
    assert not np.allclose(got, model(ids, **packed), atol=1e-3)
    got, mixed_rows, calls = traced(attach(attach(model, Sharper(), layers=[0]), last()))
    assert (mixed_rows, calls) == ([LENGTH, 1, 1], 1)
    np.testing.assert_allclose(got, attach(everywhere, Sharper(), layers=[0])(ids), atol=1e-5)


class Counted:
    """Counts how often a function is called."""

    def __init__(self, call):
        self.call, self.calls = call, 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        return self.call(*args, **kwargs)


# ---- Layers and heads


def test_a_mask_of_layers_or_heads_equals_the_choice_and_compiles_nothing_anew(model):
    ids, traces = tokens(), []

    @jax.jit
    def call(state, graph_of):
        traces.append(1)
        return nnx.merge(graph_of.value, state)(ids)

    def masked(**masks):
        graph, state = nnx.split(attach(model, Scaled(0.0), **masks))
        return call(state, Static(graph))

    by_mask = [masked(layers=jnp.arange(DEPTH) == layer) for layer in range(DEPTH)]
    assert len(traces) == 1
    swept = jax.vmap(lambda mask: attach(model, Scaled(0.0), layers=mask)(ids))(jnp.eye(DEPTH, dtype=bool))
    for layer in range(DEPTH):
        want = run(attach(model, Scaled(0.0), layers=[layer]), ids)[0]
        np.testing.assert_allclose(by_mask[layer], want, atol=1e-5)
        np.testing.assert_allclose(swept[layer], want, atol=1e-5)
    one = masked(heads=jnp.asarray([[False, True], [False, False]]))
    other = masked(layers=jnp.asarray([True, False]), heads=jnp.asarray([False, True]))
    np.testing.assert_allclose(one, other, atol=1e-6)
    assert not np.allclose(one, by_mask[0], atol=1e-3)


@jax.tree_util.register_static
class Static:
    """A graph as an argument of a compiled function."""

    def __init__(self, value):
        self.value = value

    def __eq__(self, other):
        return self.value == other.value

    def __hash__(self):
        return hash(self.value)


def test_what_an_intervention_is_given_can_be_trained_alone(model):
    ids = tokens()
    gradient = nnx.grad(lambda m: m(ids).sum(), argnums=nnx.DiffState(0, Setting))(attach(model, Scaled(1.0)))
    (only,) = jax.tree.leaves(gradient)
    assert only.shape == () and only != 0


# ---- Decoding


@pytest.mark.parametrize("mixer", ["softmax_attention", "lightning_attention_2"])
def test_prefill_and_steps_equal_the_whole(mixer):
    model, ids = language_model(mixer), tokens()
    edited = attach(model, Trailing(), Scaled(0.5), Trailing())
    whole = run(edited, ids)[0]
    decoded, state = run(edited, ids, prompt=3)
    np.testing.assert_allclose(decoded, whole, atol=1e-5)
    assert not np.allclose(whole, run(attach(model, Scaled(0.5)), ids)[0], atol=1e-3)
    before = edited.init_state(2, LENGTH).memories
    assert jax.tree.structure(before) == jax.tree.structure(state.memories)
    assert [m["passes"].tolist() for m in jax.tree.leaves(state.memories, is_leaf=lambda m: isinstance(m, dict))] == [
        LENGTH - 2
    ] * (2 * DEPTH)


def test_padding_is_not_remembered(model):
    edited, ids = attach(model, Trailing()), tokens(1)
    alone = run(edited, ids, prompt=4)[0]
    padded = jnp.concatenate([jnp.zeros((1, 2), ids.dtype), ids], axis=1)
    mask = (jnp.arange(6) >= 2)[None]
    np.testing.assert_allclose(run(edited, padded, prompt=6, mask=mask)[0][:, 2:], alone, atol=1e-5)


def test_generate_runs_under_interventions(model):
    class Always(Intervention):
        """Counts what it has seen, and decides on the token of that number."""

        def init_memory(self, batch_size, max_length):
            return jnp.zeros((), jnp.int32)

        def logits(self, value, at, memory):
            memory = memory + value.shape[1]
            return jnp.broadcast_to(10.0 * jax.nn.one_hot(memory, VOCABULARY), value.shape), memory

    out = generate(attach(model, Always()), tokens(), max_new_tokens=4, temperature=0)
    np.testing.assert_array_equal(out.tokens, [[6, 7, 8, 9]] * 2)


class Kept(Intervention):
    """After the blocks where it is attached: the `count` tokens with the largest norm, and the last one."""

    def __init__(self, count):
        self.count = count

    def tokens(self, value, at, memory):
        if at.phase == "step":
            return value, memory
        scores = jnp.linalg.norm(value.x, axis=-1).at[:, -1].set(jnp.inf)
        return value.take_highest(scores, self.count), memory


@pytest.mark.slow
@pytest.mark.parametrize("mixer", ["softmax_attention", "tnl"])
def test_tokens_are_left_out_of_later_blocks(mixer):
    """Equal to running the later block by hand on what is left; prefill with steps goes on from there."""
    model, ids = language_model(mixer), tokens()
    edited = attach(model, Kept(4), layers=[0])
    x, first, second = model.embed(ids) * model.embed_scale, *model.blocks.blocks
    x = first(x)
    scores = jnp.linalg.norm(x, axis=-1).at[:, -1].set(jnp.inf)
    index = jnp.sort(jnp.argsort(-scores, axis=1)[:, :4], axis=1)
    left = jnp.take_along_axis(x, index[..., None], 1)
    at = {"positions": index} if "positions" in second.mixer.accepts else {}
    want = model._logits(second(left, **at), None)
    np.testing.assert_allclose(edited(ids), want, atol=1e-5)
    logits, state = edited.prefill(ids, edited.init_state(2, LENGTH + 2))
    np.testing.assert_allclose(logits, want, atol=1e-5)
    assert [mixer.length.tolist() for mixer in state.mixers] == [[6, 6], [4, 4]]
    more = jnp.array([3, 5])
    step, state = edited.step(more, state)
    whole = first(model.embed(jnp.concatenate([ids, more[:, None]], 1)) * model.embed_scale)
    left = jnp.concatenate([left, whole[:, -1:]], 1)
    at = {"positions": jnp.pad(index, ((0, 0), (0, 1)), constant_values=LENGTH)} if at else {}
    np.testing.assert_allclose(step, model._logits(second(left, **at), None)[:, -1], atol=1e-5)


def test_tokens_of_images_are_left_out():
    vit = ViT((8, 8), 3, patch_size=2, features=8, depth=2, num_heads=2, pooling="cls", rngs=nnx.Rngs(0))
    images = jax.random.normal(jax.random.key(1), (2, 8, 8, 3))

    class First(Intervention):
        def tokens(self, value, at, memory):
            return value.take(jnp.broadcast_to(jnp.arange(5), (2, 5))), memory

    edited = attach(vit, First(), layers=[0])
    x = vit.stage[0].prefix(vit.stem(images))
    x = vit.blocks[1](vit.blocks[0](x + vit.stage[0].position(x))[:, :5])
    np.testing.assert_allclose(edited(images), vit.head(vit.norm(x)[:, 0]), atol=1e-5)
    assert edited.tokens(images).shape == (2, 5, 8)
    with pytest.raises(ValueError, match="there is no map"):
        edited.stages(images)


def test_what_tokens_cannot_do_is_refused():
    model = language_model()
    with pytest.raises(ValueError, match="give layers as indices"):
        attach(model, Kept(2), layers=np.array([True, False]))
    with pytest.raises(ValueError, match="not of pairs"):
        attach(model, Kept(2))(tokens(), mask=jnp.ones((1, 1, LENGTH, LENGTH), bool))

    class Grown(Intervention):
        def tokens(self, value, at, memory):
            return value.take(jnp.zeros((2, LENGTH + 1), int)), memory

    with pytest.raises(ValueError, match=r"Grown\.tokens must keep the shape"):
        attach(model, Grown())(tokens())
