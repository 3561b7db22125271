import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import attnlab.models.generate as generate_module
from attnlab import UnsupportedArgument
from attnlab.contract import View
from attnlab.models.generate import generate, sample_token
from attnlab.models.language_model import LanguageModel
from attnlab.nn.masking import SameLabel
from pallas_kernels.masks import Causal

VOCABULARY = 23
HYBRID = ("lightning_attention_2", "lightning_attention_2", "lightning_attention_2", "softmax_attention")


def build(mixer="softmax_attention", depth=2, **options) -> LanguageModel:
    return LanguageModel(VOCABULARY, features=16, depth=depth, num_heads=2, mixer=mixer, rngs=nnx.Rngs(0), **options)


def tokens(batch=2, length=9, seed=0) -> jax.Array:
    return jax.random.randint(jax.random.key(seed), (batch, length), 0, VOCABULARY)


@pytest.mark.parametrize(
    "options",
    [
        {"mixer": HYBRID, "depth": 4},
        *(pytest.param(o, marks=pytest.mark.slow) for o in ({}, {"position": "none"})),
        {"position": "learned", "max_length": 16},
    ],
)
def test_decoding_equals_the_call(options):
    model, ids = build(**options), tokens()
    whole = nnx.jit(lambda model: model(ids))(model)
    assert whole.shape == (2, 9, VOCABULARY)
    assert whole.dtype == jnp.float32
    logits, state = nnx.jit(lambda model, state: model.prefill(ids[:, :5], state))(model, model.init_state(2, 9))
    np.testing.assert_allclose(logits, whole[:, :5], atol=1e-5)
    step = nnx.jit(lambda model, ids, state: model.step(ids, state))
    for i in range(5, 9):
        logits, state = step(model, ids[:, i], state)
        np.testing.assert_allclose(logits, whole[:, i], atol=1e-5)
    assert state.position.tolist() == [9, 9]


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"position": "learned", "max_length": 16}])
def test_spans_are_unlocked_and_positions_are_given(options):
    """Tokens 2..4 see each other both ways and share a position, in the call and in prefill with steps after it."""
    model, ids = build(**options), tokens(1)
    labels = np.array([[-1, -1, 0, 0, 0, -1, -1, -1, -1]])
    at = np.array([[0, 1, 2, 2, 2, 3, 4, 5, 6]])
    view = View(rule=Causal() | SameLabel(), q_labels=labels)
    whole = model(ids, mask=view, positions=at)
    assert not np.allclose(whole[:, 2], model(ids, positions=at)[:, 2], atol=1e-3)
    first = View(rule=view.rule, q_labels=labels[:, :5])
    logits, state = model.prefill(ids[:, :5], model.init_state(1, 9), mask=first, positions=at[:, :5])
    np.testing.assert_allclose(logits, whole[:, :5], atol=1e-5)
    assert (state.length.tolist(), state.position.tolist()) == ([5], [3])
    for i in range(5, 9):
        logits, state = model.step(ids[:, i], state)
        np.testing.assert_allclose(logits, whole[:, i], atol=1e-5)
    with pytest.raises(UnsupportedArgument, match="does not take q_labels of a View"):
        build("lightning_attention_2")(ids, mask=view)


def test_embeddings_take_the_place_of_tokens():
    model, ids = build(position="learned", max_length=16, embed_scale=1.0), tokens()
    rows, whole = model.embed(ids), model(ids)
    np.testing.assert_array_equal(model(embeddings=rows), whole)
    logits, state = model.prefill(None, model.init_state(2, 9), embeddings=rows[:, :8])
    np.testing.assert_allclose(logits, whole[:, :8], atol=1e-5)
    np.testing.assert_allclose(model.step(None, state, embeddings=rows[:, 8])[0], whole[:, 8], atol=1e-5)
    for given in ({}, {"tokens": ids, "embeddings": rows}):
        with pytest.raises(ValueError, match="either tokens or embeddings"):
            model(**given)
    with pytest.raises(ValueError, match="must have 16 channels"):
        model(embeddings=rows[..., :4])


def test_what_is_not_causal_sees_both_ways_and_does_not_decode():
    model, ids = build(causal=False), tokens()
    mask = np.arange(9) < np.array([[9], [6]])
    whole = model(ids, mask=mask)
    assert not np.allclose(whole[0, 0], model(ids.at[0, 8].set((ids[0, 8] + 1) % VOCABULARY), mask=mask)[0, 0])
    np.testing.assert_allclose(whole[1:, :6], model(ids[1:, :6]), atol=1e-5)
    with pytest.raises(UnsupportedArgument, match="does not decode"):
        model.init_state(1, 4)


