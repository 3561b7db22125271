"""The comparison with PyTorch on a CPU, with another process's part played here."""

import os
import sys

import numpy as np
import pytest

from attnlab.bench import cpu
from attnlab.cli.main import main

SMALL = (
    cpu.Case("op", "op", (1, 6, 2, 4), causal=True),
    cpu.Case("mixer", "mixer", (2, 5, 8, 2), causal=True),
    cpu.Case("depthwise", "depthwise", (1, 4, 3)),
)


class Played:
    """Computes by plain formulas; `off` is what it is wrong by."""

    def __init__(self, off=0.0):
        self.off = off

    def ask(self, request):
        if request["what"] != "build":
            return {"seconds": 2.0}
        if request["kind"] == "mixer":
            return {"reason": "it has no mixers"}
        with np.load(request["inputs"]) as file:
            arrays = dict(file)
        case = next(case for case in SMALL if case.name == request["name"])
        found = cpu.ours(case)[2]
        y = attention(arrays) if case.kind == "op" else convolution(arrays)
        np.savez(request["outputs"], **found | {"y": y + self.off})
        return {"parameters": 0}


def attention(arrays):
    q, k, v = (np.moveaxis(arrays[name], 1, 2).astype(np.float64) for name in "qkv")
    scores = np.where(np.tri(q.shape[2], dtype=bool), q @ k.swapaxes(2, 3) / q.shape[-1] ** 0.5, -np.inf)
    e = np.exp(scores)
    return np.moveaxis(e / e.sum(-1, keepdims=True) @ v, 2, 1)


def convolution(arrays):
    x, kernel = arrays["x"].astype(np.float64), arrays["kernel"]
    side = x.shape[1]
    padded = np.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)])
    return sum(kernel[i, j] * padded[:, i : i + side, j : j + side] for i in range(3) for j in range(3))


def test_what_is_equal_is_timed_in_turns():
    op, mixer, depthwise = cpu.run(list(SMALL), Played(), rounds=2, seconds=0.001)
    assert op.forward[1] == depthwise.step[1] == 2000 and 0 < op.forward[0] < 2000
    assert mixer.reason == "it has no mixers"
    table = cpu.markdown([op, mixer, depthwise]).splitlines()
    assert len(table) == 5 and table[3] == "| mixer | it has no mixers |  |" and table[4].count("2e+03") == 2


def test_what_differs_is_not_timed():
    (line,) = cpu.run([SMALL[0]], Played(off=1e-3), rounds=1, seconds=0.001)
    assert line.reason.startswith("not the same: relative error") and line.forward is None


def test_a_mixer_gives_its_result_and_the_gradients_of_all_arrays():
    found = cpu.ours(SMALL[1])[2]
    assert set(found) == {"y", "x", "query", "key", "value", "out"}
    assert found["y"].shape == (2, 5, 8) and found["query"].shape == (8, 8)
    assert np.abs(found["query"]).max() > 0


def test_without_pytorch_it_says_what_is_missing(tmp_path, capsys, monkeypatch):
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    python.chmod(0o755)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setattr(os, "sched_setaffinity", lambda *_: None, raising=False)
    assert main(["bench", "cpu", "--torch-python", str(python)]) == 2
    assert "has no PyTorch" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--cases", "nothing"], "no name holds"),
        (["--rounds", "0"], "rounds must be"),
        (["--threads", "9999"], "at most"),
    ],
)
def test_mistakes(capsys, monkeypatch, arguments, words):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setattr(os, "sched_setaffinity", lambda *_: None, raising=False)
    assert main(["bench", "cpu", *arguments]) == 2
    assert words in capsys.readouterr().err
