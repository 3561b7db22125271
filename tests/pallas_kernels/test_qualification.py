"""Kernels are chosen by themselves where they were tried, right and faster; what was tried is remembered."""

import json
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch, qualification, trials
from pallas_kernels.block_sparse_attention import cases as block_sparse_cases
from pallas_kernels.delta_rule_attention import cases as delta_rule_cases
from pallas_kernels.linear_attention import cases as linear_cases
from pallas_kernels.neighborhood_attention import cases as neighborhood_cases
from pallas_kernels.qualification import Verdict
from pallas_kernels.selective_scan import cases as selective_scan_cases

KIND = "NVIDIA H200"


def square(arguments, implementation):
    return dispatch.choose("fake_op", None, implementation).load().run(arguments["x"])


def seconds_of(trial, name, arguments):
    trial.call(arguments, name)
    return SECONDS[name]


def unsupported(x):
    raise dispatch.UnsupportedError("it takes nothing")


# What the fakes compute of x: the op is x².
FAKES = {
    "fast": lambda x: x * x,
    "slow": lambda x: x**2,
    "wrong": lambda x: 1.01 * x * x,
    "nan": lambda x: x * x + jnp.nan,
    "broken": lambda x: x * x[:1, :1] @ x,
    "refuses": unsupported,
}
SECONDS = {"fast": 1e-3, "slow": 3e-3, "xla": 2e-3}


