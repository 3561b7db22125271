"""Sources by name, their settings, and what importing them costs."""

import dataclasses
import subprocess
import sys

import pytest
import tyro

from attnlab import data


def test_names():
    names = ["digits", "cifar10", "npz", "image_folder", "stdlib_text", "text_files", "task", "degraded"]
    assert list(data.SOURCES) == names
    assert all(source.name == name for name, source in data.SOURCES.items())


def test_open_takes_a_name_or_settings():
    by_name = data.open("digits", eval_fraction=0.5)
    assert by_name.info == data.open(data.Digits(eval_fraction=0.5)).info == data.Digits(eval_fraction=0.5).open().info
    assert by_name.info.name == "digits"


def test_misspelt_names_get_a_suggestion():
    with pytest.raises(KeyError, match="no data source is called 'digit': did you mean digits"):
        data.open("digit")
    with pytest.raises(KeyError, match="'qqq': there are "):
        data.open("qqq")
    with pytest.raises(TypeError, match="digits has no setting 'eval_fractoin': did you mean eval_fraction"):
        data.open("digits", eval_fractoin=0.1)


@pytest.mark.parametrize("source", data.SOURCES.values())
def test_settings_are_frozen_hashable_and_have_defaults(source):
    settings = source()
    assert settings == source() and hash(settings) == hash(source())
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.loading = None


@pytest.mark.parametrize("name", ["cifar10", "npz", "image_folder", "text_files"])
def test_sources_of_files_need_a_path(name):
    with pytest.raises(data.DataError, match=r"no path was given\n  expected: (.|\n)*\n  where to get it: "):
        data.open(name)


def test_settings_are_set_from_the_command_line():
    @dataclasses.dataclass(frozen=True)
    class Config:
        source: data.Source = dataclasses.field(default_factory=data.Digits)

    arguments = "source:image-folder --source.path p --source.augment.flip --source.loading.num-threads 3"
    parsed = tyro.cli(Config, args=arguments.split())
    assert parsed.source == data.ImageFolder(
        path="p", augment=data.Augment(flip=True), loading=data.Loading(num_threads=3)
    )


def test_importing_loads_nothing_heavy():
    code = "import sys, attnlab.data; print([m for m in ('grain', 'sklearn', 'PIL', 'torch') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
