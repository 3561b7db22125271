"""Every golden case through its adapter: the numbers of the authors' own code, outputs and gradients."""

import importlib
import itertools

import jax
import pytest

from tests.golden.cases import DATA, SHARED, adapters, faults, find_cases

COMMITTED_BYTES = 12e6
finished = itertools.count(1)


@pytest.fixture
def bounded_memory():
    """Compiled programs pile up over the cases; dropping them after each would compile shared ones anew."""
    yield
    if next(finished) % 8 == 0:
        jax.clear_caches()


@pytest.mark.parametrize("path", find_cases(adapters()), ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_the_authors_numbers(path, bounded_memory):
    run = importlib.import_module(f"tests.golden.adapters.{path.parent.name}").run
    assert not faults(path, run)


def test_adapters_and_committed_cases_belong_together():
    slugs = {path.parent.name for path in DATA.glob("*/*.npz")}
    assert slugs == set(adapters()), f"without an adapter or without data: {sorted(slugs ^ set(adapters()))}"


def test_committed_cases_stay_small():
    assert sum(path.stat().st_size for path in DATA.glob("*/*.npz")) <= COMMITTED_BYTES


@pytest.mark.skipif(not SHARED.is_dir(), reason="the whole collection of golden cases is not beside this checkout")
def test_committed_cases_are_those_of_the_whole_collection():
    for path in DATA.glob("*/*.npz"):
        assert path.read_bytes() == (SHARED / path.parent.name / path.name).read_bytes(), path
