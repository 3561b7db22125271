"""Properties that every token mixer has, whatever it mixes."""

import dataclasses
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import attnlab
from attnlab import Layout, Pattern, UnsupportedArgument
from attnlab.training.optimizer import decays
from tests.conformance.programs import programs, rounded
from tests.conformance.subjects import (
    BATCH,
    FEATURES,
    GRIDS,
    HEADS,
    ODD_GRIDS,
    OFTEN,
    Subject,
    at_home,
    close,
    decodes,
    finite,
    mixers,
    named,
    parameters,
    those,
)

# What follows from how a mixer is built, which patterns and layouts change little in: once for each.
its_structure = those(at_home)


@those()
def test_shape_and_dtype(subject: Subject):
    its = programs(subject)
    results = {
        jnp.float32: its.plain.y,
        jnp.bfloat16: its.half.y,
        jnp.float16: its.call(*rounded(its.arguments, jnp.float16)),
    }
    for dtype, y in results.items():
        assert y.shape == its.arguments[0].shape
        assert y.dtype == dtype, "the result has the dtype of the tokens"
        assert finite(y), dtype
    chosen = subject.abstract(dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in parameters(chosen).values()} == {jnp.dtype(jnp.float32)}
    graph, state = nnx.split(chosen)
    y = jax.eval_shape(lambda state, *a: nnx.merge(graph, state)(*a), state, *its.arguments)
    assert y.dtype == jnp.bfloat16, "unless `dtype` was given"
    stored = subject.abstract(param_dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in parameters(stored).values()} == {jnp.dtype(jnp.bfloat16)}


@those(everywhere=True)
def test_in_64_bits_too(subject: Subject):
    """The call and its gradient, traced alone, which costs no compilation."""
    its = programs(subject)
    params, rest = nnx.split_state(its.state, nnx.Param, ...)
    with jax.enable_x64(True):
        wide = tuple(a.astype(np.float64) for a in its.arguments)
        y, _, gradients = jax.eval_shape(its.traced, params, rest, wide)
    assert {y.dtype, *(g.dtype for g in gradients)} == {np.dtype(np.float64)}


@those()
def test_no_dtype_is_promoted_unasked(subject: Subject):
    """Under `jax_numpy_dtype_promotion="strict"`, traced alone; a decoder's prefill and step, too.

    A call asks for no leave to promote ranks either.
    """
    its = programs(subject)
    params, rest = nnx.split_state(its.state, nnx.Param, ...)
    half = rounded(its.arguments)
    with jax.numpy_dtype_promotion("strict"):
        with jax.numpy_rank_promotion("raise"):
            jax.eval_shape(its.traced, params, rest, half)
        if decodes(subject):

            def decode(state, x, *context):
                mixer = nnx.merge(its.graph, state)
                memory = mixer.init_state(BATCH, x.shape[1], **({"context": context[0]} if context else {}))
                _, memory = mixer.prefill(x[:, :-1], memory)
                return mixer.step(x[:, -1], memory)

            jax.eval_shape(decode, its.state, *half)


@those()
def test_bfloat16_is_near_float32(subject: Subject):
    its = programs(subject)
    want = its.pull(rounded(rounded(its.arguments), np.float32))
    close(its.half.y, want.y, 3e-2)


@those(at_home, often=lambda subject: subject.name in OFTEN)
def test_jit_equals_eager(subject: Subject):
    its = programs(subject)
    close(its.plain.y, its.module(*its.arguments))


@those()
def test_examples_are_independent(subject: Subject):
    """vmap over examples of a batch of one gives what the batch gives."""
    its = programs(subject)
    one = jax.jit(
        jax.vmap(
            lambda state, *a: its.eager(state, *(part[None] for part in a))[0], (None, 0, 0)[: 1 + len(its.arguments)]
        )
    )
    close(one(its.state, *its.arguments), its.plain.y)


@its_structure
def test_scan_over_layers(subject: Subject):
    """Depth is an array: layers of one structure, stacked and scanned, are their loop, whatever their places.

    Every other layer may have another structure (shifted windows), and so may the first.
    """
    its = programs(subject)
    built = [subject.build(seed=layer, layer=layer) for layer in range(4)]
    alike = [nnx.state(layer) for layer in built if nnx.graphdef(layer) == its.graph]
    assert len(alike) > 1, "what depends on the layer is no array: no two layers of four have the same structure"
    x, *context = its.arguments
    want = x
    for state in alike:
        want = want + its.pull((want, *context), state=state).y
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *alike)
    scan = jax.jit(
        lambda x, context, stacked: jax.lax.scan(
            lambda x, state: (x + its.eager(state, x, *context), None), x, stacked
        )[0]
    )
    close(scan(x, context, stacked), want)


