"""Several seeds: means with their intervals, and which differences between mixers are more than noise."""

import dataclasses
import itertools
import math
import warnings
from collections.abc import Sequence

import numpy as np
from scipy import stats

from attnlab.compare.results import Comparison, Entry, Point

CONFIDENCE = 0.95
FALSE_DISCOVERIES = 0.05


def mean_interval(values: np.ndarray, axis: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Mean, and half the width of its 95 % interval by Student's t; of at least two values."""
    count = values.shape[axis]
    quantile = stats.t.ppf(0.5 + CONFIDENCE / 2, count - 1)
    return values.mean(axis), quantile * values.std(axis, ddof=1) / math.sqrt(count)


def over_seeds(entries: Sequence[Entry]) -> Entry:
    """One mixer's entries, a seed each, as one: the means, and what the first alone was asked for."""
    first = entries[0]
    results = tuple(result for entry in entries for result in entry.seeds)
    if len(results) == 1:
        return first
    quality, half = mean_interval(np.array([result.quality for result in results]))
    changed = {
        name: float(np.mean([getattr(entry, name) for entry in entries]))
        for name in ("loss", "seconds", "steps_per_second", "items_per_second")
        if all(getattr(entry, name) is not None for entry in entries)
    }
    return dataclasses.replace(first, **changed, quality=float(quality), half_width=float(half), seeds=results)


def curve_over_seeds(curves: Sequence[Sequence[Point]]) -> tuple[np.ndarray, np.ndarray]:
    """Steps that all curves have, `(S,)`, and their values, `(seeds, S)`."""
    tables = [dict(curve) for curve in curves]
    steps = sorted(set.intersection(*map(set, tables))) if tables else []
    return np.array(steps), np.array([[table[step] for step in steps] for table in tables])


def told_apart(entries: Sequence[Entry]) -> dict[tuple[str, str], bool]:
    """Whether the qualities of two mixers differ by more than noise, for every pair of those with several seeds.

    Welch's t-test over the seeds, pairs chosen by Benjamini and Hochberg (1995): of those said to differ, 5 % may not.
    """
    trained = [entry for entry in entries if len(entry.seeds) > 1]
    pairs = list(itertools.combinations(trained, 2))
    if not pairs:
        return {}
    adjusted = stats.false_discovery_control([_p_value(one, other) for one, other in pairs])
    return {
        (one.mixer, other.mixer): bool(p <= FALSE_DISCOVERIES) for (one, other), p in zip(pairs, adjusted, strict=True)
    }


def _p_value(one: Entry, other: Entry) -> float:
    a, b = ([result.quality for result in entry.seeds] for entry in (one, other))
    with warnings.catch_warnings():  # of values that are all the same
        warnings.simplefilter("ignore", RuntimeWarning)
        p = float(stats.ttest_ind(a, b, equal_var=False).pvalue)
    return p if math.isfinite(p) else float(np.mean(a) == np.mean(b))


def sentences(comparison: Comparison) -> str:
    """What the seeds say of the differences, in words; of one seed, that it says little."""
    ranked = [entry for entry in comparison.ranked() if len(entry.seeds) > 1]
    if not ranked:
        return "One seed: small differences between mixers are within its noise."
    count = len(ranked[0].seeds)
    text = f"Means over {count} seeds, ± half of their 95 % interval: how other seeds would move them, not other data."
    apart = told_apart(ranked)
    if not apart:
        return text
    same = [pair for pair, differ in apart.items() if not differ]
    if not same:
        return f"{text} All differences are more than noise (Welch's t-test, 5 % false discoveries)."
    best = ranked[0].mixer
    with_best = [other for one, other in same if one == best]
    rest = [f"{one} – {other}" for one, other in same if one != best]
    text += " Within noise (Welch's t-test, 5 % false discoveries): "
    parts = [f"{best}, the first, and {', '.join(with_best)}"] if with_best else []
    text += "; ".join(parts + rest) + "."
    different = len(apart) - len(same)
    return f"{text} {'All other' if different else 'No'} differences are more than that."
