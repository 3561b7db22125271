import pytest

import attnlab
from attnlab.cli import table
from attnlab.cli.main import main
from attnlab.cli.show_variant import constructor_options, facts
from pallas_kernels import dispatch


def test_list_prints_every_variant(capsys):
    assert main(["list"]) == 0
    out = capsys.readouterr().out
    for name in attnlab.names():
        assert name in out
    assert f"{len(attnlab.names())} variants" in out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--kind", "pooling"], {"kind": attnlab.Kind.POOLING}),
        (["--pattern", "causal-self"], {"pattern": attnlab.Pattern.CAUSAL_SELF}),
        (["--layout", "image", "--kind", "mixer"], {"layout": attnlab.Layout.IMAGE, "kind": attnlab.Kind.MIXER}),
    ],
)
def test_list_filters(capsys, arguments, expected):
    assert main(["list", "--names", *arguments]) == 0
    names = capsys.readouterr().out.split()
    assert names and tuple(names) == attnlab.names(**expected) and len(names) < len(attnlab.names())


def test_list_refuses_an_unknown_filter(capsys):
    assert main(["list", "--kind", "mixr"]) == 2
    assert "mixer" in capsys.readouterr().err


def test_list_suggests_an_option(capsys):
    assert main(["list", "--layuot", "image"]) == 2
    assert "--layout" in capsys.readouterr().err


def test_markdown_has_a_row_for_every_variant():
    text = table.markdown(attnlab.variants())
    for variant in attnlab.variants():
        (row,) = [line for line in text.splitlines() if line.startswith(f"| `{variant.name}` |")]
        assert variant.source.value in row
        assert table.paper_url(variant.paper) is None or f"]({table.paper_url(variant.paper)})" in row


def test_table_replaces_only_what_is_between_the_markers():
    readme = f"before\n{table.START}\nold\n{table.END}\nafter\n"
    new = table.with_table(readme, "| new |")
    assert new.startswith("before\n") and new.endswith("\nafter\n")
    assert "old" not in new and "| new |" in new
    assert table.with_table(new, "| new |") == new
    with pytest.raises(ValueError, match="variants:start"):
        table.with_table("no markers", "| new |")


def test_readme_is_checked_and_written(capsys, tmp_path, monkeypatch):
    readme = tmp_path / "README.md"
    readme.write_text(f"{table.START}\n{table.END}\n")
    monkeypatch.setattr(table, "readme_path", lambda: readme)
    assert main(["list", "--check"]) == 1
    assert "stale" in capsys.readouterr().err
    assert main(["list", "--write-readme"]) == 0
    assert main(["list", "--check"]) == 0


def test_show_prints_what_the_registry_and_the_class_say(capsys):
    assert main(["show", "lightning_attention_2"]) == 0
    out = capsys.readouterr().out
    variant = attnlab.get("lightning_attention_2")
    for text in (variant.paper.title.split(":")[0], "arxiv.org/abs/2401.04658", variant.cost.time, "head_dim", "Args:"):
        assert text in out
    assert "pallas_kernels.linear_attention" in out


@pytest.mark.parametrize("variant", attnlab.variants(), ids=lambda variant: variant.name)
def test_every_variant_can_be_shown(variant):
    known = facts(variant)
    assert known["kind"] == variant.kind and known["class"].endswith(variant.cls.__qualname__)
    options = {name: (default, meaning) for name, _, default, meaning in constructor_options(variant.cls)}
    assert "rngs" in options
    undocumented = [name for name, (_, meaning) in options.items() if not meaning.removesuffix("(a model fills it in)")]
    assert not undocumented, f"{variant.name} does not document {undocumented}"


def test_doctor_explains_every_implementation(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for section in ("Versions", "Devices", "Kernels", "Extras"):
        assert section in out
    for op in dispatch.ops():
        for choice in dispatch.explain(op):
            (line,) = [line for line in out.splitlines() if line.strip().startswith(f"{op}: {choice.name} ")]
            assert ("works" if choice.ok else choice.reason.split()[0]) in line
