"""Dynamic Perceiver: its trunks' sizes, exits one after the other, thresholds and cost, and its loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab.interop.dyn_perceiver import OFFICIAL
from attnlab.interop.official import ConfigError, choose
from attnlab.models.dyn_perceiver import DYN_PERCEIVERS, DynamicPerceiver
from attnlab.models.early_exit import (
    classify,
    confidence,
    exit_costs,
    exit_shares,
    exit_taken,
    exit_thresholds,
    expected_cost,
)
from attnlab.models.regnet import REGNETS, regnet_stages
from attnlab.models.resnet import RESNETS, ResNet
from attnlab.models.staged import build_named
from attnlab.objectives.exits import exit_loss

TRUNKS = {
    "regnet_y_400mf": 4_344_144,
    "regnet_y_800mf": 6_432_512,
    "regnet_y_1_6gf": 11_202_430,
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet50_0375": 4_089_472,
}  # as torchvision and the authors' code count them
TINY = {"trunk_options": {"widths": (8, 8, 8, 8), "depths": (1, 1, 1, 1), "group_width": 4, "stem_features": 8}}
TINY |= {
    "with_dwc": False,
    "num_latents": 16,
    "num_heads": (1, 1, 1, 2),
    "depth_factors": (0, 0, 0, 1),
    "num_classes": 5,
}


def parameters(make):
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(nnx.eval_shape(make), nnx.Param)))


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in ("regnet_y_400mf", "resnet18") else pytest.mark.slow) for n in TRUNKS]
)
def test_trunks_have_the_sizes_of_others(name):
    assert parameters(lambda: build_named({**REGNETS, **RESNETS}, name, rngs=nnx.Rngs(0))) == TRUNKS[name]


@pytest.mark.slow
def test_sizes_on_a_resnet_are_those_of_the_authors():
    made = parameters(lambda: build_named(DYN_PERCEIVERS, "resnet50_0375_perceiver_t64", rngs=nnx.Rngs(0)))
    assert made == 30_913_328


def on_basic_blocks():
    trunk = {"kind": "basic", "depths": (1, 1, 1, 1), "hidden_features": (8,) * 4, "stem_features": 8}
    return DynamicPerceiver(ResNet, **TINY | {"trunk_options": trunk}, rngs=nnx.Rngs(0))


@pytest.mark.slow
def test_official_names_on_a_resnet_of_basic_blocks():
    official = choose(OFFICIAL, "DynPerceiver", {"cnn_arch": "resnet18"}, ())

    def loaded(arrays):
        model = on_basic_blocks()
        official.load(model, arrays)
        return official.dump(model)

    names = jax.eval_shape(lambda: official.dump(on_basic_blocks()))
    assert jax.eval_shape(loaded, names) == names
    assert {"cnn_stem.1.running_var", "cnn_body_stage2.0.downsample.0.weight", "classifier_cnn.bias"} <= names.keys()
    assert "cnn_body_stage1.0.downsample.0.weight" not in names  # there the shortcut is the map itself
    assert official.options({"cnn_arch": "resnet34"})["depth_factors"] == (1, 1, 1, 3)


def test_trunks_that_are_not_known_are_refused():
    for arch in ("resnet51", "mobilenet_v3"):
        with pytest.raises(ConfigError, match=f"cnn_arch must be one of .* got '{arch}'"):
            choose(OFFICIAL, "DynPerceiver", {"cnn_arch": arch}, ()).options({"cnn_arch": arch})
    with pytest.raises(ValueError, match="kind must be basic or bottleneck, got 'wide'"):
        ResNet("wide", rngs=nnx.Rngs(0))


def test_widths_follow_the_rule():
    assert regnet_stages(16, 48, 27.89, 2.09, 8) == ((48, 104, 208, 440), (1, 3, 6, 6), (8,) * 4)
    assert regnet_stages(21, 80, 42.63, 2.66, 24) == ((72, 216, 576, 1512), (2, 5, 13, 1), (24,) * 4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["reg400m_perceiver_t32"])
def test_sizes_are_a_trunk_and_what_the_latents_need(name):
    sizes = DYN_PERCEIVERS[name][1]
    n, (a, b, c, d, e) = sizes["num_latents"], (32, *sizes["trunk_options"]["widths"])

    def attention(q, k, inner):  # three norms, four maps, and the feed-forward
        return 2 * q + 2 * k + 2 * inner * q + 2 * inner * k + q + 2 * q + 2 * q * (q + 1)

    def alone(q):
        return 2 * q + 4 * q * q + q + 2 * q + 2 * q * (q + 1)

    latents = sum(
        attention(w, w, w) + 49 * w + 50 * w + layers * alone(w)
        for w, layers in zip((a, b, c, d), (3, 3, 9, 3), strict=True)
    )
    latents += sum(attention(w, w, w // 8) for w in (b, c, d)) + attention(e, d, e // 8) + n * a
    for i, (w, wider) in enumerate(((a, b), (b, c), (c, d))):
        m = n >> i
        latents += 2 * m + (m + 1) * (m // 2) + 2 * w + (w + 1) * wider
    heads = 1000 * (c + 1) + 1000 * (2 * d + 1) + 1000 * (e + 2 * d + 1) + 2 * (e + 2 * d) + 2 * (1001 * d + 2 * d)
    assert (
        parameters(lambda: build_named(DYN_PERCEIVERS, name, rngs=nnx.Rngs(0)))
        == TRUNKS["regnet_y_400mf"] + latents + heads
    )


def test_thresholds_let_the_given_shares_leave():
    confidences = np.random.default_rng(0).uniform(size=(100, 4)).astype(np.float32)
    shares = exit_shares(0.8)
    np.testing.assert_allclose(sum(shares), 1)
    taken = np.asarray(exit_taken(confidences, exit_thresholds(confidences, shares=shares)))
    wanted = [int(100 * share) for share in shares[:3]]
    np.testing.assert_array_equal(np.bincount(taken, minlength=4), [*wanted, 100 - sum(wanted)])
    # Those that leave first are the surest.
    assert confidences[taken == 0, 0].min() > confidences[taken > 0, 0].max()
    np.testing.assert_allclose(expected_cost(taken, (1.0, 2.0, 3.0, 4.0)), (taken + 1).mean())
    none = exit_thresholds(confidences, shares=(0.0, 1.0, 0.5, 0.0))
    assert none[0] > 1 and none[1] == confidences[:, 1].min() and none[2] > 1 and none[3] < 0
    with pytest.raises(ValueError, match="shares must be 4 numbers"):
        exit_thresholds(confidences, shares=(0.5, 0.5))


@pytest.mark.slow
def test_what_leaves_early_is_what_its_exit_says():
    model = DynamicPerceiver(**TINY, rngs=nnx.Rngs(0))
    images = np.random.default_rng(0).standard_normal((6, 32, 32, 3)).astype(np.float32)
    exits = nnx.jit(lambda m, x: m.exits(x))(model, images)
    sure = np.asarray(confidence(exits))
    limits = exit_thresholds(sure, shares=(0.34, 0.2, 0.2, 0.26))
    taken = np.asarray(exit_taken(sure, limits))
    assert len(set(taken)) > 2
    limits = np.asarray(limits) - 1e-5  # what is computed in other batches differs in the last digits
    found = classify(model, images, limits)
    np.testing.assert_array_equal(found.taken, taken)
    np.testing.assert_allclose(found.logits, np.stack(exits, 1)[np.arange(6), taken], atol=1e-4)
    costs = exit_costs(model, (32, 32))
    assert 0 < costs[0] < costs[1] < costs[2] < costs[3]
    with pytest.raises(ValueError, match="thresholds must be one for each of four"):
        classify(model, images, limits[:3])


def test_parts_that_are_left_out():
    images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    without = {f"with_{part}": False for part in ("x2z", "z2x", "last_CA", "isc")}
    model = nnx.eval_shape(lambda: DynamicPerceiver(**TINY, **without, rngs=nnx.Rngs(0)))
    assert {x.shape for x in nnx.eval_shape(lambda m, x: m.exits(x), model, images)} == {(2, 5)}
    maps = nnx.eval_shape(lambda m, x: m.stages(x), model, images)
    assert [x.shape[1:3] for x in maps] == [(8, 8), (4, 4), (2, 2), (1, 1)]
    assert nnx.eval_shape(lambda m, x: m.tokens(x), model, images).shape == (2, 2, 8)
    with pytest.raises(ValueError, match="num_latents must be a multiple of 8, got 12"):
        DynamicPerceiver(**TINY | {"num_latents": 12}, rngs=nnx.Rngs(0))


def test_the_loss_is_its_terms_and_nothing_flows_into_what_teaches():
    exits = [np.random.default_rng(k).standard_normal((2, 5)).astype(np.float32) for k in range(4)]
    labels = np.array([3, 0])
    log_p = [np.asarray(jax.nn.log_softmax(one)) for one in exits]
    want = sum(f * -p[np.arange(2), labels] for f, p in zip((0.25, 0.25, 0.25, 0.5), log_p, strict=True))
    np.testing.assert_allclose(exit_loss(exits, labels), want, rtol=1e-5)
    soft = [np.asarray(jax.nn.log_softmax(one / 4)) for one in exits]
    divergence = sum((np.exp(soft[3]) * (soft[3] - one)).sum(-1) for one in soft[:3])
    np.testing.assert_allclose(exit_loss(exits, labels, distillation=0.5), want + 0.5 * 16 * divergence, rtol=1e-4)
    plain, taught = (
        jax.grad(lambda e, a=alpha: exit_loss(e, labels, distillation=a).sum())(exits) for alpha in (0.0, 0.5)
    )
    np.testing.assert_array_equal(plain[3], taught[3])
    assert not np.allclose(plain[0], taught[0])
    with pytest.raises(ValueError, match="factors must be one for each of 3 exits, got 4"):
        exit_loss(exits[:3], labels)
