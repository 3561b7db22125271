"""Quality of a synthetic task against length, within and beyond that in training."""

import base64
import dataclasses

import numpy as np
import pytest
from flax import nnx

from attnlab import figures
from attnlab.cli.main import main
from attnlab.compare import measure, plots, report, results
from attnlab.compare.results import Comparison, Entry
from attnlab.data import TaskData
from attnlab.experiment import Experiment, LanguageModelConfig
from attnlab.training import LanguageTask, TrainConfig

RECALL = [
    *("compare", "recall", "--mixers", "softmax_attention", "--model.features", "8", "--model.depth", "1"),
    *("--data.options", "vocab_size=16", "pairs=2", "--data.eval-size", "8", "--task.sequence-length", "16"),
    *("--train.steps", "2", "--train.batch-size", "8", "--train.eval-batch-size", "8", "--train.eval-every", "2"),
    *("--train.optimizer.warmup-steps", "1", "--train.no-tensorboard", "--lengths", "16"),
]


def comparison(*entries):
    machine = {"device": "a machine", "versions": "jax 1", "finished": "today"}
    return Comparison("Recall", "task", {}, {}, machine, {"task": {"sequence_length": 64}}, entries)


def made():
    common = {"status": "done", "quality": 0.9, "parameters": 1000, "items_per_second": 10.0}
    tokens = (32, 64, 128, 256)
    return comparison(
        Entry("softmax_attention", **common, lengths=tuple(zip(tokens, (0.99, 0.98, 0.7, 0.4), strict=True))),
        Entry("hedgehog", **common, lengths=tuple(zip(tokens, (0.9, 0.88, 0.86, 0.83), strict=True))),
        Entry("rcmha", **common, lengths=((32, 0.95), (64, 0.93)), beyond="not at 128 tokens: its table ends"),
    )


@pytest.mark.slow
def test_a_comparison_measures_tasks_at_other_lengths(tmp_path, capsys):
    assert main([*RECALL, "--task-lengths", "4", "32", "8", "--out-dir", str(tmp_path)]) == 0
    (entry,) = results.load(tmp_path / "results.json").entries
    assert [tokens for tokens, _ in entry.lengths] == [8, 32], "the task has no form of 4 tokens"
    assert all(0 <= quality <= 1 for _, quality in entry.lengths)
    assert not entry.beyond
    assert "at 32 tokens" in capsys.readouterr().out
    html = (tmp_path / "report.html").read_text()
    for name in ("quality_length", "quality_length-dark"):
        assert base64.b64encode((tmp_path / "plots" / f"{name}.png").read_bytes()).decode() in html


def test_models_whose_positions_end_say_so():
    model = LanguageModelConfig(features=8, depth=1, num_heads=1, position="learned", max_length=16)
    data = TaskData(task="induction", options=("vocab_size=8",), eval_size=8)
    experiment = Experiment(model=model, data=data, task=LanguageTask(sequence_length=16), train=TrainConfig(steps=1))
    built = model.build(experiment.open().info, rngs=nnx.Rngs(0))
    curve, beyond = measure.quality_at_lengths(built, experiment, (8, 16, 32, 64))
    assert [tokens for tokens, _ in curve] == [8, 16]
    assert beyond == "not at 32 tokens: 32 tokens are beyond the position table of 16 rows"


def test_the_report_says_how_far_models_reach(tmp_path):
    whole = made()
    results.save(whole, tmp_path / "results.json")
    assert results.load(tmp_path / "results.json") == whole
    assert report.columns(whole)[-3] == ("at 256 tokens", True)
    assert [report.numbers(whole, entry)[-1] for entry in whole.entries] == ["40.0", "83.0", "–"]
    assert report.beyond(whole) == "Length ends: rcmha not at 128 tokens: its table ends."
    none = comparison(*(dataclasses.replace(entry, lengths=(), beyond="") for entry in whole.entries))
    assert report.longest_length(none) is None
    assert len(report.columns(none)) == len(report.columns(whole)) - 1


@pytest.mark.parametrize("theme", [figures.LIGHT, figures.DARK], ids=["light", "dark"])
def test_the_figure_has_a_line_for_each_and_marks_where_training_was(theme):
    with figures.style(theme):
        axes = plots.quality_against_length(made(), theme).axes[0]
    lines = [line for line in axes.get_lines() if len(line.get_xdata()) > 2 or line.get_marker() == "x"]
    np.testing.assert_array_equal(lines[0].get_xdata(), [32, 64, 128, 256])
    assert [line.get_xdata()[-1] for line in axes.get_lines() if line.get_marker() == "x"] == [64]
    assert any(text.get_text() == "trained at 64" for text in axes.texts)
