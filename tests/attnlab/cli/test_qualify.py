"""`attnlab qualify`, what `attnlab doctor` says of it, and who calls it."""

import pytest

import pallas_kernels
from attnlab.cli import compare, generate, qualify, train
from attnlab.cli.main import main
from pallas_kernels import dispatch, qualification
from pallas_kernels.qualification import Verdict

KIND = "NVIDIA H200"


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A GPU with verdicts of two kernels."""
    monkeypatch.setenv("PALLAS_KERNELS_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(qualification, "_adopted", {})
    with dispatch.target("gpu", KIND):
        yield


VERDICTS = {
    ("linear_attention", "mosaic_gpu"): Verdict(True, "", 0.5, 1e-3, 2e-3),
    ("linear_attention", "triton"): Verdict(True, "3 ms against 2 ms of xla", 0.4, 3e-3, 2e-3),
}


def test_on_a_cpu_it_says_that_there_is_nothing_to_try(capsys):
    assert main(["qualify"]) == 0
    assert "there are no kernels to try on cpu: xla runs" in capsys.readouterr().out


def test_it_prints_what_was_found(gpu, capsys):
    qualification.remember(KIND, VERDICTS)
    assert main(["qualify"]) == 0
    out = capsys.readouterr().out
    assert "linear_attention: mosaic_gpu: qualified (1 ms, xla 2 ms; error 0.50 of what is allowed)" in out
    assert "linear_attention: triton: not qualified: 3 ms against 2 ms of xla" in out


def test_doctor_says_what_is_qualified(gpu, capsys):
    def told():
        assert main(["doctor"]) == 0
        return " ".join(capsys.readouterr().out.split())

    assert "qualified none not tried on NVIDIA H200; xla runs in place of what is not" in told()
    qualification.remember(KIND, VERDICTS)
    assert "qualified linear_attention: mosaic_gpu tried on NVIDIA H200" in told()


class Called(Exception):
    pass


@pytest.mark.parametrize("command", ["train", "compare", "generate"])
def test_training_commands_try_a_new_device_by_themselves(command, monkeypatch, tmp_path):
    def called():
        raise Called

    monkeypatch.setattr(qualify, "on_new_device", called)
    out_dir = ["--out-dir", str(tmp_path)]
    with pytest.raises(Called):
        if command == "train":
            train.run(["digits_vit", *out_dir])
        elif command == "compare":
            compare.run(["digits_vit", "--mixers", "softmax_attention", *out_dir])
        else:
            config = type("Config", (), {"model": type("Model", (), {"kind": "text"})})
            monkeypatch.setattr("attnlab.experiment.load", lambda run_dir: (config, None))
            generate.run([str(tmp_path), "--prompt", "a"])


def test_one_line_on_the_terminal(monkeypatch, capsys):
    monkeypatch.setattr(pallas_kernels, "qualify_new_device", lambda announce: announce("tried"))
    qualify.on_new_device()
    assert capsys.readouterr().err == "tried\n"
