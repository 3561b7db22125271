"""`attnlab new`: the right files, names and refusals; and the skeletons work, in a copy of the repository."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from attnlab.cli import checkout
from attnlab.cli.main import main
from attnlab.cli.new import FAMILIES, NewOptions, files

EVERY = [(kind, family) for kind, families in FAMILIES.items() for family in families]


@pytest.mark.parametrize(("kind", "family"), EVERY, ids=map("-".join, EVERY))
def test_files_hold_the_new_name_alone(kind, family):
    written = files(NewOptions(kind, "tiny_probe", family=family))
    for path, text in written.items():
        compile(text, str(path), "exec")
        assert "tiny_probe" in path.name
        assert re.search(r"\btiny_probe\b|\bTinyProbe\b", text)
        assert not re.search(r"skeleton", text.replace("SKELETON", ""), re.IGNORECASE)
    own, test, *described = map(str, written)
    assert own.endswith(f"/{family}/tiny_probe.py") and test.startswith("tests/attnlab/")
    official = ["attnlab/interop/tiny_probe.py", "tests/golden/adapters/tiny_probe.py"]
    assert described == ([] if kind in ("intervention", "task") else official)


def test_facts_of_the_paper_are_filled_in():
    options = NewOptions(
        "mixer",
        "tiny_probe",
        family="linear",
        source="third-party-code",
        repository="owner/name",
        title='On "Probes"',
        authors="Doe et al.",
        year=2020,
        arxiv="2001.00001",
        number=7,
    )
    text = files(options)[Path("attnlab/attention/linear/tiny_probe.py")]
    assert 'PAPER = Paper("On \\"Probes\\"", "Doe et al.", 2020, arxiv="2001.00001", number=7)' in text
    assert "source=Source.THIRD_PARTY,\n" in text and 'repository="owner/name",\n' in text
    assert "class TinyProbe(LinearMixer)" in text


def test_what_else_comes_from_a_paper_gets_files_of_its_own():
    written = files(NewOptions("pooling", "gaam.last"))
    assert [str(path) for path in written] == [
        "attnlab/pooling/gaam_last.py",
        "tests/attnlab/pooling/test_gaam_last.py",
    ]
    text = next(iter(written.values()))
    assert '"gaam.last",\n' in text and "class GaamLast(Pooling)" in text


def test_without_official_code_there_is_no_description():
    assert len(files(NewOptions("pooling", "tiny_probe", source="paper-text"))) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mixr", "tiny_probe"], "no kind is called 'mixr': did you mean mixer"),
        (["mixer", "tiny_probe", "--family", "liner"], "did you mean linear"),
        (["pooling", "tiny_probe", "--family", "dense"], "no pooling stands in 'dense'"),
        (["mixer", "tiny_probe", "--source", "paper"], "did you mean paper-text"),
        (["mixer", "TinyProbe"], "lower case"),
        (["mixer", "class"], "no word of Python"),
        (["mixer", "hedgehog"], "the name 'hedgehog' is taken"),
    ],
)
def test_refusals(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.setattr(checkout, "root", lambda: tmp_path)
    assert main(["new", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(checkout, "root", lambda: tmp_path)
    assert main(["new", "objective", "tiny_probe"]) == 0
    (tmp_path / "attnlab/objectives/tiny_probe.py").unlink()
    mine = tmp_path / "attnlab/interop/tiny_probe.py"
    mine.write_text("mine")
    assert main(["new", "objective", "tiny_probe"]) == 2
    assert "attnlab/interop/tiny_probe.py" in capsys.readouterr().err
    assert mine.read_text() == "mine" and not (tmp_path / "attnlab/objectives/tiny_probe.py").exists()


@pytest.mark.slow
def test_skeletons_work_and_conform(tmp_path):
    """One of each kind, and mixers on each base, in a copy of the repository."""
    for folder in ("attnlab", "pallas_kernels", "tests"):
        ignore = shutil.ignore_patterns("__pycache__", "*.npz")
        shutil.copytree(checkout.root() / folder, tmp_path / folder, ignore=ignore)
    for file in ("README.md", "pyproject.toml"):
        shutil.copy(checkout.root() / file, tmp_path / file)

    def run(*arguments: str) -> None:
        done = subprocess.run([sys.executable, "-m", *arguments], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]

    for kind in FAMILIES:
        for family in ("dense", "linear", "mixers") if kind == "mixer" else FAMILIES[kind][:1]:
            run("attnlab.cli.main", "new", kind, f"toy_{kind}_{family}", "--family", family)
    run("ruff", "format", "--check", "attnlab", "tests/attnlab")
    described = [path.stem for path in (tmp_path / "attnlab/interop").glob("toy_*.py")]
    assert len(described) == len(FAMILIES)  # three mixers, neither intervention nor task
    run("timeit", "-n1", "-r1", "; ".join(f"from tests.golden.adapters import {name}" for name in described))
    run("attnlab.cli.main", "docs", "toy_mixer_linear", "toy_module_multimodal", "toy_task_tasks")
    run("pytest", "-q", "-p", "no:cacheprovider", "tests/conformance", "tests/attnlab", "-k", "toy_ and not is_current")