@those()
def test_gradients(subject: Subject):
    """Of every parameter and of the tokens: finite and non-zero, and the same under rematerialisation."""
    its = programs(subject)
    gradients = named(its.plain.params) | {f"argument {i}": leaf for i, leaf in enumerate(its.plain.arguments)}
    for name, gradient in gradients.items():
        assert finite(gradient), name
        assert np.any(gradient != 0), f"{name} has no gradient"
    # Together, since some are only rounding about zero: a bias of keys moves all scores of a row alike.
    one, other = (
        np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(gradients)])
        for gradients in (its.rematerialised(), (its.plain.params, its.plain.arguments))
    )
    close(one, other)


@those()
def test_odd_sizes(subject: Subject):
    for grid in ODD_GRIDS[subject.layout]:
        x = subject.tokens(grid)
        graph, state = nnx.split(subject.build(grid))
        y = jax.jit(lambda state, *a, graph=graph: nnx.merge(graph, state)(*a))(state, *subject.arguments(x))
        assert y.shape == x.shape, grid
        assert finite(y), grid


@those()
def test_large_inputs_stay_finite(subject: Subject):
    its = programs(subject)
    assert finite(its.call(*(20 * a.astype(np.float16) for a in its.arguments))), "its own range ends at 65504"
    for dtype in (np.float32, jnp.bfloat16):
        large = tuple((100 * a).astype(dtype) for a in its.arguments)
        pulled = its.pull(large)
        for name, array in {"y": pulled.y, **named(pulled.arguments)}.items():
            assert finite(array), (name, dtype)


@its_structure
def test_save_and_restore(subject: Subject, tmp_path):
    its = programs(subject)
    other = subject.build(seed=4)
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
        checkpointer.save(tmp_path / "mixer", args=ocp.args.StandardSave(nnx.to_pure_dict(its.state)))
        target = nnx.to_pure_dict(nnx.state(other))
        restored = checkpointer.restore(tmp_path / "mixer", args=ocp.args.StandardRestore(target))
    state = nnx.state(other)
    nnx.replace_by_pure_dict(state, restored)
    np.testing.assert_array_equal(its.pull(its.arguments, state=state).y, its.plain.y)


@its_structure
def test_pickled_and_read_again_it_is_the_same(subject: Subject):
    module = programs(subject).module
    again = pickle.loads(pickle.dumps(module))
    assert nnx.graphdef(again) == nnx.graphdef(module)
    for name, leaf in parameters(module).items():
        np.testing.assert_array_equal(parameters(again)[name], leaf)


