"""The benchmark: least bytes, the gate, the table and the files; never a time."""

import dataclasses
import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.bench import contenders, gate, report, runner, timing, torch_peers
from attnlab.bench.problem import OPS, Problem, Shape
from attnlab.cli import bench as command
from attnlab.cli.main import main

SMALL = Shape(2, 40, 2, 16, 8)


def test_shapes_are_read_and_printed():
    assert Shape.parse("1x8192x96x128") == Shape(1, 8192, 96, 128, 128)
    assert str(Shape.parse("2x64x4x16x32")) == "B2 N64 H4 D16 E32"
    for text in ("1x2x3", "1x2x3x4x5x6", "0x2x3x4", "1x2x3xD"):
        with pytest.raises(ValueError, match="BxNxHxD or BxNxHxDxE"):
            Shape.parse(text)


def test_least_bytes_and_operations():
    shape = Shape(1, 8192, 96, 128, 128)
    tokens = 8192 * 96
    forward = Problem("linear_attention", shape, "none", "bfloat16", "forward")
    gradient = dataclasses.replace(forward, mode="gradient")
    assert forward.minimum_bytes() == tokens * 8 * 128
    assert gradient.minimum_bytes() == tokens * (8 + 14) * 128
    assert forward.operations() == tokens * 4 * 128 * 128
    # A decay per token is read twice, and its gradient written; one per head has none.
    assert dataclasses.replace(gradient, decay="token").minimum_bytes() == gradient.minimum_bytes() + 3 * 4 * tokens
    assert dataclasses.replace(gradient, decay="head").minimum_bytes() == gradient.minimum_bytes() + 2 * 4 * 96
    decode = dataclasses.replace(forward, mode="decode")
    assert decode.minimum_bytes() == 2 * 96 * 128 * 128 * 4 + 96 * 8 * 128


@pytest.mark.parametrize(
    "mode", ["forward", *(pytest.param(m, marks=pytest.mark.slow) for m in ("gradient", "decode"))]
)
@pytest.mark.parametrize(("op", "decay"), [(op.name, decay) for op in OPS.values() for decay in op.decays])
def test_the_gate_lets_what_is_right_pass(op, decay, mode):
    problem = Problem(op, SMALL, decay, "float32", mode)
    arrays = problem.draw()
    found, _ = contenders.contenders(problem, arrays)
    own = [contender for contender in found if contender.own]
    assert own
    for contender in own:
        measured = contenders.measure(
            contender, problem, arrays, gate.make(problem, arrays), gate.tolerance(problem), 0.0
        )
        assert measured.error <= gate.tolerance(problem)
        assert measured.seconds > 0


@pytest.mark.parametrize("mode", ["forward", "gradient"])
def test_a_wrong_result_is_not_timed(mode, monkeypatch):
    problem = Problem("linear_attention", SMALL, "head", "float32", mode)
    arrays = problem.draw()
    function = problem.function("xla")

    def last_head_wrong(arrays):
        return function(arrays).at[-1, :, -1].mul(1.001)

    wrong = contenders.Contender("attnlab wrong", last_head_wrong, own=True)
    measured = contenders.measure(wrong, problem, arrays, gate.make(problem, arrays), gate.tolerance(problem), 0.0)
    assert measured.seconds is None and measured.error > gate.tolerance(problem)
    result = runner._result(problem, timing.Machine("none", 1e9, 1e9), wrong, measured, gate.tolerance(problem))
    assert result.seconds is None and result.failed and "a wrong result is not timed" in result.reason


def test_a_gradient_that_is_wrong_is_found():
    problem = Problem("linear_attention", SMALL, "none", "float32", "gradient")
    arrays = problem.draw()
    function = problem.function("xla")

    def stopped(arrays):
        return function(arrays | {"k": jax.lax.stop_gradient(arrays["k"])})

    wrong = contenders.Contender("attnlab stopped", stopped, own=True)
    assert contenders.measure(wrong, problem, arrays, gate.make(problem, arrays), 1e-3, 0.0).seconds is None


@pytest.mark.parametrize(("op", "decay"), [(op.name, decay) for op in OPS.values() for decay in op.decays])
def test_gradients_are_those_of_what_is_made_of_tokens(op, decay):
    problem = Problem(op, SMALL, decay, "float32", "gradient")
    arrays = problem.draw()
    constant = {"log_decay"} if decay == "head" else set()
    assert set(problem.differentiated) == set(arrays) - constant
    assert set(gate.make(problem, arrays).expected) == {"y", *problem.differentiated}


def test_softmax_peers_have_a_gate_of_their_own():
    problem = Problem("linear_attention", Shape(1, 24, 2, 16, 16), "head", "float32", "gradient")
    arrays = problem.draw()
    peers = [c for c in contenders.contenders(problem, arrays)[0] if c.softmax]
    own = gate.make(problem, arrays, softmax=True)
    assert peers
    assert all(contenders.measure(peer, problem, arrays, own, 1e-5, 0.0).seconds for peer in peers)


def test_gates_survive_a_file(tmp_path):
    problem = Problem("linear_attention", SMALL, "token", "bfloat16", "gradient")
    made = gate.make(problem, problem.draw())
    made.save(tmp_path / "gate.npz")
    read = gate.Gate.load(tmp_path / "gate.npz")
    assert (read.rows, read.prefix) == (made.rows, made.prefix)
    jax.tree.map(np.testing.assert_array_equal, (read.inputs, read.expected), (made.inputs, made.expected))
    assert read.error(made.expected) == 0
    assert read.error({name: array * np.nan for name, array in made.expected.items()}) == np.inf


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["forward", "gradient"])
def test_the_other_process_answers_or_says_why_not(mode):
    problem = Problem("linear_attention", SMALL, "token", "float32", mode)
    arrays = problem.draw()
    gates = {"linear": gate.make(problem, arrays), "softmax": gate.make(problem, arrays, softmax=True)}
    with torch_peers.TorchPeers() as peers:
        answers = peers.measure(problem, gates, 0.0)
    if importlib.util.find_spec("torch") is None:
        assert answers == {"torch": {"reason": "PyTorch is not installed"}}
    else:
        assert all(answer["seconds"] > 0 and answer["error"] < 1e-4 for answer in answers.values())


