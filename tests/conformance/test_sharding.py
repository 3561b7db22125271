"""Tensor parallelism: heads are cut along whole heads, so that devices only sum what their heads give."""

import attnlab
from tests.conformance.subjects import FEATURES, Subject, at_home, first_of_each_paper, parameters, those
from tests.conformance.two_devices import has_heads, traffic


@those(at_home, often=lambda subject: subject.name in first_of_each_paper())
def test_devices_only_sum(subject: Subject):
    """The call needs no collective but all-reduce, and those that a mechanism that itself mixes heads declares.

    Its gradient may also gather: what every device holds whole and its heads use in parts, as a norm over all heads or
    the tokens' own channels, has a gradient in parts. A mixer without heads, or whose parameters are all smaller than a
    token, has nothing to cut: every device computes it whole, and exchanges nothing.
    """
    declared = attnlab.get(subject.name).cls.collectives
    found = traffic(subject)
    small = all(leaf.size < FEATURES for leaf in parameters(subject.abstract()).values())
    if small or not (has_heads(subject) or found.cut):
        assert not (found.cut | found.call | found.gradient | declared)
        return
    assert found.cut, "no parameter is cut over the devices"
    assert "all-reduce" in found.call | declared, "devices sum nothing: heads are not cut over them"
    assert found.call - {"all-reduce"} <= declared, f"the call needs {sorted(found.call)}"
    assert declared <= found.call | found.gradient, f"declared, but not needed: {sorted(declared)}"
    assert found.gradient - {"all-reduce", "all-gather"} <= declared, f"the gradient needs {sorted(found.gradient)}"
