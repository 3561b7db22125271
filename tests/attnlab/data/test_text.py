"""Tokens, windows, packing, and the two text sources."""

import itertools
import platform
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from attnlab import data
from attnlab.data import stdlib_text
from attnlab.data.text import text_dataset
from attnlab.data.tokenizer import END_OF_TEXT, PAD, VOCAB_SIZE, decode, encode


def opened(documents, pack=False):
    return text_dataset("t", {"train": documents, "eval": documents}, pack=pack, loading=data.Loading())


@pytest.fixture(scope="module")
def library():
    return data.open("stdlib_text", max_bytes=300_000)


def test_tokens_are_bytes():
    every = bytes(range(256))
    assert encode(every).tolist() == list(range(256)) and encode(every).dtype == np.int32
    assert decode(encode(every)) == every
    assert decode(encode("λ → é")).decode() == "λ → é"
    assert decode([72, END_OF_TEXT, 105, PAD]) == b"Hi"
    assert decode([]) == b"" and encode("").shape == (0,)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([VOCAB_SIZE], "ids must lie in 0..257, not 258..258"),
        ([-1, 3], "ids must lie in 0..257, not -1..3"),
        ([0.5], "integers"),
        (np.zeros((1, 2), int), r"shape \(N,\), not int64 \(1, 2\)"),
    ],
)
def test_decode_refuses(ids, message):
    with pytest.raises(ValueError, match=message):
        decode(ids)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 100])
@pytest.mark.parametrize("pack", [False, True])
def test_windows_predict_every_token_but_the_first_exactly_once(length, pack):
    dataset = opened([b"abc", b"de"], pack)
    row = [*b"abc", END_OF_TEXT, *b"de", END_OF_TEXT]
    batches = list(dataset.eval(2, sequence_length=length))
    inputs, targets, weight = (np.concatenate([b[k].ravel() for b in batches]) for k in ("inputs", "targets", "weight"))
    used = weight > 0
    pairs = list(zip(inputs[used].tolist(), targets[used].tolist(), strict=True))
    expected = list(itertools.pairwise(row))
    assert pairs == ([pair for pair in expected if pair != (END_OF_TEXT, ord("d"))] if pack else expected)
    assert dataset.num_examples("eval", sequence_length=length) == -(-6 // length)
    assert inputs.dtype == targets.dtype == np.int32 and weight.dtype == np.float32


def test_packed_window():
    batch = next(opened([b"ab", b"c"], pack=True).eval(1, sequence_length=7))
    assert batch["inputs"].tolist() == [[97, 98, END_OF_TEXT, 99, END_OF_TEXT, PAD, PAD]]
    assert batch["targets"].tolist() == [[98, END_OF_TEXT, 99, END_OF_TEXT, PAD, PAD, PAD]]
    assert batch["segment_ids"].tolist() == [[1, 1, 1, 2, 2, 0, 0]]
    assert batch["positions"].tolist() == [[0, 1, 2, 0, 1, 0, 0]]
    assert batch["weight"].tolist() == [[1, 1, 0, 1, 0, 0, 0]]
    assert batch["segment_ids"].dtype == batch["positions"].dtype == np.int32


def test_segments_and_positions_begin_anew_in_every_window():
    second = list(opened([b"abcde", b"f"], pack=True).eval(1, sequence_length=4))[1]
    assert second["inputs"].tolist() == [[101, END_OF_TEXT, 102, END_OF_TEXT]]
    assert second["segment_ids"].tolist() == [[1, 1, 2, 2]]
    assert second["positions"].tolist() == [[0, 1, 0, 1]]


def test_windows_agree_with_a_plain_loop_over_documents():
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 256, n, np.uint8).tobytes() for n in rng.integers(1, 40, 30)]
    length, stream = 16, []
    for number, document in enumerate(documents):
        stream += [(token, number, place) for place, token in enumerate([*document, END_OF_TEXT])]
    for i, batch in enumerate(opened(documents, pack=True).eval(1, sequence_length=length)):
        window = stream[i * length : (i + 1) * length]
        first = window[0]
        count = len(window)
        assert batch["inputs"][0, :count].tolist() == [token for token, _, _ in window]
        assert batch["segment_ids"][0, :count].tolist() == [1 + number - first[1] for _, number, _ in window]
        positions = [place - (first[2] if number == first[1] else 0) for _, number, place in window]
        assert batch["positions"][0, :count].tolist() == positions
        assert not batch["segment_ids"][0, count:].any()


def test_text_needs_a_sequence_length():
    with pytest.raises(ValueError, match="t is text: sequence_length must be at least 1, not None"):
        opened([b"abc"]).train(1, 0)
    with pytest.raises(ValueError, match="at least 1, not 0"):
        opened([b"abc"]).eval(1, sequence_length=0)


def test_text_resumes_within_an_epoch_and_refuses_another_length():
    dataset = opened([bytes(range(200))], pack=True)
    batches = dataset.train(3, 0, sequence_length=8)
    for _ in range(5):
        next(batches)
    fresh = dataset.train(3, 0, sequence_length=8)
    fresh.set_state(batches.get_state())
    for _ in range(9):
        left, right = next(batches), next(fresh)
        for name in left:
            np.testing.assert_array_equal(left[name], right[name])
    with pytest.raises(ValueError, match="sequence_length was 8 and is now 16"):
        dataset.train(3, 0, sequence_length=16).set_state(batches.get_state())


def test_text_epoch_is_shuffled_and_complete():
    dataset = opened([bytes(range(64))])
    batches = dataset.train(1, 0, sequence_length=4)
    firsts = [int(next(batches)["inputs"][0, 0]) for _ in range(16)]
    assert sorted(firsts) == list(range(0, 64, 4)) != firsts