def test_pieces_are_left_out_and_layers_differ():
    without = {"mixer": [0], "mlp": [1], "norm2": [0]}
    options = {"mlp": ("relu", "gelu_tanh"), "norm": "layer", "norm_bias": False, "norm_eps": 1e-3}
    model, ids = build(without=without, final_norm=False, mlp_features=24, embed_scale=1.0, **options), tokens()
    first, second = model.blocks.blocks
    assert first.mixer is None and first.norm1 is None and first.norm2 is None
    assert second.mlp is None and second.norm2 is None and second.norm1.bias is None and second.norm1.eps == 1e-3
    x = model.embed(ids)
    x = x + jax.nn.relu(x @ first.mlp.fc1.kernel[...] + first.mlp.fc1.bias[...]) @ first.mlp.fc2.kernel[...]
    x = x + first.mlp.fc2.bias[...]
    x = x + second.mixer(second.norm1(x))
    np.testing.assert_allclose(model(ids), x @ model.embedding[...].T, atol=1e-5)
    _, state = model.prefill(ids[:, :5], model.init_state(2, 9))
    np.testing.assert_allclose(model.step(ids[:, 5], state)[0], model(ids)[:, 5], atol=1e-5)
    assert state.mixers[0].length.tolist() == [5, 5]


def test_layers_know_where_they_stand():
    model = build(HYBRID, depth=8)
    kinds = [type(block.mixer).__name__ for block in model.blocks.blocks]
    assert kinds == (["LightningAttention"] * 3 + ["SoftmaxAttention"]) * 2
    slopes = [block.mixer.slopes[0] for block in model.blocks.blocks if hasattr(block.mixer, "slopes")]
    assert slopes == sorted(slopes, reverse=True), "later layers forget less"


def test_rotary_positions_are_the_default_of_those_mixers_that_have_them():
    ids = tokens()
    swapped = ids[:, jnp.asarray([1, 0, *range(2, 9)])]
    last = [build(position=position)(part)[:, -1] for position in ("rotary", "none") for part in (ids, swapped)]
    assert not np.allclose(last[0], last[1], atol=1e-5), "order is seen"
    own = build(mixer_options={"softmax_attention": {"rotary": None}})
    np.testing.assert_array_equal(own(ids), build(position="none")(ids))


def test_packed_documents_equal_separate_ones():
    model = build(HYBRID, depth=4, position="learned", max_length=16)
    first, second = tokens(1, 5, seed=1), tokens(1, 4, seed=2)
    packed = model(
        jnp.concatenate([first, second], axis=1),
        segment_ids=jnp.asarray([[1] * 5 + [2] * 4]),
        positions=jnp.asarray([[*range(5), *range(4)]]),
    )
    np.testing.assert_allclose(packed[:, :5], model(first), atol=1e-5)
    np.testing.assert_allclose(packed[:, 5:], model(second), atol=1e-5)


