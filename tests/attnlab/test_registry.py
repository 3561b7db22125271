import types

import jax.numpy as jnp
import pytest
from flax import nnx

import attnlab
from attnlab import Cost, Example, Kind, Layout, Paper, Pattern, Source, registry

FACTS = {
    "paper": Paper("On Doubling", "Doe et al.", 2020),
    "source": Source.THIRD_PARTY,
    "cost": Cost(time="O(N)", memory="O(1)"),
    "summary": "twice the tokens",
}


@pytest.fixture(autouse=True)
def table(monkeypatch):
    """What a test enters is gone after it."""
    attnlab.names()
    monkeypatch.setattr(registry, "_variants", dict(registry._variants))


def double(x):
    """Twice."""
    return 2 * x


def example() -> Example:
    return Example(double, (jnp.ones((2, 3)),))


def test_a_function_is_registered():
    assert registry.register("doubling", kind=Kind.FUNCTION, small=example, **FACTS)(double) is double
    variant = attnlab.get("doubling")
    assert variant.target is double and variant.kind is Kind.FUNCTION and variant.source == "third-party code"
    made = variant.example()
    assert (made.call(*made.args) == 2).all()
    with pytest.raises(TypeError, match="has an example and no options"):
        _ = variant.options
    with pytest.raises(TypeError, match="is a function, not a class"):
        _ = variant.cls
    with pytest.raises(TypeError, match="only mixers and poolings"):
        attnlab.create("doubling", attnlab.Site(4, 1), rngs=nnx.Rngs(0))


def test_the_kind_of_mixers_and_poolings_follows():
    @registry.register("doubling.mixer", small={"dtype": None}, **FACTS)
    class Mixer(attnlab.TokenMixer):
        pass

    @registry.register("doubling.pool", **FACTS)
    class Pool(attnlab.Pooling):
        pass

    assert attnlab.get("doubling.mixer").kind is Kind.MIXER and attnlab.get("doubling.mixer").cls is Mixer
    assert attnlab.get("doubling.pool").kind is Kind.POOLING and attnlab.get("doubling.pool").cls is Pool
    assert attnlab.get("doubling.mixer").options == {"dtype": None} and attnlab.get("doubling.pool").options == {}
    with pytest.raises(TypeError, match="has options and no example"):
        attnlab.get("doubling.pool").example()


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("tnl", {"kind": Kind.FUNCTION, "small": example}, "'tnl' is taken by attnlab.attention.linear.tnl"),
        ("Doubling", {"kind": Kind.FUNCTION, "small": example}, "lower case"),
        ("doubling.a.b", {"kind": Kind.FUNCTION, "small": example}, "slug.word"),
        ("doubling", {}, "say which kind"),
        ("doubling", {"kind": Kind.FUNCTION}, "a function that makes an Example"),
        ("doubling", {"kind": Kind.OBJECTIVE, "small": {"features": 3}}, "a function that makes an Example"),
        ("doubling", {"kind": Kind.BACKBONE}, "the options that build it small"),
        ("doubling", {"kind": Kind.TASK, "small": example}, "the options that build it small"),
    ],
)
def test_refusals_of_registration(name, given, message):
    with pytest.raises(ValueError, match=message):
        registry.register(name, **given, **FACTS)(double)
    assert "doubling" not in attnlab.names()


@pytest.mark.parametrize("field", ["batched", "differentiable"])
@pytest.mark.parametrize("argument", [1, "mask"])
def test_an_example_names_its_own_arguments(field, argument):
    with pytest.raises(ValueError, match=f"{field} names the argument {argument!r}"):
        Example(double, (jnp.ones(3),), {"weight": jnp.ones(3)}, **{field: (0, "weight", argument)})


@pytest.mark.parametrize(
    ("module", "family"),
    [
        ("attnlab.attention.dense.softmax_attention", "dense"),
        ("attnlab.attention.multimodal.anything", "multimodal"),
        ("attnlab.mixers.anything", "mixers"),
        ("attnlab.nn.softmax", "nn"),
        ("somebody.of.others", "somebody"),
        ("__main__", "__main__"),
    ],
)
def test_the_family_is_the_package(module, family):
    function = types.FunctionType(double.__code__, {})
    function.__module__ = module
    registry.register("doubling", kind=Kind.FUNCTION, small=example, **FACTS)(function)
    assert attnlab.get("doubling").family == family


def test_filters():
    everything = attnlab.variants()
    assert attnlab.variants(kind="pooling") == tuple(v for v in everything if v.kind is Kind.POOLING) != ()
    assert attnlab.variants(family="linear") == tuple(v for v in everything if v.family == "linear") != ()
    assert attnlab.variants(source=Source.PAPER_TEXT) == tuple(v for v in everything if v.source == "paper text") != ()
    kernel = "neighborhood_attention"
    assert attnlab.variants(kernel=kernel) == tuple(v for v in everything if v.kernel == kernel) != ()
    video = attnlab.variants(layout=Layout.VIDEO, pattern=Pattern.CAUSAL_CROSS)
    assert video == tuple(v for v in everything if Layout.VIDEO in v.layouts and Pattern.CAUSAL_CROSS in v.patterns)


def test_search_takes_words_from_name_summary_and_paper():
    assert attnlab.names(search="PORCUPINE zhang") == ("hedgehog",)
    assert "softmax_attention" in attnlab.names(search="scaled products")
    assert attnlab.names(search="porcupine vaswani") == ()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kind": "mixr"}, "no kind is called 'mixr': did you mean mixer"),
        ({"family": "liner"}, "no family is called 'liner': did you mean linear"),
        ({"pattern": "casual self"}, "causal self"),
        ({"layout": "images"}, "did you mean image"),
        ({"source": "author's code"}, "authors' code"),
        ({"kernel": "liner_attention"}, "linear_attention"),
    ],
)
def test_unknown_filters_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        attnlab.names(**given)


def test_every_paper_kernel_and_summary_is_well_formed():
    import pallas_kernels

    for variant in attnlab.variants():
        assert variant.kernel is None or variant.kernel in pallas_kernels.dispatch.ops(), variant.name
        assert variant.summary and "\n" not in variant.summary and not variant.summary.endswith("."), variant.name
