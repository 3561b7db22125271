import base64
import dataclasses
import json
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from flax import nnx

from attnlab import figures
from attnlab.cli.main import main
from attnlab.compare import measure, plots, report, results
from attnlab.compare.results import Comparison, Entry, Timing
from attnlab.decode_size import DecodeSize
from attnlab.models.language_model import LanguageModel

DIGITS = [
    *("compare", "digits_vit", "--mixers", "softmax_attention", "lightning_attention_2", "tnl.attention"),
    *("--model.features", "16", "--model.depth", "1", "--model.num-heads", "2", "--model.patch-size", "2"),
    *("--train.steps", "4", "--train.batch-size", "16", "--train.eval-every", "2", "--train.log-every", "1"),
    *("--train.optimizer.warmup-steps", "1", "--train.no-tensorboard", "--lengths", "16", "64"),
]


def comparison(*entries, kind="image"):
    machine = {"device": "a machine", "versions": "jax 1", "finished": "today"}
    return Comparison("A title", kind, {"data": "d"}, {"model": "m"}, machine, {"model": {"x": 1}}, entries)


def entry(mixer, quality, **kwargs):
    return Entry(mixer, "done", parameters=1234, quality=quality, steps=2, items_per_second=100.0, **kwargs)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A comparison that was run once; the third mixer cannot be trained on these images."""
    path = tmp_path_factory.mktemp("compare")
    assert main([*DIGITS, "--model.mixer-options", "{}", "--out-dir", str(path)]) == 0
    return path


def test_results_hold_what_was_trained_and_measured(directory):
    found = results.load(directory / "results.json")
    by_name = {e.mixer: e for e in found.entries}
    for mixer in ("softmax_attention", "lightning_attention_2"):
        e = by_name[mixer]
        assert e.status == "done" and e.steps == 4 and 0 <= e.quality <= 1
        assert [step for step, _ in e.train_curve] == [1, 2, 3, 4] and [step for step, _ in e.eval_curve] == [2, 4]
        assert [t.tokens for t in e.timings] == [16, 64] and all(t.gradient_ms > 0 for t in e.timings)
        assert e.parameters > 1000 and e.step_bytes > 0 and e.items_per_second > 0
    assert found.config["train"]["steps"] == 4


def test_report_is_one_file_with_every_figure(directory):
    html = (directory / "report.html").read_text()
    assert not re.search(r"(src|srcset|href)=\"(?!data:|#|https://arxiv\.org)", html)
    for name in ("learning_curves", "quality_speed", "time_length", "attention"):
        for suffix in ("", "-dark"):
            png = (directory / "plots" / f"{name}{suffix}.png").read_bytes()
            assert base64.b64encode(png).decode() in html, name + suffix
    assert "softmax_attention" in html and "arxiv.org/abs/1706.03762" in html


def test_running_again_trains_nothing_and_finds_the_same(directory, capsys):
    before = results.load(directory / "results.json")
    times = {path: path.stat().st_mtime_ns for path in directory.glob("*/metrics.jsonl")}
    assert main([*DIGITS, "--model.mixer-options", "{}", "--out-dir", str(directory)]) == 0
    assert "finished before" in capsys.readouterr().err
    assert results.load(directory / "results.json").entries == before.entries
    finished = ("softmax_attention", "lightning_attention_2")
    assert all(
        (directory / m / "metrics.jsonl").stat().st_mtime_ns == times[directory / m / "metrics.jsonl"] for m in finished
    )


def test_a_mixer_that_cannot_be_trained_does_not_sink_the_others(tmp_path, capsys):
    arguments = [a for a in DIGITS if a != "tnl.attention"]
    arguments[arguments.index("lightning_attention_2")] = "neighborhood_attention"
    options = '{"neighborhood_attention": {"kernel_size": 99}}'
    arguments += ["--model.mixer", "neighborhood_attention", "--model.mixer-options", options, "--lengths", "16"]
    assert main([*arguments, "--out-dir", str(tmp_path)]) == 0
    by_name = {e.mixer: e for e in results.load(tmp_path / "results.json").entries}
    assert by_name["softmax_attention"].status == "done"
    failed = by_name["neighborhood_attention"]
    assert failed.status == "failed" and failed.reason and failed.quality is None
    assert "neighborhood_attention was not trained" in capsys.readouterr().out
    assert "not trained:" in (tmp_path / "report.html").read_text()


@pytest.mark.slow
def test_several_seeds_at_equal_size_go_on_from_one_seed(directory, tmp_path, capsys):
    at = DIGITS.index("--mixers")
    settings = [*DIGITS[:at], *DIGITS[at + 4 : DIGITS.index("--lengths")], "--lengths", "16"]
    command = [*settings, "--match", "parameters", "--out-dir", str(tmp_path)]
    assert main([*command, "--mixers", "softmax_attention"]) == 0
    assert main([*command, "--mixers", "softmax_attention", "lightning_attention_2", "--seeds", "2"]) == 0
    printed = capsys.readouterr()
    assert printed.err.count("finished before") == 1 and "Means over 2 seeds" in printed.out
    softmax, lightning = results.load(tmp_path / "results.json").entries
    assert [result.seed for result in softmax.seeds] == [0, 1] and softmax.half_width is not None
    assert softmax.width == "16" and lightning.width in ("12", "16")
    assert abs(lightning.parameters - softmax.parameters) < 0.2 * softmax.parameters
    assert softmax.quality == np.mean([result.quality for result in softmax.seeds])
    html = (tmp_path / "report.html").read_text()
    assert "±" in html and "its width so that sizes are equal" in html and "Means over 2 seeds" in html


@pytest.mark.slow
def test_an_interrupted_comparison_goes_on(tmp_path):
    arguments = [argument if argument != "4" else "400" for argument in DIGITS]
    command = [sys.executable, "-m", "attnlab.cli.main", *arguments, "--out-dir", str(tmp_path)]
    metrics = tmp_path / "softmax_attention" / "metrics.jsonl"
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    while process.poll() is None and not (metrics.exists() and metrics.read_text().count('"train"') > 5):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130 and "Traceback" not in err, err
    reached = json.loads(metrics.read_text().splitlines()[-1])["step"]
    assert reached < 400 and not (tmp_path / "results.json").exists()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and f"going on from step {reached}" in done.stderr, done.stderr
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [line["step"] for line in lines if line["split"] == "train"] == list(range(1, 401))
    assert results.load(tmp_path / "results.json").entries[0].steps == 400


@pytest.mark.parametrize(
    ("mixers", "words"),
    [
        ([], "--mixers is missing"),
        (["softmax_atention"], "did you mean softmax_attention"),
        (["hedgehog", "hedgehog"], "different names"),
        (["hedgehog", "--seeds", "0"], "seeds must be at least 1"),
    ],
)
def test_mistakes_in_mixers(capsys, tmp_path, mixers, words):
    arguments = ["--mixers", *mixers] if mixers else []
    assert main(["compare", "digits_vit", *arguments, "--out-dir", str(tmp_path / "no")]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_results_survive_json(tmp_path):
    sample = results.Sample("a", "b\x00é")
    full = entry("softmax_attention", 0.5, train_curve=((1, 2.0),), timings=(Timing(4, 1.0, 2.0),), sample=sample)
    full = dataclasses.replace(full, decode_state=DecodeSize(40.0, 8.0))
    before = comparison(full, Entry("hedgehog", "failed", reason="why"))
    results.save(before, tmp_path / "results.json")
    assert results.load(tmp_path / "results.json") == before
    assert json.loads((tmp_path / "results.json").read_text())["entries"][1]["reason"] == "why"


def test_ranking_follows_the_direction_of_the_quality():
    entries = (entry("hedgehog", 0.9), entry("tnl", 0.95), Entry("agent_attention", "failed"))
    assert [e.mixer for e in comparison(*entries).ranked()] == ["tnl", "hedgehog", "agent_attention"]
    assert [e.mixer for e in comparison(*entries, kind="text").ranked()] == ["hedgehog", "tnl", "agent_attention"]
    words = report.summary(comparison(*entries))
    assert words.startswith("tnl comes first with 95.0 %") and "Not trained: agent_attention" in words


def test_report_escapes_what_models_write(tmp_path):
    e = entry("softmax_attention", 2.0, sample=results.Sample("<b>", "<script>alert(1)</script>"))
    report.write_report(tmp_path / "r.html", [report.Section(comparison(e, kind="text"), {})])
    html = (tmp_path / "r.html").read_text()
    assert "<script>" not in html and "&lt;script&gt;" in html


def test_decode_state_of_language_models(tmp_path):
    mixers = ("softmax_attention", "lightning_attention_2")
    model = LanguageModel(7, features=8, depth=2, num_heads=2, mixer=mixers, rngs=nnx.Rngs(0))
    size = measure.decode_state(model)
    assert size.per_token == 2 * 8 * 2 + 8, "keys and values of one layer, position and label"
    assert 2 * 4 * 4 * 4 <= size.fixed <= 2 * 4 * 4 * 4 + 64, "two heads' state in float32 and some counters"
    e = entry("softmax_attention", 2.0, decode_state=size)
    report.write_report(tmp_path / "r.html", [report.Section(comparison(e, kind="text"), {})])
    assert str(size) in (tmp_path / "r.html").read_text()
    assert "decode state" not in [title for title, _ in report.columns(comparison(e))]


def test_labels_are_kept_apart():
    heights = figures.apart([0.5, 0.5, 0.51, 0.99, 1.0], 0.06)
    assert np.diff(sorted(heights)).min() >= 0.06 - 1e-9 and max(heights) <= 1.0


def test_every_mixer_looks_different():
    names = ["softmax_attention", *(f"mixer{i}" for i in range(12))]
    looks = figures.looks(names, figures.LIGHT, plots.BASELINE)
    assert len({(look["color"], str(look["linestyle"])) for look in looks.values()}) == len(names)
