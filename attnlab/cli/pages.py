"""The pages of `docs/mechanisms`, one for each variant: each is made of its own file and registration alone."""

import re

from attnlab.cli import describe
from attnlab.cli.snippet import snippet
from attnlab.cli.table import cell, line
from attnlab.registry import Variant

NOTE = "<!-- Written by `attnlab docs` from the source file; do not edit by hand. -->"


def page(variant: Variant) -> str:
    """The page of a variant in Markdown."""
    parts = [
        f"{NOTE}\n\n# `{variant.name}`",
        f"{escape(variant.summary[0].upper() + variant.summary[1:])}.",
        "\n".join(f"- **{name}:** {answer}" for name, answer in _facts(variant).items()),
        "## What it computes",
        escape(describe.equations(variant)),
    ]
    if isinstance(variant.target, type):
        parts.append(f"### `{variant.target.__name__}`")
    else:
        parts.append(f"### `{variant.target.__name__}{describe.signature(variant.target)}`")
    parts += [escape(describe.prose(variant)), "## In use", f"```python\n{snippet(variant)}\n```"]
    if found := describe.options(variant.target):
        rows = [
            line([f"`{o.name}`", f"`{cell(o.type)}`" if o.type else "", f"`{cell(o.default)}`" if o.default else "",
                  cell(escape(o.meaning))])
            for o in found
        ]  # fmt: skip
        titles = ("option" if isinstance(variant.target, type) else "argument", "type", "default", "meaning")
        parts.append(f"## {titles[0].capitalize()}s")
        parts.append("\n".join([line(titles), "|" + " --- |" * len(titles), *rows]))
    return "\n\n".join(part for part in parts if part) + "\n"


def _facts(variant: Variant) -> dict[str, str]:
    paper, url = variant.paper, describe.paper_url(variant.paper)
    title = f"[{paper.title}]({url})" if url else paper.title
    source = variant.source.value
    if variant.repository:
        source += f", [{variant.repository}](https://github.com/{variant.repository})"
    path = variant.target.__module__.replace(".", "/") + ".py"
    patterns, layouts = ", ".join(sorted(variant.patterns)), ", ".join(sorted(variant.layouts))
    facts = {
        "Kind": f"{variant.kind}, family {variant.family}",
        "Paper": f"{title}, {paper.authors}, {paper.year}",
        "Checked against": source,
        "Patterns": patterns,
        "Layouts": layouts,
        "Time": escape(variant.cost.time),
        "Memory": escape(variant.cost.memory),
        "Decode state": escape(describe.decode_state(variant)),
        "Kernel": f"[`{variant.kernel}`](../../pallas_kernels/{variant.kernel})" if variant.kernel else "",
        "Named sizes": ", ".join(f"`{name}`" for name in describe.sizes_of(variant)),
        "File": f"[{path}](../../{path})",
    }
    return {name: answer for name, answer in facts.items() if answer}


def escape(text: str) -> str:
    """Plain text as Markdown: signs that Markdown reads are escaped, but not in `code` nor in indented equations."""
    blocks = re.split(r"((?:^ {4,}.*(?:\n|$))+)", text, flags=re.MULTILINE)
    return "".join(block if i % 2 else _escape_prose(block) for i, block in enumerate(blocks))


def _escape_prose(text: str) -> str:
    pieces = re.split(r"(`[^`]*`)", text)
    return "".join(piece if i % 2 else re.sub(r"([*_<\[\]])", r"\\\1", piece) for i, piece in enumerate(pieces))