@pytest.fixture
def op(monkeypatch, tmp_path):
    """An op with fakes of kernels for GPUs, a fresh memory, and times that are what `SECONDS` says."""
    for name, run in {**FAKES, "xla": FAKES["fast"], "reference": FAKES["fast"]}.items():
        module = types.SimpleNamespace(run=run, supports=lambda args: None)
        monkeypatch.setitem(sys.modules, f"fake_{name}", module)
    given = "float32", {"x": np.linspace(1.0, 2.0, 12, dtype=np.float32).reshape(3, 4)}, square
    both = [trials.Trial("one", *given), trials.Trial("timed", *given, timed=True)]
    module = types.SimpleNamespace(trials=lambda: both)
    monkeypatch.setitem(sys.modules, "fake_cases", module)
    monkeypatch.setattr(dispatch, "_tables", {})
    monkeypatch.setattr(dispatch, "_trials", {})
    monkeypatch.setattr(qualification, "_adopted", {})
    monkeypatch.setenv("PALLAS_KERNELS_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(trials, "seconds_of", seconds_of)
    table = [dispatch.Implementation(name, f"fake_{name}", platforms=("gpu",)) for name in FAKES]
    table += [dispatch.Implementation(name, f"fake_{name}") for name in ("xla", "reference")]
    dispatch.register("fake_op", table, trials="fake_cases:trials")
    with dispatch.target("gpu", KIND):
        yield "fake_op"


def test_nothing_is_qualified_without_a_trial(op):
    assert dispatch.choose(op, None).name == "xla"
    answers = {answer.name: answer for answer in dispatch.explain(op)}
    assert answers["fast"] == ("fast", False, "not qualified on NVIDIA H200: run attnlab qualify")
    with dispatch.target("gpu"):
        assert dispatch.choose(op, None).name == "xla"
        assert "not qualified on an unknown device" in dispatch.explain(op)[0].reason


def test_what_is_not_qualified_runs_when_it_is_named_or_asked_for(op):
    assert dispatch.choose(op, None, "slow").name == "slow"
    with pytest.raises(dispatch.UnsupportedError, match="needs gpu; this machine has tpu"):
        dispatch.choose(op, None, "slow", platform="tpu")
    with dispatch.target("gpu", KIND, qualified_only=False):
        assert dispatch.choose(op, None).name == "fast"


def test_right_and_faster_is_chosen(op):
    verdicts = {name: verdict for (_, name), verdict in trials.qualify().items()}
    assert dispatch.choose(op, None).name == "fast"
    assert [name for name, verdict in verdicts.items() if verdict.qualified] == ["fast"]
    assert verdicts["fast"].right and (verdicts["fast"].seconds, verdicts["fast"].xla_seconds) == (1e-3, 2e-3)
    assert verdicts["slow"].right and verdicts["slow"].reason == "3 ms against 2 ms of xla"
    assert "one (float32) is wrong" in verdicts["wrong"].reason and verdicts["wrong"].error > 1e3
    assert "one (float32) is wrong, with inf times" in verdicts["nan"].reason
    assert "one (float32) failed with TypeError: " in verdicts["broken"].reason
    assert verdicts["refuses"].reason == "it takes none of the cases that are tried"
    answers = {answer.name: answer.reason for answer in dispatch.explain(op)}
    assert answers["slow"] == "not qualified on NVIDIA H200: 3 ms against 2 ms of xla"
    assert dispatch.choose(op, None, "wrong").name == "wrong"


def test_a_wrong_gradient_is_wrong(op, monkeypatch):
    import jax

    fast = jax.custom_vjp(lambda x: x * x)
    fast.defvjp(lambda x: (x * x, x), lambda x, dy: (2.001 * x * dy,))
    monkeypatch.setattr(sys.modules["fake_fast"], "run", fast)
    assert "is wrong" in trials.qualify()[op, "fast"].reason


def test_verdicts_are_remembered_by_kind_and_versions(op, monkeypatch):
    trials.qualify()
    qualification._adopted.clear()
    monkeypatch.setattr(trials, "_judge", lambda *_: pytest.fail("tried again"))
    assert trials.qualify()[op, "fast"].qualified and dispatch.choose(op, None).name == "fast"
    with dispatch.target("gpu", "NVIDIA H100"):
        assert dispatch.choose(op, None).name == "xla"
    at_hand = qualification.versions()
    for changed in ("jax", "jaxlib", "libtpu", "triton", "source"):
        others = at_hand | {changed: "0"}
        with monkeypatch.context() as patch:
            patch.setattr(qualification, "versions", lambda others=others: others)
            assert dispatch.choose(op, None).name == "xla", changed
    assert dispatch.choose(op, None).name == "fast"


CORRUPT = (b"", b"{", b'{"verdicts": 3}', b'{"verdicts": [["a"]]}', b"[]", b"\xff\xfe", b"null")


@pytest.mark.parametrize("content", CORRUPT)
def test_a_corrupt_file_counts_as_absent_and_is_written_anew(op, content):
    trials.qualify()
    (file,) = qualification.directory().iterdir()
    file.write_bytes(content)
    qualification._adopted.clear()
    with pytest.warns(UserWarning, match="cannot be read and counts as absent"):
        assert dispatch.choose(op, None).name == "xla"
    with pytest.warns(UserWarning, match="cannot be read"):
        trials.qualify()
    qualification._adopted.clear()
    assert dispatch.choose(op, None).name == "fast"
    assert json.loads(file.read_text())["device_kind"] == KIND


def test_a_directory_that_cannot_be_written_is_no_error(op, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PALLAS_KERNELS_CACHE_DIR", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="forgotten when this process ends"):
        trials.qualify()
    assert dispatch.choose(op, None).name == "fast"


def test_a_release_qualifies_too(op, monkeypatch):
    monkeypatch.setattr(qualification, "RELEASED", {KIND: frozenset({(op, "slow")})})
    assert dispatch.choose(op, None).name == "slow"


def test_a_new_device_is_tried_once_with_one_line(op):
    lines = []
    trials.qualify_new_device(lines.append)
    trials.qualify_new_device(lines.append)
    assert len(lines) == 1 and "kernels tried on NVIDIA H200" in lines[0] and "fake_op (fast)" in lines[0]
    assert dispatch.choose(op, None).name == "fast"


def test_training_goes_on_where_nothing_can_be_tried(op, monkeypatch):
    def no_cpu(backend):
        raise RuntimeError(f"no backend {backend}")

    monkeypatch.setattr("jax.local_devices", no_cpu)
    lines = []
    trials.qualify_new_device(lines.append)
    assert len(lines) == 1 and "so xla runs: kernels are held against the CPU: add it" in lines[0]
    assert dispatch.choose(op, None).name == "xla" and not list(qualification.directory().iterdir())


@pytest.mark.parametrize("index", [0, 1])
def test_process_0_decides_for_all(op, monkeypatch, index):
    import jax
    from jax.experimental import multihost_utils

    decided = {(op, "slow"): Verdict(True)}
    sent = np.frombuffer(qualification.dumped(KIND, decided).encode(), np.uint8)
    answers = iter([np.int32(sent.size), sent])
    given = []

    def broadcast(x):
        given.append(np.asarray(x))
        return next(answers) if index else x

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: index)
    monkeypatch.setattr(multihost_utils, "broadcast_one_to_all", broadcast)
    if index:
        monkeypatch.setattr(trials, "qualify", lambda: pytest.fail("tried by another process than the first"))
    trials.qualify_new_device(lambda line: None)
    assert [x.shape for x in given] == [(), given[1].shape] and given[1].dtype == np.uint8
    assert dispatch.choose(op, None).name == ("slow" if index else "fast")


def test_on_the_cpu_there_is_nothing_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("PALLAS_KERNELS_CACHE_DIR", str(tmp_path))
    trials.qualify_new_device(lambda line: pytest.fail(line))
    assert trials.qualify() == {} and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "make",
    [
        linear_cases.trials,
        linear_cases.step_trials,
        delta_rule_cases.trials,
        block_sparse_cases.trials,
        neighborhood_cases.trials,
        selective_scan_cases.trials,
    ],
)
def test_trials_of_the_ops_can_be_judged(make):
    """`xla` takes most of them; one of each op is run, against itself in float64."""
    all_trials = make()
    assert any(trial.timed for trial in all_trials)
    exact = (trial for trial in all_trials if not trial.timed and trial.dtype == "float32")
    small = min(exact, key=lambda trial: sum(leaf.size for leaf in jax.tree.leaves(trial.arguments)))
    verdict = trials._judge("xla", [small], trials._Exact())
    assert verdict.right and verdict.error <= 1, verdict
