"""The README's tables and the pages of docs/mechanisms are what the registry says, and their programs run."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import attnlab
from attnlab import Cost, Example, Kind, Paper, Source, registry
from attnlab.cli import checkout, describe, docs, pages, table
from attnlab.cli.main import main
from attnlab.cli.snippet import snippet

# Of each kind and family the first by name.
ONE_OF_EACH_FAMILY = list(
    {(variant.kind, variant.family): variant for variant in reversed(attnlab.variants())}.values()
)
every_variant = pytest.mark.parametrize("variant", attnlab.variants(), ids=lambda variant: variant.name)


@every_variant
def test_page_is_current(variant):
    path = checkout.root() / docs.MECHANISMS / f"{variant.name}.md"
    assert path.is_file(), f"{path.name} is missing: `make table` writes it"
    assert path.read_text() == pages.page(variant), f"{path.name} is stale: `make table` writes it anew"


def test_tables_are_current_and_no_page_is_left_over():
    readme = (checkout.root() / "README.md").read_text()
    fresh = table.with_table(readme, table.markdown(attnlab.variants()))
    assert readme == fresh, "the README's tables of variants are stale: `make table` writes them anew"
    there = {path.name.removesuffix(".md") for path in (checkout.root() / docs.MECHANISMS).iterdir()}
    assert there == set(attnlab.names())


@every_variant
def test_every_option_is_described(variant):
    """`Args:` has an entry for each argument: several names in front of one colon describe none of them."""
    bare = [option.name for option in describe.options(variant.target) if not option.meaning.partition("(a model")[0]]
    assert not bare, f"{variant.target.__name__} does not say what {', '.join(bare)} is"


@pytest.mark.parametrize("variant", ONE_OF_EACH_FAMILY, ids=lambda variant: variant.name)
def test_snippet_runs(variant):
    """Traced, which runs every line of it but computes nothing; `test_snippet_computes` computes, for all."""

    def program():
        names = {}
        exec(compile(snippet(variant), f"{variant.name}.md", "exec"), names)
        return _results(names)

    if variant.kind is Kind.TASK:  # of numpy alone: nothing to trace, and cheap
        assert program()
    else:
        assert jax.tree.leaves(jax.eval_shape(program))


@pytest.mark.slow
@every_variant
def test_snippet_computes(variant):
    names = {}
    exec(compile(snippet(variant), f"{variant.name}.md", "exec"), names)
    for leaf in jax.tree.leaves(_results(names)):
        assert not jnp.issubdtype(jnp.asarray(leaf).dtype, jnp.floating) or jnp.isfinite(leaf).all()


def _results(names):
    return [names[name] for name in ("y", "y_t", "logits", "result", "answer") if name in names]


def test_markdown_has_a_row_for_every_variant():
    text = table.markdown(attnlab.variants())
    for variant in attnlab.variants():
        (row,) = [line for line in text.splitlines() if line.startswith(f"| [`{variant.name}`](")]
        assert variant.source.value in row


def test_table_replaces_only_what_is_between_the_markers():
    readme = f"before\n{table.START}\nold\n{table.END}\nafter\n"
    new = table.with_table(readme, "| new |")
    assert new.startswith("before\n") and new.endswith("\nafter\n")
    assert "old" not in new and "| new |" in new
    assert table.with_table(new, "| new |") == new
    with pytest.raises(ValueError, match="variants:start"):
        table.with_table("no markers", "| new |")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty checkout, and a registry of three variants alone."""
    (tmp_path / "README.md").write_text(f"{table.START}\n{table.END}\n")
    monkeypatch.setattr(checkout, "root", lambda: tmp_path)
    few = {name: attnlab.get(name) for name in ("softmax_attention", "efficient_probing", "tnl.transnormer")}
    monkeypatch.setattr(registry, "_variants", few)
    return tmp_path


def test_docs_are_checked_and_written(capsys, folder):
    assert main(["docs", "--check"]) == 1
    assert "softmax_attention.md is stale" in capsys.readouterr().err
    assert main(["docs"]) == 0
    assert main(["docs", "--check"]) == 0
    left_over = folder / docs.MECHANISMS / "gone.md"
    left_over.write_text("")
    assert main(["docs", "--check"]) == 1 and left_over.exists()
    assert main(["docs"]) == 0 and not left_over.exists()


def test_one_page_is_written_alone(capsys, folder):
    assert main(["docs", "efficient_probing"]) == 0
    written = [path.name for path in folder.rglob("*") if path.is_file()]
    assert sorted(written) == ["README.md", "efficient_probing.md"]
    assert (folder / "README.md").read_text() == f"{table.START}\n{table.END}\n"
    assert main(["docs", "efficient_probin"]) == 2
    assert "did you mean efficient_probing" in capsys.readouterr().err


class Gate(nnx.Module):
    """Two streams, each gated by the other.

    Args:
      sharpness: of the gates.
    """

    def __init__(self, sharpness: float = 1.0):
        self.sharpness = sharpness

    def __call__(self, a, b):
        return a * jax.nn.sigmoid(self.sharpness * b), b * jax.nn.sigmoid(self.sharpness * a)


def soft_threshold(x, *, by: float = 0.5):
    """x, nearer to 0.

    Args:
      x: of any shape.
      by: how much.
    """
    return jnp.sign(x) * jnp.maximum(jnp.abs(x) - by, 0)


@pytest.mark.parametrize(
    ("target", "kind", "small", "expected"),
    [
        (Gate, Kind.MODULE, lambda: Example(Gate(), (jnp.ones((2, 3)), jnp.ones((2, 3)))), "# 1: float32[2, 3]"),
        (soft_threshold, Kind.FUNCTION, lambda: Example(soft_threshold, (jnp.ones(3),), {"by": 0.2}), "# by: 0.2"),
    ],
)
def test_pages_of_the_other_kinds(monkeypatch, capsys, target, kind, small, expected):
    monkeypatch.setattr(registry, "_variants", {})
    facts = {"paper": Paper("On Gates", "Doe et al.", 2020), "source": Source.THIRD_PARTY, "cost": Cost("O(N)", "O(1)")}
    registry.register("gates", kind=kind, small=small, summary="a gate", **facts)(target)
    text = pages.page(attnlab.get("gates"))
    assert expected in text and f"family {__name__.split('.')[0]}" in text and "third-party code" in text
    assert main(["show", "gates"]) == 0
    out = capsys.readouterr().out
    assert "On Gates" in out and target.__name__ in out
    names = {}
    example = small()
    program = snippet(attnlab.get("gates"))
    exec(program.replace(f"from {__name__} import", "#"), names | {target.__name__: target}, names)
    for got, want in zip(
        jax.tree.leaves(names["result"]), jax.tree.leaves(example.call(*example.args, **example.kwargs)), strict=True
    ):
        assert (got == want).all()


def test_escaping_leaves_code_and_equations_alone():
    text = "a_b and `c_d`, *e*\n\n    f_i = g_i * [h]\n\n<tag>"
    assert pages.escape(text) == "a\\_b and `c_d`, \\*e\\*\n\n    f_i = g_i * [h]\n\n\\<tag>"