def test_a_peer_process_that_dies_is_reported():
    with torch_peers.TorchPeers("false") as peers, pytest.raises(RuntimeError, match="PyTorch peers died"):
        peers.measure(Problem("linear_attention", SMALL), {}, 0.0)


@pytest.mark.slow
def test_the_command_writes_what_it_measured(tmp_path, capsys):
    options = ["--shapes", "1x33x2x16", "--lengths", "16", "32", "--seconds", "0", "--no-peers", "--decays", "head"]
    assert main(["bench", "linear_attention", *options, "--out-dir", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "forward, B1 N33 H2 D16, float32, decay per head" in printed and "attnlab xla" in printed
    saved = json.loads((tmp_path / "results.json").read_text())
    assert saved["command"].startswith("attnlab bench linear_attention --shapes 1x33x2x16")
    timed = [row for row in saved["results"] if row["seconds"]]
    assert {row["contender"] for row in timed} == {"attnlab xla"}
    assert {row["problem"]["mode"] for row in timed} == {"forward", "gradient", "decode"}
    assert all(row["error"] < 2e-6 and row["bytes_per_second"] > 0 for row in timed)
    assert {"tpu", "mosaic_gpu", "triton"} >= {
        row["contender"].removeprefix("attnlab ") for row in saved["results"] if row["reason"]
    }
    for name in ("throughput_forward.png", "throughput_gradient-dark.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["linear_atention"], "did you mean linear_attention"),
        (["linear_attention", "--dtypes", "int8"], "dtype of linear_attention must be one of bfloat16"),
        (["linear_attention", "--decays", "row"], "decay of linear_attention must be one of none, head"),
        (["linear_attention", "--modes", "backward"], "mode of linear_attention must be one of forward"),
        (["linear_attention", "--lengths", "0"], "--lengths must be positive"),
    ],
)
def test_mistakes_are_named(options, text, capsys):
    assert main(["bench", *options]) == 2
    assert text in capsys.readouterr().err


def test_without_an_op_the_command_explains_itself(capsys):
    assert main(["bench", "--help"]) == 0
    assert "linear_attention" in capsys.readouterr().out


def test_accelerators_get_the_shapes_of_flash_linear_attention():
    fixed, series = command.problems_of("linear_attention", command.BenchOptions(), "accelerator")
    shapes = {str(problem.shape) for problem in fixed if problem.mode == "gradient"}
    assert {"B1 N8192 H96 D128", "B8 N2048 H32 D256", "B8 N1024 H8 D64"} <= shapes
    assert {problem.dtype for problem in fixed} == {"bfloat16"}
    assert {problem.shape.batch * problem.shape.length for problem in series} == {2**20}
    assert jnp.dtype(fixed[0].dtype) == jnp.bfloat16


def test_bytes_of_the_tpu_kernel_are_printed_for_every_chip():
    shape = Shape(1, 4096, 8, 128, 128)
    table = report.tpu_bytes([Problem("linear_attention", shape, mode=mode) for mode in ("forward", "decode")])
    cells = {column.header: list(column.cells) for column in table.columns}
    assert cells["chip"] == ["v5e", "v5p", "v6e", "TPU7x"]
    forward, backward = ([float(x) for x in cells[name]] for name in ("forward", "backward"))
    assert all(8 * 128 <= x <= 1.3 * 8 * 128 for x in forward)
    assert all(14 * 128 <= x <= 1.3 * 14 * 128 for x in backward)
    assert report.tpu_bytes([Problem("delta_rule_attention", shape)]) is None


@pytest.mark.slow
def test_a_run_that_fails_or_is_stopped_keeps_what_it_measured(tmp_path, monkeypatch, capsys):
    def broken(arrays):
        raise RuntimeError("no such instruction")

    found = contenders.contenders

    def with_broken(problem, arrays):
        if problem.mode == "gradient":
            raise KeyboardInterrupt
        own, refused = found(problem, arrays)
        return [contenders.Contender("attnlab broken", broken, own=True), *own], refused

    monkeypatch.setattr(runner, "contenders", with_broken)
    options = ["--shapes", "1x8x1x16", "--decays", "none", "--seconds", "0", "--no-peers", "--lengths"]
    arguments = ["bench", "linear_attention", *options, "--out-dir", str(tmp_path)]
    assert main([*arguments, "--modes", "forward"]) == 1
    assert "attnlab broken: RuntimeError: no such instruction" in capsys.readouterr().out
    (tmp_path / "results.json").unlink()
    assert main([*arguments, "--modes", "forward", "gradient"]) == 130
    assert "interrupted" in capsys.readouterr().err
    rows = {row["contender"]: row for row in json.loads((tmp_path / "results.json").read_text())["results"]}
    assert rows["attnlab broken"]["failed"] and rows["attnlab xla"]["seconds"] and not rows["attnlab tpu"]["failed"]


def test_the_table_compares_with_the_first_line():
    problem = Problem("linear_attention", SMALL)
    first = runner.Result(problem, "attnlab tpu", True, 1e-3, 1e-4, 0.5, 1.0)
    second = dataclasses.replace(first, contender="other", own=False, seconds=2.5e-3)
    assert report.cells(second, first)[-1] == "2.50"
    assert report.cells(first, first)[4] == "50 %"
