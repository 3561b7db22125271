"""The metrics file, the stopwatch and the progress line."""

import json
import sys

import pytest

from attnlab.training import metrics
from attnlab.training.metrics import MetricsLog, ProgressLine, Stopwatch, read_metrics


def filled(directory, **options):
    log = MetricsLog(directory, 0, tensorboard=False, **options)
    for step in (1, 2, 3):
        log.write(step, "train", {"loss": 1 / step}, seconds=step / 3)
    log.write(3, "eval", {"loss": 0.5}, seconds=1.0)
    log.close()
    return directory / "metrics.jsonl"


def test_lines(tmp_path):
    lines = filled(tmp_path).read_text().splitlines()
    assert json.loads(lines[1]) == {"step": 2, "split": "train", "values": {"loss": 0.5}, "time": 0.667}
    assert len(lines) == 4


def test_a_resumed_run_drops_later_lines_and_keeps_the_rest(tmp_path):
    path = filled(tmp_path)
    log = MetricsLog(tmp_path, 2, tensorboard=False)
    log.write(3, "train", {"loss": 7.0}, seconds=1.5)
    log.close()
    assert [(r["step"], r["values"]["loss"]) for r in read_metrics(path)] == [(1, 1.0), (2, 0.5), (3, 7.0)]
    assert log.last("train", 2) == {"loss": 0.5} and log.last("eval", 3) is None


def test_a_line_that_was_cut_off_is_left_out_but_rubbish_is_an_error(tmp_path):
    path = filled(tmp_path)
    whole = read_metrics(path)
    path.write_text(path.read_text() + '{"step": 4, "spl')
    assert read_metrics(path) == whole
    path.write_text("rubbish\n" + path.read_text())
    with pytest.raises(ValueError, match="line 1 is not JSON: 'rubbish'"):
        read_metrics(path)


def test_other_processes_write_nothing(tmp_path):
    assert not filled(tmp_path, write=False).exists()


def test_not_finite_values_stay_valid_json(tmp_path):
    log = MetricsLog(tmp_path, 0, tensorboard=True)
    log.write(1, "eval", {"perplexity": float("inf")}, seconds=0.0)
    log.close()
    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line, parse_constant=pytest.fail)["values"] == {"perplexity": "inf"}
    assert read_metrics(tmp_path / "metrics.jsonl")[0]["values"] == {"perplexity": float("inf")}
    MetricsLog(tmp_path, 1, tensorboard=False).close()
    assert (tmp_path / "metrics.jsonl").read_text() == line


def test_stopwatch_counts_only_between_start_and_stop(monkeypatch):
    now = iter([10.0, 12.0, 15.0, 20.0, 21.0])
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(now))
    watch = Stopwatch(100.0)
    watch.start()
    assert watch.read() == 102.0
    watch.stop()
    assert watch.read() == watch.seconds == 105.0
    watch.start()
    watch.start()
    assert watch.read() == 106.0


def test_plain_lines_where_there_is_no_terminal(capsys):
    line = ProgressLine(100, 10, 64, "tokens", every=0)
    line.update(30, loss=1.23456, seconds=2.0)
    line.say("a message")
    line.close()
    assert capsys.readouterr().err.splitlines() == [
        "step 30/100 · loss 1.235 · 640 tokens/s · 0:07 left",
        "a message",
    ]
    silent = ProgressLine(100, 0, 64, "tokens", show=False, every=0)
    silent.update(30, loss=1.0, seconds=2.0)
    silent.say("a message")
    assert capsys.readouterr().err == ""


def test_plain_lines_are_rare(capsys):
    line = ProgressLine(100, 0, 64, "tokens", every=1e9)
    for step in range(1, 50):
        line.update(step, loss=1.0, seconds=2.0)
    assert capsys.readouterr().err == ""


def test_live_line_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    line = ProgressLine(100, 0, 12345, "examples")
    line.update(50, loss=0.5, seconds=50.0)
    line.say("[eval] a message")
    line.close()
    shown = capsys.readouterr().err
    assert "50/100" in shown and "loss 0.5 · 12.3k examples/s · 0:50 left" in shown and "[eval] a message" in shown
