"""The page of a comparison: one HTML file that needs no other, light or dark as the reader's screen is."""

import base64
import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from attnlab import registry
from attnlab.compare import noise
from attnlab.compare.results import Comparison, Entry, write_text

WIDTH = 960  # pixels of the widest figure on the page; figures are drawn at 160 dots per inch


class Section(NamedTuple):
    """A comparison and its figures, by name, as `plots.draw_all` returns them."""

    comparison: Comparison
    figures: Mapping[str, Path]


CAPTIONS = {
    "learning_curves": (
        "Learning curves",
        "Left: loss of the training batches, averaged over the last 4 % of the steps. Right: the evaluation split; the "
        "start of training is cut off so that the ends can be told apart. Bands, of several seeds, are 95 % intervals "
        "of the mean.",
    ),
    "quality_speed": (
        "Quality against speed",
        "Speed is that of training on this machine, with compilation and evaluation left out.",
    ),
    "time_length": (
        "Time against length",
        "Median time of one mixer alone, batch size 1, with the model's number of channels and heads, on this machine. "
        "Both axes are logarithmic: a slope of 1 is linear in the number of tokens, a slope of 2 quadratic.",
    ),
    "quality_length": (
        "Quality against length",
        "The task at other lengths than in training, which the line marks: the same models, new examples at each. "
        "A cross is where a model takes no longer sequence.",
    ),
    "attention": (
        "Where the model looks",
        "Attention of the trained models on one example of the evaluation split, mean over heads, every map scaled to "
        "its own largest weight. For mechanisms that never build the matrix it is computed for this picture. Where "
        "weights have both signs, orange is negative.",
    ),
}


DECODE_NOTE = "The decode state is that of one sequence in all layers, with caches in bfloat16. "


def write_report(path: Path, sections: Sequence[Section], *, title: str | None = None) -> None:
    """Writes the page.

    Args:
      path: of the HTML file.
      sections: comparisons, each with its figures.
      title: of the page; that of the first comparison when None.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("attnlab.compare", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    machine = sections[0].comparison.machine
    write_text(
        path,
        environment.get_template("report.html.j2").render(
            title=title or sections[0].comparison.title,
            introduction=f"Same model, same data, same {_seeds_and_width(sections[0].comparison)}. "
            f"Trained on {machine['device']} with {machine['versions']}, finished {machine['finished']}.",
            sections=[_section(section) for section in sections],
        ),
    )


def columns(comparison: Comparison) -> list[tuple[str, bool]]:
    """Titles of the table's columns, and whether they hold numbers."""
    return [
        ("mixer", False),
        (comparison.quality_label, True),
        ("parameters", True),
        *([("width", True)] if any(entry.width for entry in comparison.entries) else []),
        *([("operations", True)] if any(entry.flops for entry in comparison.entries) else []),
        ("steps/s", True),
        (f"{comparison.items}/s", True),
        ("memory of a step", True),
        *([("decode state", True)] if comparison.kind == "text" else []),
        *([(f"at {longest} tokens", True)] if (longest := longest_length(comparison)) else []),
        ("time, asymptotic", False),
        ("paper", False),
    ]


def numbers(comparison: Comparison, entry: Entry) -> list[str]:
    """The cells of the columns that hold numbers, for an entry that did not fail."""
    quality = "–"
    if entry.quality is not None:
        quality = f"{comparison.quality_number(entry.quality):.{comparison.measured.digits}f}"
    if entry.half_width is not None:
        quality += f" ± {comparison.quality_number(entry.half_width):.{comparison.measured.digits}f}"
    return [
        quality,
        _count(entry.parameters),
        *([entry.width or "–"] if any(other.width for other in comparison.entries) else []),
        *([_count(entry.flops)] if any(other.flops for other in comparison.entries) else []),
        "–" if entry.steps_per_second is None else f"{entry.steps_per_second:.3g}",
        "–" if entry.items_per_second is None else f"{entry.items_per_second:,.0f}",
        "–" if entry.step_bytes is None else f"{entry.step_bytes / 2**20:,.1f} MiB",
        *(["–" if entry.decode_state is None else str(entry.decode_state)] if comparison.kind == "text" else []),
        *([_at(comparison, entry, longest)] if (longest := longest_length(comparison)) else []),
    ]


def longest_length(comparison: Comparison) -> int | None:
    """The longest sequences of a task that any of the models was evaluated on."""
    return max((tokens for entry in comparison.entries for tokens, _ in entry.lengths), default=None)