def test_remat_changes_nothing():
    ids = tokens()

    def gradient(remat):
        model = build(remat=remat)
        return nnx.grad(lambda model: jnp.sum(jnp.sin(model(ids))))(model)

    for one, other in zip(jax.tree.leaves(gradient(False)), jax.tree.leaves(gradient(True)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_dropout_acts_in_training_alone():
    model, ids = build(dropout=0.5), tokens()
    np.testing.assert_array_equal(model(ids), model(ids))
    assert not np.allclose(model(ids, deterministic=False), model(ids, deterministic=False))


def test_bfloat16_compute_keeps_float32_parameters_and_logits():
    model = build(dtype=jnp.bfloat16)
    assert model(tokens()).dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))} == {jnp.dtype(jnp.float32)}
    reference = build()(tokens())
    assert float(jnp.abs(model(tokens()) - reference).max()) < 0.05


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"mixer": "softmax_atention"}, KeyError, "did you mean softmax_attention"),
        ({"mixer": ("softmax_attention",) * 3}, ValueError, "does not divide a depth of 2"),
        ({"mixer": "agent_attention"}, UnsupportedArgument, "laid out as sequence"),
        ({"mixer_options": {"hedgehog": {}}}, ValueError, "hedgehog is not among the mixers"),
        ({"mixer_options": {"softmax_attention": {"num_kv_head": 1}}}, TypeError, "did you mean num_kv_heads"),
        ({"norm": "batch"}, ValueError, "norm must be one of"),
        ({"mlp": "tanh"}, ValueError, "mlp must be one of"),
        ({"mlp": ("gelu",) * 3}, ValueError, "mlp: a pattern of 3 mlps does not divide a depth of 2"),
        ({"norm_bias": False}, ValueError, "norm_bias is for norm='layer', got False with 'rms'"),
        ({"without": {"mlp": [2]}}, ValueError, "layers below 2 for mixer, mlp, norm1, norm2, got mlp"),
        ({"without": {"attention": [0]}}, ValueError, "got attention"),
        ({"order": "middle"}, ValueError, "order must be"),
        ({"position": "absolute"}, ValueError, "position must be one of"),
        ({"position": "learned"}, ValueError, "max_length goes with"),
        ({"max_length": 4}, ValueError, "max_length goes with"),
    ],
)
def test_refusals_at_construction(options, error, message):
    with pytest.raises(error, match=message):
        build(**options)


def test_refusals_at_the_call():
    model = build(position="learned", max_length=8)
    with pytest.raises(ValueError, match="9 tokens are beyond the position table of 8"):
        model(tokens())
    for length in (9, None):
        with pytest.raises(ValueError, match=f"at most the 8 rows of the position table, got {length}"):
            model.init_state(1, length)
    with pytest.raises(UnsupportedArgument, match="do not depend on them"):
        build("lightning_attention_2")(tokens(), positions=jnp.arange(9)[None])


def test_what_the_tables_lack_is_refused_and_nan_where_it_is_traced():
    model = build(position="learned", max_length=8)
    ids = tokens(1, 3)
    with pytest.raises(ValueError, match=r"positions must be in 0\.\.7, got 0 to 8"):
        model(ids, positions=np.array([[0, 1, 8]]))
    for wrong in (VOCABULARY, -1, 2**40):
        with pytest.raises(ValueError, match="token ids must"):
            model(np.array([[1, 2, wrong]]))
    graph, state = nnx.split(model)
    call = jax.jit(lambda state, ids, at: nnx.merge(graph, state)(ids, positions=at))
    at = jnp.arange(3)[None]
    assert bool(jnp.isfinite(call(state, ids, at)).all())
    for wrong in (call(state, ids.at[0, 2].set(VOCABULARY), at), call(state, ids, at.at[0, 2].set(-1))):
        assert bool(jnp.isnan(wrong[:, 2]).all())


OTHERS = [pytest.param(mixer, marks=pytest.mark.slow) for mixer in ("lightning_attention_2", "sqa", "lssar")]


@pytest.mark.parametrize("mixer", ["softmax_attention", "lightnet", *OTHERS])
def test_greedy_generation_takes_the_likeliest_token_each_time(mixer):
    model, prompt = build(mixer), tokens(2, 4)
    result = generate(model, prompt, max_new_tokens=5, temperature=0)
    call = nnx.jit(lambda model, ids: model(ids))
    ids = jnp.pad(prompt, ((0, 0), (0, 5)))  # what comes later changes nothing
    for place in range(4, 9):
        ids = ids.at[:, place].set(jnp.argmax(call(model, ids)[:, place - 1], axis=-1))
    np.testing.assert_array_equal(result.tokens, ids[:, 4:])
    assert result.lengths.tolist() == [5, 5]


@pytest.mark.parametrize("mixer", ["softmax_attention", "lightning_attention_2"])
def test_prompts_of_unequal_length_share_a_batch(mixer):
    model, prompt = build(mixer, position="learned", max_length=16), tokens(2, 6)
    mask = jnp.asarray([[False, False, True, True, True, True], [True] * 6])
    together = generate(model, prompt, max_new_tokens=5, temperature=0, prompt_mask=mask)
    alone = generate(model, prompt[:1, 2:], max_new_tokens=5, temperature=0)
    np.testing.assert_array_equal(together.tokens[0], alone.tokens[0])