def test_one_text_file_gives_its_end_to_evaluation(tmp_path):
    (tmp_path / "wiki.train.raw").write_bytes(bytes(range(100)))
    dataset = data.open("text_files", path=str(tmp_path / "wiki.train.raw"))
    assert (dataset.info.train_size, dataset.info.eval_size, dataset.info.vocab_size) == (91, 11, VOCAB_SIZE)
    batch = next(dataset.eval(1, sequence_length=10))
    assert batch["inputs"].tolist() == [list(range(90, 100))] and batch["targets"][0, -1] == END_OF_TEXT


def test_text_files_with_an_evaluation_file(tmp_path):
    (tmp_path / "a").write_text("training text\n = Heading = \n")
    (tmp_path / "b").write_text("other")
    dataset = data.open("text_files", path=str(tmp_path / "a"), eval_path=str(tmp_path / "b"))
    assert decode(next(dataset.eval(1, sequence_length=5))["inputs"][0]) == b"other"


def test_a_directory_is_split_by_file(tmp_path):
    for i in range(20):
        (tmp_path / f"{i:02}.txt").write_text(f"<{i:02}>")
    (tmp_path / "skip.md").write_text("skipped")
    (tmp_path / "empty.txt").write_text("")
    dataset = data.open("text_files", path=str(tmp_path))
    assert (dataset.info.train_size, dataset.info.eval_size) == (18 * 5, 2 * 5)
    texts = [decode(next(dataset.eval(1, split=split, sequence_length=89))["inputs"][0]) for split in ("train", "eval")]
    assert texts[1] == b"<05><15>" and b"<05>" not in texts[0] and b"skip" not in texts[0]
    assert data.open("text_files", path=str(tmp_path), pattern="*.md").info.train_size == 7


def test_text_file_errors(tmp_path):
    with pytest.raises(data.DataError, match=r"none.txt: no such file or directory(.|\n)*WikiText"):
        data.open("text_files", path=str(tmp_path / "none.txt"))
    with pytest.raises(data.DataError, match=r"holds no files that match '\*.txt'"):
        data.open("text_files", path=str(tmp_path))
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(data.DataError, match=r"a.txt: is empty"):
        data.open("text_files", path=str(tmp_path / "a.txt"))
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(data.DataError, match=r"a.txt: is too small to leave text for the train split"):
        data.open("text_files", path=str(tmp_path / "a.txt"))
    with pytest.raises(ValueError, match="eval_fraction must lie between 0 and 1"):
        data.open("text_files", path=str(tmp_path / "a.txt"), eval_fraction=1)


def test_library_text_is_python_of_this_version(library):
    info = library.info
    assert info.details["python"] == platform.python_version()
    assert info.train_size > info.eval_size > 0
    assert info.train_size + info.eval_size <= 300_000 + int(info.details["files"])
    assert len(info.digest) == 64 and info.digest == data.open("stdlib_text", max_bytes=300_000).info.digest
    text = b"".join(decode(batch["inputs"][0]) for batch in library.eval(1, split="train", sequence_length=4096))
    assert b"import " in text and b"def " in text


def test_library_text_holds_no_installed_packages_or_tests():
    texts = stdlib_text.read_library(Path(sysconfig.get_path("stdlib")))
    assert {"dataclasses.py", "json/decoder.py"} < texts.keys()
    assert list(texts) == sorted(texts)
    assert texts["json/decoder.py"] == (Path(sysconfig.get_path("stdlib")) / "json" / "decoder.py").read_bytes()
    for path in texts:
        assert not {"site-packages", "dist-packages", "test", "tests"} & set(path.split("/"))
        assert "_sysconfigdata" not in path


def test_library_split_is_by_file_and_independent_of_other_files(tmp_path, monkeypatch):
    monkeypatch.setattr(stdlib_text.sysconfig, "get_path", lambda name: str(tmp_path))
    for i in range(40):
        (tmp_path / f"m{i:02}.py").write_text(f"{i:02}")
    for skipped in ("site-packages/x.py", "json/tests/y.py", "_sysconfigdata_linux.py", "empty.py"):
        (tmp_path / skipped).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / skipped).write_text("" if skipped == "empty.py" else "SKIPPED")

    def split():
        dataset = data.open("stdlib_text", eval_fraction=0.3)
        windows = {s: list(dataset.eval(1, split=s, sequence_length=999)) for s in ("train", "eval")}
        text = {s: decode(w[0]["inputs"][0]).decode() for s, w in windows.items()}
        return {s: {t[i : i + 2] for i in range(0, len(t), 2)} for s, t in text.items()}

    before = split()
    assert before["train"] | before["eval"] == {f"{i:02}" for i in range(40)}
    assert not before["train"] & before["eval"] and 4 < len(before["eval"]) < 20
    for i in range(40, 60):
        (tmp_path / f"m{i:02}.py").write_text(f"{i:02}")
    after = split()
    assert before["train"] < after["train"] and before["eval"] <= after["eval"]


def test_library_errors(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"max_bytes 0 and eval_fraction 0.1 leave no file for train"):
        data.open("stdlib_text", max_bytes=0)
    monkeypatch.setattr(stdlib_text.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(data.DataError, match=r"holds no Python sources(.|\n)*python.org"):
        data.open("stdlib_text")
    monkeypatch.setattr(stdlib_text.sysconfig, "get_path", lambda name: str(tmp_path / "python311.zip"))
    with pytest.raises(data.DataError, match=r"python311.zip: no such directory"):
        data.open("stdlib_text")
