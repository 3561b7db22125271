"""The comparison itself: a right adapter passes, and each way of being wrong is found and named."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.golden.cases import adapters, fault, faults, find_cases

RNG = np.random.default_rng(0)
X, W, COT = (RNG.standard_normal(shape).astype(np.float32) for shape in ((5, 4), (3, 4), (5, 3)))


def right(meta, param, inputs):
    scores = inputs["x"] @ param["fc.weight"].T * meta["config"]["scale"]
    return {"y": scores, "best": jnp.argmax(scores, -1), "sign": jnp.ones(3), "limit": jnp.array([-jnp.inf, 1.0])}


@pytest.fixture
def case(tmp_path):
    """y = 2 x Wᵀ, its largest channel, an output that is not unique, and a gradient that is zero by symmetry."""
    path = tmp_path / "slug" / "case.npz"
    path.parent.mkdir()
    np.savez(
        path,
        **{
            "meta": json.dumps({"class": "Fc", "config": {"scale": 2.0}, "call": {}, "not_compared": ["sign"]}),
            "in/x": X,
            "param/fc.weight": W,
            "param/unused": np.ones(3, np.float32),
            "out/y": 2 * X @ W.T,
            "out/best": np.argmax(X @ W.T, -1),
            "out/sign": -np.ones(3, np.float32),
            "out/limit": np.array([-np.inf, 1], np.float32),
            "cot/y": COT,
            "grad_in/x": 2 * COT @ W,
            "grad_param/fc.weight": 2 * COT.T @ X,
            "grad_param/unused": np.full(3, 1e-7, np.float32),
        },
    )
    return path


def changed(**outputs):
    return lambda meta, param, inputs: right(meta, param, inputs) | {k: f(param, inputs) for k, f in outputs.items()}


def without(name):
    return lambda *args: {k: v for k, v in right(*args).items() if k != name}


def y(param, inputs):
    return 2 * inputs["x"] @ param["fc.weight"].T


def test_a_right_adapter_passes(case):
    assert faults(case, right) == []


@pytest.mark.parametrize(
    ("run", "found"),
    [
        (changed(y=lambda p, i: y(p, i) * (1 + 3e-5)), ["out/y has the relative error 3.0e-05, allowed is 2e-05"]),
        (changed(y=lambda p, i: y(p, i).at[0, 0].set(jnp.nan)), ["out/y differs in entries that are not finite"]),
        (changed(y=lambda p, i: y(p, i)[:, :, None]), ["out/y has shape (5, 3, 1) for (5, 3)"]),
        (changed(best=lambda p, i: (jnp.argmax(y(p, i), -1) + 1) % 3), ["out/best differs in 5 of 5 entries"]),
        (changed(limit=lambda p, i: jnp.array([jnp.inf, 1.0])), ["out/limit differs in entries that are not finite"]),
        (changed(limit=lambda p, i: jnp.array([-1e30, 1.0])), ["out/limit differs in entries that are not finite"]),
        (without("best"), ["out/best is missing"]),
        (without("y"), ["out/y is missing", "no gradients without the outputs y"]),
    ],
)
def test_wrong_outputs_are_named(case, run, found):
    assert [f for f in faults(case, run) if not f.startswith("grad")][: len(found)] == found


@pytest.mark.parametrize(
    ("run", "found"),
    [
        (lambda m, p, i: right(m, p | {"fc.weight": jax.lax.stop_gradient(p["fc.weight"])}, i), "grad_param/fc.weight"),
        (lambda m, p, i: right(m, p, {"x": jax.lax.stop_gradient(i["x"])}), "grad_in/x"),
        (changed(y=lambda p, i: y(p, i) + 1e-2 * (p["unused"] - 1)), "grad_param/unused"),
    ],
)
def test_right_outputs_with_a_wrong_gradient_are_found(case, run, found):
    (only,) = faults(case, run)
    assert only.startswith(f"{found} has the relative error")


def test_an_adapter_that_cannot_be_traced_raises(case):
    with pytest.raises(jax.errors.JAXTypeError):
        faults(case, changed(y=lambda p, i: jnp.asarray(2 * np.asarray(i["x"]) @ np.asarray(p["fc.weight"]).T)))


def test_the_scale_of_an_error_has_a_floor():
    want, got = np.zeros(4, np.float32), np.full(4, 1e-6)
    assert fault(got, want, 1e-4) == "has the relative error 1.0e+00, allowed is 1e-04"
    assert fault(got, want, 1e-4, floor=0.1) is None


def test_cases_of_one_name_run_once_and_unknown_slugs_not_at_all(tmp_path):
    for name in ("a/slug/one", "b/slug/one", "b/slug/two", "b/other/three"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"{name}.npz").touch()
    found = find_cases(["slug"], (tmp_path / "a", tmp_path / "b", tmp_path / "absent"))
    assert [str(path.relative_to(tmp_path)) for path in found] == ["a/slug/one.npz", "b/slug/two.npz"]


def test_adapters_are_the_modules_without_an_underscore(tmp_path):
    for name in ("__init__.py", "_shared.py", "tnl.py", "hedgehog.py", "notes.md"):
        (tmp_path / name).touch()
    assert adapters(tmp_path) == ["hedgehog", "tnl"]
