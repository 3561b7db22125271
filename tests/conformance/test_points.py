"""Points of every registered mixer and backbone: those declared are those visited. Nothing is computed, only traced."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from attnlab import Layout, Pattern
from attnlab.points import LAYER_POINTS, POINTS, Attachment, Editable, Edits, Intervention, attach
from tests.conformance import subjects, test_backbones


def everywhere(visits: list[str]) -> Intervention:
    """Notes the points in the order of the pass, and changes nothing."""

    def method(point):
        def note(self, value, at, memory):
            visits.append(point)
            return value, memory

        return note

    return type("Everywhere", (Intervention,), {point: method(point) for point in POINTS})()


def in_one_form_each() -> list[subjects.Subject]:
    """One pattern and layout of each mixer: causal sequences if it has them, which decode."""
    first: dict[str, subjects.Subject] = {}
    for subject in subjects.mixers():
        decodes = subject.pattern is Pattern.CAUSAL_SELF and subject.layout is Layout.SEQUENCE
        if subject.name not in first or decodes:
            first[subject.name] = subject
    return list(first.values())


@pytest.mark.parametrize("subject", in_one_form_each(), ids=str)
def test_mixers_visit_the_points_that_they_declare(subject):
    visits, declared = [], []

    def trace(x):
        mixer = subject.build(noise=False)
        declared.extend(point for point in POINTS if point in mixer.points)

        def edits(phase, memories=None):
            visits.append(phase)
            return Edits([Attachment(everywhere(visits))], 0, phase, memories)

        x, *context = subject.arguments(x)
        y = mixer(x, *context, edits=edits("call"))
        if subject.pattern is Pattern.CAUSAL_SELF and subject.layout is Layout.SEQUENCE:
            y, state = mixer.prefill(x[:, :4], mixer.init_state(x.shape[0], 8), edits=edits("prefill", [()]))
            y, state = mixer.step(x[:, 4], state, edits=edits("step", [()]))
        return y

    jax.eval_shape(trace, subject.tokens())
    phases = [phase for phase in ("call", "prefill", "step") if phase in visits]
    assert visits == [name for phase in phases for name in (phase, *declared)]


@test_backbones.every_backbone
def test_backbones_visit_the_points_of_all_layers_and_their_own(subject):
    visits, wanted = [], []

    def trace(x):
        model = test_backbones.build(subject)
        assert isinstance(model, Editable)
        for index, layer in enumerate(model.edited_layers()):
            points = [point for point in LAYER_POINTS if point in layer.points]
            methods = {point: getattr(type(everywhere(visits)), point) for point in points}
            model = attach(model, type("Here", (Intervention,), methods)(), layers=[index])
            wanted.extend(points)
        wanted.append("logits")
        own = type("Own", (Intervention,), {"logits": type(everywhere(visits)).logits})()
        return attach(model, own)(x)

    jax.eval_shape(trace, test_backbones.inputs(subject))
    assert visits == wanted


def test_layers_can_be_scanned():
    """Stacked layers under interventions that know which layer they are in, and remember, equal the loop."""
    from attnlab.interventions.head_scaling import HeadScaling
    from attnlab.models.language_model import LanguageModel

    model = LanguageModel(7, features=8, depth=3, num_heads=2, mixer="lightning_attention_2", rngs=nnx.Rngs(0))
    attachment = attach(model, HeadScaling(jnp.arange(6.0).reshape(3, 2))).interventions[0]
    x = jax.random.normal(jax.random.key(0), (2, 5, 8))

    @jax.jit
    def both(x):
        y, parts = x, [nnx.split(block) for block in model.blocks.blocks]
        for layer, block in enumerate(model.blocks.blocks):
            y = block(y, edits=Edits([attachment], layer))
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(state for _, state in parts))

        def one(x, layer):
            index, state = layer
            return nnx.merge(parts[0][0], state)(x, edits=Edits([attachment], index)), None

        return y, jax.lax.scan(one, x, (jnp.arange(3), stacked))[0]

    loop, scanned = both(x)
    subjects.close(scanned, loop, 1e-5)
