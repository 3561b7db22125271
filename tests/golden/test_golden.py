"""Every golden case through its adapter: the numbers of the authors' own code, outputs and gradients."""

import importlib

import jax
import numpy as np
import pytest

from attnlab.interop.names import NEVER_LOADED, matches
from attnlab.interop.official import choose
from tests.golden.cases import DATA, SHARED, adapters, faults, find_cases, group, read

COMMITTED_BYTES = 24e6
# Made here with the authors' code, of what the whole collection has no case of.
OWN = {("dyn_perceiver", "resnet_basic"), ("dyn_perceiver", "resnet_bottleneck")}

# Cases whose input gradient is not that of their own outputs, which are met: in one it does not sum to zero over the
# channels in front of a LayerNorm, in both it differs from finite differences.
CONTRADICTED = {("l2vit", "l2vit_tiny"), ("tap_adl", "net_tiny")}


def every_case(test):
    """Runs a test for every case: the committed ones, one per class, always; the others with `make test-goldens`."""
    params = [
        pytest.param(
            path,
            id=f"{path.parent.name}-{path.stem}",
            marks=() if path.is_relative_to(DATA) else pytest.mark.goldens,
        )
        for path in find_cases(adapters())
    ]
    return pytest.mark.parametrize("path", params)(test)


def adapter(path):
    return importlib.import_module(f"tests.golden.adapters.{path.parent.name}")


@every_case
def test_the_authors_numbers(path):
    found = faults(path, adapter(path).run)
    if (path.parent.name, path.stem) in CONTRADICTED:
        assert [each.split()[0] for each in found] == ["grad_in/x"]
    else:
        assert not found


@pytest.mark.goldens
@every_case
def test_dumped_arrays_are_those_loaded(path):
    """Under the same names, but for those that a description declares to follow from the configuration."""
    officials = adapter(path).OFFICIAL
    meta, arrays = read(path)
    config, param = meta["config"] | meta["call"], group(arrays, "param")
    if completed := getattr(adapter(path), "whole", None):
        param = completed(meta, param, group(arrays, "in"))
    official = choose(officials, meta["class"], config, param)

    def load_and_dump(param):
        module = official.build(config)
        official.load(module, param)
        return official.dump(module)

    dumped = jax.jit(load_and_dump)(param)
    assert all(matches(name, (*official.ignore, *NEVER_LOADED)) for name in param.keys() - dumped.keys())
    for name, array in dumped.items():
        np.testing.assert_array_equal(array, param[name], err_msg=name)


def test_adapters_and_committed_cases_belong_together():
    slugs = {path.parent.name for path in DATA.glob("*/*.npz")}
    assert slugs == set(adapters()), f"without an adapter or without data: {sorted(slugs ^ set(adapters()))}"


def test_committed_cases_stay_small():
    assert sum(path.stat().st_size for path in DATA.glob("*/*.npz")) <= COMMITTED_BYTES


@pytest.mark.skipif(not SHARED.is_dir(), reason="the whole collection of golden cases is not beside this checkout")
def test_committed_cases_are_those_of_the_whole_collection():
    for path in DATA.glob("*/*.npz"):
        if (path.parent.name, path.stem) in OWN:
            continue
        assert path.read_bytes() == (SHARED / path.parent.name / path.name).read_bytes(), path