@its_structure
def test_numbers_of_numpy_are_numbers(subject: Subject):
    """Options and sizes as NumPy's scalars, and no examples at all."""
    options = {
        name: np.asarray(value)[()]
        for name, value in attnlab.get(subject.name).options.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    site = subject.site()
    sizes = {"features": np.int64(site.features), "num_heads": np.int32(site.num_heads)}
    if site.rotary is not None:
        sizes["rotary"] = np.float32(site.rotary)
    variant = attnlab.get(subject.name)
    site = dataclasses.replace(site, **sizes)
    mixer = nnx.eval_shape(lambda: variant.create(site, rngs=nnx.Rngs(0), **{**variant.options, **options}))
    graph, state = nnx.split(mixer)
    none = (jax.ShapeDtypeStruct((0, *a.shape[1:]), a.dtype) for a in subject.arguments(subject.tokens()))
    y = jax.eval_shape(lambda state, *a: nnx.merge(graph, state)(*a), state, *none)
    assert y.shape == (0, *subject.tokens().shape[1:])


@its_structure
def test_no_shared_references(subject: Subject):
    assert not nnx.find_duplicates(programs(subject).module)


@its_structure
def test_logical_axes_fit(subject: Subject):
    """Where a parameter names its axes, it names each of them, in the words of attnlab.nn.linear."""
    for path, variable in nnx.to_flat_state(nnx.state(programs(subject).module, nnx.Param)):
        axes = variable.get_metadata().get("logical_axes")
        if axes is not None:
            assert len(axes) == variable[...].ndim, path
            assert set(axes) <= {"embed", "heads", "mlp", "vocab", None}, path


@its_structure
def test_parameters_say_whether_they_decay(subject: Subject):
    """Weight decay is for kernels; what decays and is no kernel was decided to, and so was a table that does not."""
    for path, variable in nnx.to_flat_state(nnx.state(subject.abstract(), nnx.Param)):
        names, metadata = tuple(map(str, path)), variable.get_metadata()
        (leaf,) = jax.tree.leaves(variable)
        if decays(names, leaf.ndim, metadata) and names[-1] != "kernel":
            assert metadata.get("weight_decay") is True, f"{'/'.join(names)}: give the Param weight_decay=True or False"


@those()
def test_recording_is_free_and_faithful(subject: Subject):
    its = programs(subject)

    def recorded(state, *arguments):
        return nnx.capture(nnx.merge(its.graph, state), nnx.Intermediate)(*arguments)

    def program() -> str:
        return str(jax.make_jaxpr(its.eager)(its.state, *its.arguments))

    before = program()
    y, intermediates = jax.jit(recorded)(its.state, *its.arguments)
    close(y, its.plain.y, 1e-6)
    assert program() == before
    if "attention" in intermediates:
        (weights,) = intermediates["attention"]
        queries, keys = (int(np.prod(a.shape[1:-1])) for a in (its.arguments[0], its.arguments[-1]))
        assert weights.shape[0] == its.arguments[0].shape[0]
        assert weights.shape[2:] == (queries, keys)
        assert weights.dtype == jnp.float32
        assert finite(weights)
        of_half = jax.eval_shape(recorded, its.state, *rounded(its.arguments))[1]["attention"][0]
        assert of_half.dtype == jnp.float32


@those()
def test_refuses_what_it_does_not_take(subject: Subject):
    its = programs(subject)
    mixer, (x, *context) = its.module, its.arguments
    tokens = int(np.prod(x.shape[1:-1]))
    offers = {
        "key_mask": {"mask": np.ones((x.shape[0], tokens), bool)},
        "mask": {"mask": np.ones((1, 1, tokens, tokens), bool)},
        "segment_ids": {"segment_ids": np.zeros((x.shape[0], tokens), np.int32)},
        "positions": {"positions": np.broadcast_to(np.arange(tokens), (x.shape[0], tokens))},
    }
    for argument, offer in offers.items():
        if argument not in mixer.accepts:
            with pytest.raises(UnsupportedArgument, match=argument):
                mixer(x, *context, **offer)
    if not mixer.patterns & {Pattern.CROSS, Pattern.CAUSAL_CROSS}:
        with pytest.raises(UnsupportedArgument, match="context"):
            mixer(x, x)
    if subject.cross:
        with pytest.raises(ValueError, match="context is missing"):
            mixer(x)
    with pytest.raises(ValueError, match="rank"):
        mixer(x[0], *context)
    with pytest.raises(ValueError, match="channels"):
        mixer(x[..., :-1], *context)
    with pytest.raises(ValueError, match="mask"):
        mixer(x, *context, mask=np.ones((tokens,), bool))
    for argument in mixer.accepts & offers.keys():
        name, value = next(iter(offers[argument].items()))
        wrong = "boolean" if name == "mask" else "integers"
        with pytest.raises(ValueError, match=f"{name} must be {wrong}"):
            mixer(x, *context, **{name: value.astype(np.float32)})


@pytest.mark.parametrize("variant", attnlab.variants(), ids=lambda v: v.name)
def test_its_line_in_the_table_reads_like_the_others(variant):
    assert variant.target.__doc__
    assert 20 <= len(variant.summary) <= 110
    assert not variant.summary.endswith(".")
    assert variant.paper.year >= 2014
    assert variant.cost.time.startswith("O(")
    decodes = Pattern.CAUSAL_SELF in variant.patterns
    assert not decodes or variant.cost.state, "a mixer that decodes says how large its state is"


@pytest.mark.parametrize("variant", attnlab.variants(kind=attnlab.Kind.MIXER), ids=lambda v: v.name)
def test_refuses_other_sites(variant):
    for pattern in set(Pattern) - variant.patterns:
        site = attnlab.Site(
            FEATURES,
            HEADS,
            layout=min(variant.layouts),
            causal="causal" in pattern,
            grid=GRIDS[min(variant.layouts)],
            context_features=FEATURES if "cross" in pattern else None,
        )
        with pytest.raises(UnsupportedArgument, match=str(pattern)):
            variant.create(site, rngs=nnx.Rngs(0))
    for layout in set(Layout) - variant.layouts:
        subject = Subject(variant.name, min(variant.patterns), layout)
        with pytest.raises(UnsupportedArgument, match=str(layout)):
            subject.build()
    with pytest.raises(TypeError, match="no option 'no_such_option'"):
        next(subject for subject in mixers() if subject.name == variant.name).build(no_such_option=1)


@those(lambda subject: not subject.causal and subject.layout is Layout.SEQUENCE)
def test_permutation(subject: Subject):
    """A non-causal mixer that says that it takes tokens as a set does, and one that says it does not does not."""
    its = programs(subject)
    x, *context = its.arguments
    order = np.random.default_rng(0).permutation(x.shape[1])
    permuted, want = its.pull((x[:, order], *context)).y, its.plain.y[:, order]
    if its.module.permutation_equivariant:
        close(permuted, want)
    else:
        assert not np.allclose(permuted, want, rtol=1e-3, atol=1e-5)