def test_generation_compiles_once_for_all_options_and_like_lengths():
    model, key = build(), jax.random.key(3)
    programs = generate_module._generate._cache_size

    def run(length, count, **options):
        return generate(model, tokens(2, length), max_new_tokens=count, key=key, **options)

    before = programs()
    for length, count, options in ((9, 6, {}), (11, 5, {"temperature": 0}), (15, 8, {"temperature": 0.7})):
        assert run(length, count, **options).tokens.shape == (2, count)
    assert programs() == before + 1
    for options in ({"top_p": 0.9}, {"top_k": 3}, {"top_k": 5, "top_p": 0.5, "temperature": 2.0}):
        run(10, 7, **options)
    assert programs() == before + 2
    np.testing.assert_array_equal(run(9, 8).tokens[:, :6], run(9, 6).tokens)
    with pytest.raises(ValueError, match=r"9 \+ 8 tokens are beyond the position table of 16 rows"):
        generate(build(position="learned", max_length=16), tokens(1, 9), max_new_tokens=8, temperature=0)


@pytest.mark.slow
def test_generation_under_strict_promotion_of_dtypes():
    model, options = build(HYBRID, depth=4), {"max_new_tokens": 3, "temperature": 0}
    want = generate(model, tokens(), **options).tokens
    with jax.numpy_dtype_promotion("strict"):
        np.testing.assert_array_equal(generate(model, tokens(), **options).tokens, want)


def test_a_model_can_be_pickled():
    model = build(HYBRID, depth=4)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(model))(tokens()), model(tokens()))


def test_stop_tokens_end_a_sequence():
    model, prompt = build(), tokens(2, 4)
    free = generate(model, prompt, max_new_tokens=6, temperature=0).tokens
    stop = int(free[0, 2])
    first = [row.index(stop) + 1 if stop in row else 6 for row in free.tolist()]
    result = generate(model, prompt, max_new_tokens=6, temperature=0, stop_tokens=(stop,), pad_token=1)
    assert result.lengths.tolist() == first
    for row, want, length in zip(result.tokens, free, first, strict=True):
        np.testing.assert_array_equal(row[:length], want[:length])
        assert (row[length:] == 1).all()


def test_memory_of_linear_mixers_does_not_depend_on_the_length():
    model = build("lightning_attention_2")
    sizes = {sum(leaf.size for leaf in jax.tree.leaves(model.init_state(1, length))) for length in (8, 8000)}
    assert len(sizes) == 1


def test_sampling_follows_the_distribution():
    logits = jnp.log(jnp.asarray([[0.5, 0.3, 0.15, 0.05]]))

    def share(**options):
        draw = jax.vmap(lambda key: sample_token(key, logits, **options)[0])
        return np.bincount(draw(jax.random.split(jax.random.key(0), 4000)), minlength=4) / 4000

    np.testing.assert_allclose(share(), [0.5, 0.3, 0.15, 0.05], atol=0.03)
    np.testing.assert_allclose(share(top_k=2), [0.625, 0.375, 0, 0], atol=0.03)
    np.testing.assert_allclose(share(top_p=0.79), [0.625, 0.375, 0, 0], atol=0.03)
    np.testing.assert_allclose(share(top_p=0.01), [1, 0, 0, 0])
    squared = np.asarray([0.25, 0.09, 0.0225, 0.0025])
    np.testing.assert_allclose(share(temperature=0.5), squared / squared.sum(), atol=0.03)
    np.testing.assert_allclose(share(temperature=0), [1, 0, 0, 0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"temperature": -1.0}, "temperature must not be negative"),
        ({"key": None}, "key is needed"),
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"top_p": 1.5}, "top_p must be in"),
        ({"stop_tokens": (VOCABULARY,)}, "stop_tokens"),
        ({"prompt": np.full((1, 3), VOCABULARY)}, "the vocabulary is 0..22"),
        ({"prompt": np.zeros((1, 0), int)}, "prompt must be integers"),
        ({"prompt_mask": np.array([[True, True, False]])}, "pad shorter prompts on the left"),
        ({"prompt_mask": np.ones((1, 2), bool)}, "the prompt's shape"),
        ({"prompt_mask": np.zeros((1, 3), np.float32)}, "prompt_mask must be boolean"),
    ],
)
def test_generation_refuses(arguments, message):
    arguments = {"prompt": np.zeros((1, 3), int), "max_new_tokens": 2, "key": jax.random.key(0)} | arguments
    with pytest.raises(ValueError, match=message):
        generate(build(), arguments.pop("prompt"), **arguments)
