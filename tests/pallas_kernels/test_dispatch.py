import subprocess
import sys
import types

import pytest

from pallas_kernels import dispatch


@pytest.fixture
def op(monkeypatch):
    """An op with a TPU implementation, one that lacks a package, a choosy one and one that takes all."""
    modules = {
        "fake_choosy": types.SimpleNamespace(supports=lambda args: None if args == "small" else f"{args} is too large"),
        "fake_any": types.SimpleNamespace(supports=lambda args: None),
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(dispatch, "_tables", {})
    dispatch.register(
        "fake_op",
        [
            dispatch.Implementation("tpu", "module_that_is_not_there", platforms=("tpu",)),
            dispatch.Implementation("triton", "module_that_is_not_there", packages=("package_that_is_not_there",)),
            dispatch.Implementation("choosy", "fake_choosy"),
            dispatch.Implementation("any", "fake_any"),
        ],
    )
    return "fake_op"


def test_the_first_that_supports_the_arguments_is_chosen(op):
    assert dispatch.choose(op, "small", platform="cpu").name == "choosy"
    assert dispatch.choose(op, "big", platform="cpu").name == "any"


def test_explain_gives_the_reasons_without_importing_what_cannot_run(op):
    assert dispatch.explain(op, "big", platform="cpu") == [
        ("tpu", False, "needs tpu; this machine has cpu"),
        ("triton", False, "needs the package package_that_is_not_there, which is not installed"),
        ("choosy", False, "big is too large"),
        ("any", True, ""),
    ]
    assert [choice.ok for choice in dispatch.explain(op, platform="cpu")] == [False, False, True, True]


def test_a_named_one_runs_or_raises(op):
    assert dispatch.choose(op, "small", "any", platform="cpu").name == "any"
    with pytest.raises(dispatch.UnsupportedError, match="fake_op: implementation='choosy' refuses: big is too large"):
        dispatch.choose(op, "big", "choosy", platform="cpu")
    with pytest.raises(dispatch.UnsupportedError, match="needs tpu; this machine has gpu"):
        dispatch.choose(op, "small", "tpu", platform="gpu")


def test_unknown_names_get_a_suggestion(op):
    with pytest.raises(ValueError, match="'chosy' of fake_op is unknown, did you mean 'choosy'"):
        dispatch.choose(op, "small", "chosy")
    with pytest.raises(ValueError, match="unknown op 'fake_up', did you mean 'fake_op'"):
        dispatch.explain("fake_up")


def test_when_all_refuse_the_message_holds_all_reasons(op):
    dispatch.register(op, dispatch.implementations(op)[:3])
    with pytest.raises(
        dispatch.UnsupportedError, match=r"tpu: needs tpu.*triton: needs the package.*choosy: big is too"
    ):
        dispatch.choose(op, "big", platform="cpu")


def test_names_in_a_table_are_different(op):
    with pytest.raises(ValueError, match="must have different names"):
        dispatch.register(op, dispatch.implementations(op)[:1] * 2)


def test_import_is_light():
    # JAX loads libtpu itself since 0.11.
    code = (
        "import sys, jax; of_jax = set(sys.modules); import pallas_kernels; print([m for m in set(sys.modules) - of_jax"
    )
    code += " if m.split('.')[0] in ('torch', 'triton', 'jax_triton', 'libtpu', 'flax', 'attnlab')])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_the_op_is_registered():
    assert "linear_attention" in dispatch.ops()
    assert [choice.name for choice in dispatch.explain("linear_attention")][-2:] == ["xla", "reference"]


def test_a_target_stands_for_the_machine(op):
    assert dispatch.current_platform() == "cpu"
    with dispatch.target("gpu", device_kind="NVIDIA H200"):
        assert (dispatch.current_platform(), dispatch.current_device_kind()) == ("gpu", "NVIDIA H200")
        with dispatch.target("tpu"):
            assert (dispatch.current_platform(), dispatch.current_device_kind()) == ("tpu", None)
            assert dispatch.explain(op)[0].reason != "needs tpu; this machine has tpu"
        with pytest.raises(dispatch.UnsupportedError, match="needs tpu; this machine has gpu"):
            dispatch.choose(op, "small", "tpu")
    assert (dispatch.current_platform(), dispatch.current_device_kind()) == ("cpu", "cpu")
    with pytest.raises(ValueError, match="platform must be one of cpu, gpu, tpu, got 'rocm'"), dispatch.target("rocm"):
        pass
