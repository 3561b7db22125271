"""Tests of one subject run after one another, so that they share its compiled programs."""

import pathlib

import pytest

HERE = pathlib.Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = [i for i, item in enumerate(items) if HERE in item.path.parents]

    def subject(item: pytest.Item) -> str:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        return str(parameters.get("subject", ""))

    for i, item in zip(here, sorted((items[i] for i in here), key=subject), strict=True):
        items[i] = item
