"""Runs that end in time: `--within` and `--begin-at`."""

import pytest

pytest_plugins = ["pytester"]


@pytest.fixture
def ten(pytester):
    pytester.makeconftest("from tests.limit import *")
    pytester.makepyfile("import pytest\n@pytest.mark.parametrize('i', range(10))\ndef test_it(i): print('ran', i)")
    return pytester


def test_tests_that_would_begin_too_late_are_skipped_and_counted(ten):
    ten.inline_run("--within", "1000").assertoutcome(passed=10)
    result = ten.runpytest("--within=-1", "-rs")
    result.assert_outcomes(skipped=10)
    result.stdout.fnmatch_lines("SKIPPED [[]10[]] *not begun within -1 seconds")


def test_the_order_begins_elsewhere_for_another_number(ten):
    def order(*options):
        lines = ten.runpytest("-s", "-q", *options).outlines
        return [int(word) for line in lines for word in line.split("ran ")[1:] for word in word.split(".")[0].split()]

    assert order() == list(range(10))
    orders = {tuple(order("--begin-at", str(number))) for number in (1, 2, 3)}
    assert len(orders) > 1
    assert all(sorted(each) == list(range(10)) for each in orders)
