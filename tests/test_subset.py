import sys

from attnlab import registry
from attnlab.registry import Kind
from tests import newest_python, subset


def test_every_family_of_mixers_has_a_mechanism():
    drawn = subset.mechanisms()
    assert len(drawn) == len(set(drawn))
    mixers = registry.variants(kind=Kind.MIXER)
    assert {v.family for v in mixers if v.slug in drawn} == {v.family for v in mixers}


def test_kernels_are_found():
    found = subset.kernels()
    assert {path.rpartition("/")[2] for path in found} == set(subset.PLATFORMS)
    assert all((subset.ROOT / path).is_dir() for path in found)


def test_the_newest_python_is_one_that_works(tmp_path, monkeypatch):
    """A shim without a Python behind it comes first on the path, as pyenv puts it."""
    minor = sys.version_info.minor
    shims = tmp_path / "shims"
    shims.mkdir()
    (shims / f"python3.{minor}").write_text("#!/bin/sh\nexit 127\n")
    (shims / f"python3.{minor}").chmod(0o755)
    monkeypatch.setenv("PATH", str(shims))
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path))
    monkeypatch.setattr(newest_python, "minors", lambda: [minor])
    assert newest_python.newest(minor - 1) is None
    real = tmp_path / "versions" / f"3.{minor}.0" / "bin"
    real.mkdir(parents=True)
    (real / "python").symlink_to(sys.executable)
    assert newest_python.newest(minor - 1) == str(real / "python")
    assert newest_python.newest(minor) is None


def test_versions_are_those_of_the_project():
    assert newest_python.minors()[-1] == 11 and newest_python.minors() == sorted(newest_python.minors(), reverse=True)
