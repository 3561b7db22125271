"""The benchmark of the selective scan: problems, the gate, the table and the files; never a time."""

import dataclasses
import json

import pytest

from attnlab.bench import scan
from attnlab.cli import bench
from pallas_kernels import selective_scan


@pytest.fixture(autouse=True)
def small(monkeypatch):
    case = dataclasses.replace(scan.SPEED[0], name="small", length=20, channels=4, state_size=2)
    monkeypatch.setattr(scan, "SPEED", (case,))
    monkeypatch.setattr(scan, "DECODE_BATCH", 2)


def test_a_problem_counts_its_bytes_and_operations():
    forward, gradient = (scan.Problem("small", "float32", mode) for mode in ("forward", "gradient"))
    vectors, shared, constants = 20 * 4 * 4, 20 * 2 * 4, 4 * (4 * 2 + 2 * 4)
    assert forward.minimum_bytes() == 4 * vectors + 2 * shared + constants
    assert gradient.minimum_bytes() == 12 * vectors - vectors + 6 * shared + 3 * constants
    assert gradient.operations() == 3 * forward.operations() == 3 * 7 * 20 * 4 * 2
    with pytest.raises(ValueError, match="name must be one of small, got 'large'"):
        scan.Problem("large")


def test_a_wrong_result_is_not_timed(monkeypatch):
    problem = scan.Problem("small", "float32", "gradient")

    def off(arrays):
        return (1.001 * selective_scan(**arrays, softplus=True),)

    found = [("fine", problem.function("xla"), True), ("off", off, True), ("refused", "no reason", True)]
    monkeypatch.setattr(scan, "_contenders", lambda *_: iter(found))
    fine, wrong, refused = scan.solve(problem, 0.0)
    assert fine.seconds and not fine.failed
    assert wrong.seconds is None and wrong.failed and "relative error" in wrong.reason
    assert refused.reason == "no reason" and not refused.failed


def test_the_command_writes_what_it_measured(tmp_path, capsys):
    arguments = ["selective_scan", "--modes", "forward", "decode", "--seconds", "0", "--out-dir", str(tmp_path)]
    assert bench.run(arguments) == 0
    shown = capsys.readouterr().out
    assert "attnlab xla" in shown and "needs tpu" in shown and "a loop over tokens" in shown
    rows = json.loads((tmp_path / "results.json").read_text())["results"]
    assert {row["problem"]["mode"] for row in rows} == {"forward", "decode"}