def _at(comparison: Comparison, entry: Entry, tokens: int) -> str:
    quality = dict(entry.lengths).get(tokens)
    return "–" if quality is None else f"{comparison.quality_number(quality):.{comparison.measured.digits}f}"


def beyond(comparison: Comparison) -> str:
    """Which models take no longer sequences, and why; "" where all do."""
    ends = [f"{entry.mixer} {entry.beyond}" for entry in comparison.entries if entry.beyond]
    return f"Length ends: {'; '.join(ends)}." if ends else ""


def _count(value: int | None) -> str:
    if value is None:
        return "–"
    if value >= 1e9:
        return f"{value / 1e9:.2f} G"
    return f"{value / 1e6:.2f} M" if value >= 1e6 else f"{value / 1e3:.1f} k"


def _seeds_and_width(comparison: Comparison) -> str:
    several = any(len(entry.seeds) > 1 for entry in comparison.entries)
    wide = any(entry.width for entry in comparison.entries)
    also = ", and its width so that sizes are equal" if wide else ""
    return f"{'seeds' if several else 'seed'}; only the token mixer differs{also}"


def _section(section: Section) -> dict[str, Any]:
    comparison = section.comparison
    ranked = comparison.ranked()
    rows = []
    for entry in ranked:
        variant = registry.get(entry.mixer)
        rows.append(
            {
                "mixer": entry.mixer,
                "what": variant.summary,
                "best": entry is ranked[0] and entry.quality is not None,
                "failed": f"not trained: {entry.reason}" if entry.status == "failed" else "",
                "numbers": numbers(comparison, entry),
                "cost": variant.cost.time,
                "paper": f"{variant.paper.authors.split(',')[0]} {variant.paper.year}",
                "url": f"https://arxiv.org/abs/{variant.paper.arxiv}" if variant.paper.arxiv else None,
            }
        )
    return {
        "comparison": comparison,
        "summary": summary(comparison),
        "columns": [{"title": title, "number": number} for title, number in columns(comparison)],
        "rows": rows,
        "note": "Memory of a step is what the compiled training step needs for temporaries, beside parameters, "
        f"optimizer and batch. {DECODE_NOTE * (comparison.kind == 'text')}"
        f"{' '.join(filter(None, (beyond(comparison), noise.sentences(comparison))))}",
        "figures": [_figure(name, path, comparison) for name, path in section.figures.items()],
        "samples": [
            {"mixer": entry.mixer, "prompt": entry.sample.prompt, "text": entry.sample.text}
            for entry in ranked
            if entry.sample is not None
        ],
        "facts": {**comparison.data, **comparison.setting, **comparison.machine},
        "config": json.dumps(comparison.config, indent=1),
    }


def summary(comparison: Comparison) -> str:
    """One or two sentences: who is best, who is fastest, who could not take part."""
    ranked = [entry for entry in comparison.ranked() if entry.quality is not None]
    if not ranked:
        return "No mixer was trained."
    word, unit, digits = comparison.measured.name, comparison.measured.unit, comparison.measured.digits
    best, last = ranked[0], ranked[-1]
    text = f"{best.mixer} comes first with {comparison.quality_number(best.quality):.{digits}f}{unit} {word}"
    if len(ranked) > 1:
        text += f", {last.mixer} last with {comparison.quality_number(last.quality):.{digits}f}{unit}"
    if fast := [entry for entry in ranked if entry.items_per_second]:
        fastest = max(fast, key=lambda entry: entry.items_per_second)
        text += f"; {fastest.mixer} trains fastest, {fastest.items_per_second:,.0f} {comparison.items} per second"
    failed = [entry.mixer for entry in comparison.entries if entry.status == "failed"]
    return f"{text}." + (f" Not trained: {', '.join(failed)}." if failed else "")


def _figure(name: str, path: Path, comparison: Comparison) -> dict[str, Any]:
    title, caption = CAPTIONS[name]
    if name == "attention" and comparison.kind == "image":
        caption = f"The weights of the marked token on all others. {caption}"
    dark = path.with_name(f"{path.stem}-dark.png")
    width = struct.unpack(">I", path.read_bytes()[16:20])[0]
    return {
        "title": title,
        "caption": caption,
        "alt": f"{title}: {', '.join(entry.mixer for entry in comparison.entries)}",
        "light": _data_url(path),
        "dark": _data_url(dark),
        "width": min(WIDTH, width * 6 // 10),
    }


def _data_url(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
