"""The benchmark of mixers: problems, the gate, the table and the files; never a time."""

import json

import jax.numpy as jnp
import pytest

from attnlab import Layout, registry
from attnlab.bench import mixer_report, mixers
from attnlab.bench.mixers import MixerProblem
from attnlab.cli import bench_mixer
from attnlab.cli.main import main
from attnlab.contract import TokenMixer
from tests import subset


class Rounded(TokenMixer):
    """Twice the tokens; but for float64, a little more behind token 20."""

    def __init__(self):
        self.features = 8

    def mix(self, x, given):
        return 2 * x * jnp.where((x.dtype == jnp.float64) | (jnp.arange(x.shape[1]) < 20), 1, 1.001)[:, None]


def test_shapes_are_read_and_printed():
    image = MixerProblem.parse("2x4x6x16", heads=2)
    assert (image.layout, image.tokens, str(image)) == (Layout.IMAGE, 24, "image 2x4x6x16, 2 heads, float32")
    assert MixerProblem.parse("1x2x3x4x8", heads=1).layout is Layout.VIDEO
    assert image.with_tokens(64, 3).grid == (8, 8) and image.with_tokens(64, 3).batch == 3
    of_sequences = registry.get("hedgehog").site_class
    assert image.site(of_sequences).layout is Layout.SEQUENCE


def test_lengths_keep_the_sum_of_tokens():
    options = bench_mixer.BenchMixerOptions(("hedgehog", "softmax_attention"), shape="1x32x64", lengths=(16, 64))
    problems, series = bench_mixer.problems_of(options, "cpu")
    assert [(p.batch, p.grid, p.causal) for p in problems] == [(1, (32,), True), (4, (16,), True), (1, (64,), True)]
    assert series == problems[1:]
    of_images = bench_mixer.BenchMixerOptions(("hedgehog", "window_attention"), shape="1x32x64", lengths=())
    assert [p.causal for p in bench_mixer.problems_of(of_images, "cpu")[0]] == [False]


def test_a_wrong_result_is_not_timed(monkeypatch):
    monkeypatch.setattr(mixers, "build", lambda *_: Rounded())
    fine, wrong = (mixers.solve(MixerProblem(1, (n,), 8, 1), "rounded", {}, 0.0) for n in (20, 21))
    assert fine.error < 1 and fine.forward > 0 and fine.gradient > 0 and not fine.failed
    assert wrong.error > 1 and wrong.forward is None and wrong.failed and "a wrong result is not timed" in wrong.reason


def test_more_memory_than_there_is_is_a_reason(monkeypatch):
    monkeypatch.setattr(mixers, "_limit", lambda: 1)
    found = mixers.solve(MixerProblem(1, (8,), 8, 1), "softmax_attention", {}, 0.0)
    assert "would take" in found.reason and found.memory > 1 and not found.failed


@pytest.mark.slow
def test_the_command_writes_what_it_measured(tmp_path, capsys):
    """Of a mixer of images and one without a form for them; options reach the constructor they name."""
    options = ["--shape", "1x4x4x16", "--heads", "2", "--lengths", "4", "16", "--seconds", "0"]
    options += ["--options", '{"softmax_attention": {"qkv_bias": false}}', "--out-dir", str(tmp_path)]
    assert main(["bench", "mixer", "--mixers", "softmax_attention", "lightning_attention_2", *options]) == 0
    printed = capsys.readouterr().out
    assert "image 1x4x4x16, 2 heads, float32" in printed and "image 4x2x2x16" in printed
    saved = json.loads((tmp_path / "results.json").read_text())
    assert saved["command"].startswith("attnlab bench mixer --mixers softmax_attention")
    of = {row["mixer"]: row for row in saved["results"] if row["problem"]["grid"] == [4, 4]}
    assert of["softmax_attention"]["forward"] > 0 and of["softmax_attention"]["parameters"] == 4 * 16 * 16 + 16
    assert len(saved["results"]) == 4
    for name in ("mixers_forward.png", "mixers_gradient-dark.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_what_has_no_form_is_said_below_the_table():
    found = mixers.solve(MixerProblem(1, (8,), 8, 1, causal=True), "spatial_reduction_attention", {}, 0.0)
    assert not found.failed and "takes image" in found.reason
    table, reason, _ = mixer_report.table([found])
    assert table.row_count == 0 and found.reason in str(reason)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--mixers", "hedghog"], "did you mean hedgehog"),
        (["--mixers", "efficient_probing"], "is a pooling, not a mixer"),
        (["--mixers", "hedgehog", "--shape", "4x4"], "--shape must be BxNxC"),
        (["--mixers", "hedgehog", "--heads", "3"], "heads must divide"),
        (["--mixers", "hedgehog", "--dtype", "int8"], "dtype must be one of bfloat16"),
        (["--mixers", "hedgehog", "--lengths", "0"], "--lengths must be positive"),
        (["--mixers", "hedgehog", "--options", '{"sqa": {}}'], "sqa is not among the mixers hedgehog"),
    ],
)
def test_mistakes_are_named(options, text, capsys):
    assert main(["bench", "mixer", *options]) == 2
    assert text in capsys.readouterr().err


def test_an_option_that_a_mixer_lacks_ends_the_run():
    with pytest.raises(TypeError, match="has no option 'ep'"):
        mixers.solve(MixerProblem(1, (8,), 8, 1), "hedgehog", {"ep": 1}, 0.0)


@pytest.mark.slow
@pytest.mark.parametrize("slug", [slug for slug in subset.mechanisms() if slug in registry.names(kind="mixer")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_right_passes_the_gate(slug, dtype):
    grid = {Layout.SEQUENCE: (16,), Layout.IMAGE: (4, 4)}
    layout = next(layout for layout in grid if layout in registry.get(slug).layouts)
    problem = MixerProblem(1, grid[layout], 16, 2, causal=mixers.causal_forms([slug]), dtype=dtype)
    assert mixers.gate(problem, slug, {}) <= 1
