"""Properties that every token mixer has, whatever it mixes."""

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import attnlab
from attnlab import Layout, Pattern, UnsupportedArgument
from tests.conformance.subjects import FEATURES, GRIDS, HEADS, ODD_GRIDS, Subject, close, mixers, parameters

every_mixer = pytest.mark.parametrize("subject", mixers(), ids=str)


def scalar(mixer, arguments):
    y = mixer(*arguments)
    weights = jax.random.normal(jax.random.key(9), y.shape)
    return jnp.sum(y.astype(jnp.float32) * weights)


@every_mixer
def test_shape_and_dtype(subject: Subject):
    x = subject.tokens()
    mixer = subject.build()
    assert mixer(*subject.arguments(x)).shape == x.shape
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
        y = mixer(*subject.arguments(x.astype(dtype)))
        assert y.dtype == dtype, "the result has the dtype of the tokens"
        assert jnp.isfinite(y).all()
    chosen = subject.build(dtype=jnp.bfloat16)
    assert chosen(*subject.arguments(x)).dtype == jnp.bfloat16, "unless `dtype` was given"
    assert {leaf.dtype for leaf in parameters(chosen).values()} == {jnp.dtype(jnp.float32)}
    stored = subject.build(param_dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in parameters(stored).values()} == {jnp.dtype(jnp.bfloat16)}


@every_mixer
def test_bfloat16_is_near_float32(subject: Subject):
    mixer, x = subject.build(), subject.tokens()
    rounded = x.astype(jnp.bfloat16)
    want = mixer(*subject.arguments(rounded.astype(jnp.float32)))
    got = mixer(*(a.astype(jnp.bfloat16) for a in subject.arguments(rounded.astype(jnp.float32))))
    close(got, want, 3e-2)


@every_mixer
def test_jit_equals_eager(subject: Subject):
    mixer, x = subject.build(), subject.tokens()
    close(nnx.jit(lambda m, *a: m(*a))(mixer, *subject.arguments(x)), mixer(*subject.arguments(x)))


@every_mixer
def test_examples_are_independent(subject: Subject):
    """vmap over examples, and a batch of one, give what the batch gives."""
    graph, state = nnx.split(subject.build())
    arguments = subject.arguments(subject.tokens())
    whole = nnx.merge(graph, state)(*arguments)
    one = jax.vmap(lambda *a: nnx.merge(graph, state)(*(part[None] for part in a))[0])(*arguments)
    close(one, whole)


@every_mixer
def test_scan_over_layers(subject: Subject):
    layers = [subject.build(seed=seed) for seed in range(3)]
    graph = nnx.graphdef(layers[0])
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(nnx.state(layer) for layer in layers))
    x, *context = subject.arguments(subject.tokens())
    want = x
    for layer in layers:
        want = want + layer(want, *context)
    got, _ = jax.lax.scan(lambda x, state: (x + nnx.merge(graph, state)(x, *context), None), x, stacked)
    close(got, want)


@every_mixer
def test_gradients(subject: Subject):
    """Of every parameter and of the tokens: finite and non-zero, and the same under rematerialisation."""
    graph, params, rest = nnx.split(subject.build(), nnx.Param, ...)
    arguments = subject.arguments(subject.tokens())

    def loss(params, arguments):
        return scalar(nnx.merge(graph, params, rest), arguments)

    of_params, of_arguments = jax.jit(jax.grad(loss, (0, 1)))(params, arguments)
    named = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(of_params)[0]} | {
        f"argument {i}": leaf for i, leaf in enumerate(of_arguments)
    }
    for name, gradient in named.items():
        assert jnp.isfinite(gradient).all(), name
        assert jnp.any(gradient != 0), f"{name} has no gradient"
    again = jax.jit(jax.grad(jax.checkpoint(loss), (0, 1)))(params, arguments)
    for one, other in zip(jax.tree.leaves((of_params, of_arguments)), jax.tree.leaves(again), strict=True):
        close(other, one)


@every_mixer
def test_odd_sizes(subject: Subject):
    for grid in ODD_GRIDS[subject.layout]:
        x = subject.tokens(grid)
        y = subject.build(grid)(*subject.arguments(x))
        assert y.shape == x.shape, grid
        assert jnp.isfinite(y).all(), grid


