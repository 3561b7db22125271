"""`attnlab docs`: writes what is generated from the registry: the README's tables, and a page for each variant."""

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import tyro

from attnlab import registry
from attnlab.cli import checkout, pages, table

MECHANISMS = Path("docs", "mechanisms")


@dataclasses.dataclass(frozen=True)
class DocsOptions:
    """Write the pages of docs/mechanisms and the README's tables, in a checkout of the repository.

    Attributes:
      names: of variants, to write their pages alone; everything when none is named.
      check: write nothing, and fail if something would be written.
    """

    names: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    check: bool = False


def run(arguments: list[str]) -> int:
    """Runs the command; see `attnlab docs --help`."""
    options = tyro.cli(DocsOptions, args=arguments, prog="attnlab docs", config=(tyro.conf.FlagCreatePairsOff,))
    root, stale = checkout.root(), False
    for path, text in stale_files(root, options.names):
        stale = True
        shown = path.relative_to(root)
        if options.check:
            does = "is of no variant" if text is None else "is stale"
            print(f"{shown} {does}; `make table` writes all anew", file=sys.stderr)
        elif text is None:
            path.unlink()
            print(f"{shown}: removed, no variant is called so")
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            print(f"{shown}: written")
    return int(options.check and stale)


def stale_files(root: Path, names: tuple[str, ...] = ()) -> Iterator[tuple[Path, str | None]]:
    """Files that are not what the registry says, each with its new text; None for a page whose variant is gone.

    With names, the pages of these variants alone.
    """
    chosen = [registry.get(name) for name in names] or registry.variants()
    for variant in chosen:
        path, text = root / MECHANISMS / f"{variant.name}.md", pages.page(variant)
        if not path.is_file() or path.read_text() != text:
            yield path, text
    if names:
        return
    known = {variant.name for variant in chosen}
    for path in sorted((root / MECHANISMS).glob("*.md")):
        if path.name.removesuffix(".md") not in known:
            yield path, None
    readme = root / "README.md"
    old = readme.read_text()
    if old != (new := table.with_table(old, table.markdown(chosen))):
        yield readme, new
