"""Several seeds of a mixer: intervals, curves, and which differences are noise."""

import numpy as np
import pytest

from attnlab import figures
from attnlab.compare import noise, plots, report
from attnlab.compare.results import Comparison, Entry, SeedResult


def of_seeds(mixer, *qualities):
    entries = []
    for seed, quality in enumerate(qualities):
        curves = {"train_curve": ((1, 2.0 + seed), (2, 1.0 + seed)), "eval_curve": ((2, quality),)}
        seeds = (SeedResult(seed, quality, **curves),)
        entries.append(Entry(mixer, "done", parameters=10, quality=quality, seconds=1.0 + seed, seeds=seeds, **curves))
    return noise.over_seeds(entries)


def comparison(*entries):
    return Comparison("t", "image", {}, {}, {"device": "d", "versions": "v", "finished": "f"}, {}, entries)


def test_the_interval_is_students():
    mean, half = noise.mean_interval(np.array([1.0, 2.0, 4.0]))
    assert mean == pytest.approx(7 / 3) and half == pytest.approx(4.302653 * 1.527525 / 3**0.5, rel=1e-6)
    covered = 0
    rng = np.random.default_rng(0)
    for _ in range(2000):
        mean, half = noise.mean_interval(rng.normal(size=4))
        covered += abs(mean) <= half
    assert 0.93 < covered / 2000 < 0.97


def test_an_entry_over_seeds_has_means_and_all_results():
    entry = of_seeds("softmax_attention", 0.5, 0.7)
    assert entry.quality == pytest.approx(0.6) and entry.seconds == 1.5 and len(entry.seeds) == 2
    assert entry.half_width == pytest.approx(12.7062 * 0.1, rel=1e-4)
    assert of_seeds("softmax_attention", 0.5).half_width is None


def test_tells_differences_from_noise():
    far = of_seeds("softmax_attention", 0.900, 0.901, 0.902), of_seeds("hedgehog", 0.800, 0.802, 0.801)
    near = of_seeds("davit", 0.8015, 0.799, 0.803)
    apart = noise.told_apart([*far, near])
    assert apart == {
        ("softmax_attention", "hedgehog"): True,
        ("softmax_attention", "davit"): True,
        ("hedgehog", "davit"): False,
    }
    words = noise.sentences(comparison(*far, near))
    assert "3 seeds" in words and "davit – hedgehog." in words and "All other differences are more than that" in words
    words = noise.sentences(comparison(far[1], near))
    assert "davit, the first, and hedgehog." in words and words.endswith("No differences are more than that.")
    assert "All differences are more than noise" in noise.sentences(comparison(*far))
    assert "One seed" in noise.sentences(comparison(of_seeds("davit", 0.5)))


def test_seeds_that_all_give_the_same_are_no_noise():
    same = of_seeds("softmax_attention", 0.5, 0.5), of_seeds("hedgehog", 0.5, 0.5)
    other = of_seeds("davit", 0.6, 0.6)
    assert list(noise.told_apart([*same, other]).values()) == [False, True, True]


def test_the_table_and_the_curves_show_intervals():
    entries = of_seeds("softmax_attention", 0.5, 0.7), of_seeds("hedgehog", 0.4, 0.5)
    assert report.numbers(comparison(*entries), entries[0])[0] == "60.0 ± 127.1"
    figure = plots.learning_curves(comparison(*entries), figures.LIGHT)
    assert [len(axes.collections) for axes in figure.axes] == [2, 2]
    np.testing.assert_allclose(figure.axes[0].lines[0].get_ydata(), [2.5, 1.5])
    single = plots.learning_curves(comparison(of_seeds("davit", 0.4)), figures.LIGHT)
    assert [len(axes.collections) for axes in single.axes] == [0, 0]
