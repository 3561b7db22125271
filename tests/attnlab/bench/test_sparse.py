"""The benchmark of sparse attention: problems, the gate, the table and the files; never a time."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.bench import sparse, sparse_torch
from attnlab.cli.main import main
from pallas_kernels import block_sparse_attention
from pallas_kernels.masks import Prefix, SlidingWindow


@pytest.fixture
def small(monkeypatch):
    """One small case of each op in place of those that benchmarks time."""
    for name in ("BLOCK_SPARSE", "NEIGHBORHOOD"):
        first = next(case for case in getattr(sparse, name) if "window_8192" in case.name or "k7" in case.name)
        changes = {"queries": 96, "mask": SlidingWindow(9, 0)} if name == "BLOCK_SPARSE" else {"batch": 2}
        monkeypatch.setattr(sparse, name, (dataclasses.replace(first, heads=2, key_size=8, name="small", **changes),))


def test_pairs_are_counted(small):
    problem = sparse.Problem("block_sparse_attention", "small", "float32", "gradient")
    assert problem.share == 11 / 36
    assert problem.operations() == pytest.approx(4 * 96 * 96 * 2 * 8 * 3.5 * 11 / 36)
    assert str(problem) == "small, gradient, B1 N96 H2 D8, float32, 30.6 % of the pairs"
    with pytest.raises(ValueError, match="name must be one of small, got 'large'"):
        sparse.Problem("block_sparse_attention", "large")


def test_a_wrong_result_is_not_timed(small, monkeypatch):
    problem = sparse.Problem("block_sparse_attention", "small", "float32", "gradient")

    def wrong(q, k, v):
        return 1.001 * block_sparse_attention(q, k, v, mask=problem.mask)

    monkeypatch.setattr(sparse, "_contenders", lambda *_: [("fine", problem.function("xla"), True, True),
                                                           ("wrong", wrong, True, True)])  # fmt: skip
    fine, off = sparse.solve(problem, 0.0)
    assert fine.seconds > 0 and fine.error < 1e-6 and not fine.failed
    assert off.seconds is None and off.error > 1e-4 and off.failed and "relative error" in off.reason


@pytest.mark.parametrize("op", sparse.OPS)
def test_the_command_writes_what_it_measured(op, small, tmp_path, capsys):
    modes = ("forward",) if op == sparse.OPS[0] else ("gradient",)
    assert main(["bench", op, "--seconds", "0", "--modes", *modes, "--out-dir", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "attnlab xla" in printed and "jax.nn.dot_product_attention, masked" in printed
    saved = json.loads((tmp_path / "results.json").read_text())
    of = {row["contender"]: row for row in saved["results"]}
    assert of["dense"]["seconds"] > 0 and of["dense"]["error"] is None
    assert of["attnlab xla"]["efficiency"] > 0 and of["attnlab xla"]["rate"] > 0
    assert (tmp_path / f"times_{modes[0]}.png").read_bytes().startswith(b"\x89PNG")
    assert jnp.isfinite(of["attnlab xla"]["error"])
    assert main(["bench", op, "--cases", "smal"]) != 0
    assert "did you mean small?" in capsys.readouterr().err


@pytest.mark.parametrize("op", sparse.OPS)
def test_pytorch_is_gated_and_timed_in_turns(op, small):
    problem = sparse.Problem(op, "small")
    n = problem.sizes[1]
    want = np.asarray(problem.mask(np.arange(n)[:, None], np.arange(n)))

    class Peer:
        """Computes with the rule that it is told, as the process of PyTorch does; and then something else."""

        def ask(self, request):
            if request["what"] != "build":
                return {"seconds": 1.0}
            if request["contender"] == "flex":
                return {"reason": "no compiler"}
            with np.load(request["inputs"]) as file:
                coordinates = np.unravel_index(np.arange(n), request["lengths"])
                seen = np.ones((n, n), bool)
                for a, x in enumerate(coordinates):
                    seen &= (x >= file[f"first{a}"][x][:, None]) & (x <= file[f"last{a}"][x][:, None])
                np.testing.assert_array_equal(seen, want)
                y = block_sparse_attention(*(file[name] for name in "qkv"), mask=problem.mask)
            np.savez(request["outputs"], y=y if op == sparse.OPS[0] else y * 1.5)
            return {"parameters": 0}

    masked, flex = list(sparse.solve(problem, 0.0, torch=Peer()))[-2:]
    assert (flex.contender, flex.reason, flex.failed) == ("torch FlexAttention", "no compiler", False)
    if op == sparse.OPS[0]:
        assert masked.seconds == 1.0 and masked.ours > 0 and masked.error < 1e-6
    else:
        assert masked.seconds is None and "relative error" in masked.reason


def test_rules_as_pytorch_is_told_them():
    assert sparse_torch.axis_of(SlidingWindow(3, 1) | Prefix(2), 20, prefix=2).last.tolist()[:4] == [-1, 2, 3, 4]
    assert sparse_torch.axis_of(SlidingWindow(3, 1) | Prefix(2), 20) is None