@every_mixer
def test_large_inputs_stay_finite(subject: Subject):
    mixer = subject.build()
    for dtype in (jnp.float32, jnp.bfloat16):
        x = 100 * subject.tokens().astype(dtype)
        y, vjp = jax.vjp(mixer, *subject.arguments(x))
        assert jnp.isfinite(y).all()
        assert all(jnp.isfinite(gradient).all() for gradient in vjp(jnp.ones_like(y)))


@every_mixer
def test_save_and_restore(subject: Subject, tmp_path):
    mixer, other, x = subject.build(seed=3), subject.build(seed=4), subject.tokens()
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "mixer", nnx.to_pure_dict(nnx.state(mixer)))
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "mixer", nnx.to_pure_dict(nnx.state(other)))
    state = nnx.state(other)
    nnx.replace_by_pure_dict(state, restored)
    nnx.update(other, state)
    np.testing.assert_array_equal(other(*subject.arguments(x)), mixer(*subject.arguments(x)))


@every_mixer
def test_no_shared_references(subject: Subject):
    assert not nnx.find_duplicates(subject.build())


@every_mixer
def test_logical_axes_fit(subject: Subject):
    """Where a parameter names its axes, it names each of them, in the words of attnlab.nn.linear."""
    for path, variable in nnx.to_flat_state(nnx.state(subject.build(), nnx.Param)):
        axes = variable.get_metadata().get("logical_axes")
        if axes is not None:
            assert len(axes) == variable[...].ndim, path
            assert set(axes) <= {"embed", "heads", "mlp", "vocab", None}, path


@every_mixer
def test_recording_is_free_and_faithful(subject: Subject):
    mixer, arguments = subject.build(), subject.arguments(subject.tokens())
    before = str(jax.make_jaxpr(lambda *a: mixer(*a))(*arguments))
    y, intermediates = nnx.capture(mixer, nnx.Intermediate)(*arguments)
    np.testing.assert_array_equal(y, mixer(*arguments))
    assert str(jax.make_jaxpr(lambda *a: mixer(*a))(*arguments)) == before
    if "attention" in intermediates:
        rounded = tuple(argument.astype(jnp.bfloat16) for argument in arguments)
        nnx.capture(mixer, nnx.Intermediate)(*rounded)[1]["attention"][0].block_until_ready()
        weights = intermediates["attention"][0]
        queries, keys = (int(np.prod(a.shape[1:-1])) for a in (arguments[0], arguments[-1]))
        assert weights.shape[0] == arguments[0].shape[0]
        assert weights.shape[2:] == (queries, keys)
        assert weights.dtype == jnp.float32
        assert jnp.isfinite(weights).all()


@every_mixer
def test_refuses_what_it_does_not_take(subject: Subject):
    mixer, (x, *context) = subject.build(), subject.arguments(subject.tokens())
    tokens = int(np.prod(x.shape[1:-1]))
    offers = {
        "key_mask": {"mask": jnp.ones((x.shape[0], tokens), bool)},
        "mask": {"mask": jnp.ones((1, 1, tokens, tokens), bool)},
        "segment_ids": {"segment_ids": jnp.zeros((x.shape[0], tokens), jnp.int32)},
        "positions": {"positions": jnp.broadcast_to(jnp.arange(tokens), (x.shape[0], tokens))},
    }
    for argument, offer in offers.items():
        if argument not in mixer.accepts:
            with pytest.raises(UnsupportedArgument, match=argument):
                mixer(x, *context, **offer)
    if not mixer.patterns & {Pattern.CROSS, Pattern.CAUSAL_CROSS}:
        with pytest.raises(UnsupportedArgument, match="context"):
            mixer(x, x)
    with pytest.raises(ValueError, match="rank"):
        mixer(x[0], *context)
    with pytest.raises(ValueError, match="channels"):
        mixer(x[..., :-1], *context)
    with pytest.raises(ValueError, match="mask"):
        mixer(x, *context, mask=jnp.ones((tokens,), bool))


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


@pytest.mark.parametrize("subject", [s for s in mixers() if not s.causal and s.layout is Layout.SEQUENCE], ids=str)
def test_permutation(subject: Subject):
    """A non-causal mixer that says that it takes tokens as a set does, and one that says it does not does not."""
    mixer, (x, *context) = subject.build(), subject.arguments(subject.tokens())
    order = np.random.default_rng(0).permutation(x.shape[1])
    permuted, want = mixer(x[:, order], *context), mixer(x, *context)[:, order]
    if mixer.permutation_equivariant:
        close(permuted, want)
    else:
        assert not np.allclose(permuted, want, rtol=1e-3, atol=1e-5)
