"""Byte-level text: windows over documents, and plain-text files as a source.

The documents of a split stand in a row, each closed by END_OF_TEXT. Window i holds the N + 1 tokens from i·N on, so
that every token but the very first is predicted exactly once in an epoch:

    inputs   tokens i·N     ... i·N + N - 1      int32 (N,)
    targets  tokens i·N + 1 ... i·N + N          int32 (N,)
    weight   1, and 0 where there is nothing to predict (the last window's rest)          float32 (N,)

Packed windows hold two more arrays, for models that must not look across documents:

    segment_ids  1, 2, ... for the documents in the window, 0 for its unused rest         int32 (N,)
    positions    from 0 on in each segment                                                int32 (N,)

and the first token of a document, which another document precedes, has the weight 0.
"""

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from attnlab.data.dataset import Dataset, DatasetInfo, Example, Loading
from attnlab.data.errors import check_fraction, data_error, existing
from attnlab.data.tokenizer import END_OF_TEXT, PAD, VOCAB_SIZE

_HELP = {
    "expected": "a plain-text file, or a directory of them whose names match `pattern`",
    "get_it": "any text of your own; WikiText's raw files (wiki.train.raw, wiki.valid.raw) come with the WikiText "
    "language modelling dataset of Merity et al. (2016, arXiv:1609.07843), which Salesforce Research published",
}


class Documents:
    """Documents in a row, as tokens.

    Attributes:
      tokens: all tokens, uint16 (T,).
      starts: index of each document's first token, int64 (number of documents,).
    """

    def __init__(self, documents: Sequence[bytes]):
        lengths = np.array([len(document) + 1 for document in documents], np.int64)
        ends = np.cumsum(lengths)
        self.starts = ends - lengths
        self.tokens = np.full(int(lengths.sum()), END_OF_TEXT, np.uint16)
        for document, start in zip(documents, self.starts, strict=True):
            self.tokens[start : start + len(document)] = np.frombuffer(document, np.uint8)


class Windows(Sequence[Example]):
    """Windows of a split by index; see the module docstring."""

    def __init__(self, documents: Documents, sequence_length: int, pack: bool):
        self._documents, self._length, self._pack = documents, sequence_length, pack

    def __len__(self) -> int:
        return -(-(len(self._documents.tokens) - 1) // self._length)

    def __getitem__(self, index: int) -> Example:
        start = index * self._length
        tokens = self._documents.tokens[start : start + self._length + 1].astype(np.int32)
        missing = self._length + 1 - len(tokens)
        tokens = np.pad(tokens, (0, missing), constant_values=PAD)
        used = np.arange(self._length) < self._length - missing
        example = {"inputs": tokens[:-1], "targets": tokens[1:], "weight": used.astype(np.float32)}
        if not self._pack:
            return example
        places = np.arange(start, start + self._length + 1)
        document = np.searchsorted(self._documents.starts, places, side="right") - 1
        segment_ids = np.where(places < len(self._documents.tokens), document - document[0] + 1, 0)
        positions = places - np.maximum(self._documents.starts[document], start)
        return {
            **example,
            "weight": example["weight"] * (segment_ids[1:] == segment_ids[:-1]),
            "segment_ids": segment_ids[:-1].astype(np.int32),
            "positions": np.where(segment_ids > 0, positions, 0)[:-1].astype(np.int32),
        }


def text_dataset(
    name: str,
    documents: dict[str, Sequence[bytes]],
    *,
    pack: bool,
    loading: Loading,
    details: dict[str, str] | None = None,
) -> Dataset:
    """A dataset of the documents of each split; its digest is that of all their tokens."""
    splits = {split: Documents(texts) for split, texts in documents.items()}
    digest = hashlib.sha256()
    for split in splits.values():
        digest.update(split.tokens.astype("<u2"))
        digest.update(b"end of split")
    info = DatasetInfo(
        name=name,
        kind="text",
        train_size=len(splits["train"].tokens),
        eval_size=len(splits["eval"].tokens),
        digest=digest.hexdigest(),
        vocab_size=VOCAB_SIZE,
        details={**(details or {}), "packed": "yes" if pack else "no"},
    )
    return Dataset(info, lambda split, length: Windows(splits[split], length, pack), None, loading)


@dataclasses.dataclass(frozen=True)
class TextFiles:
    """Plain-text files, read as bytes; each file is one document.

    Attributes:
      path: of a file, or of a directory.
      eval_path: of a file or a directory for evaluation. None takes a share of `path`: of a directory whole files,
        spread evenly over the sorted names; of a single file its last bytes.
      eval_fraction: that share; unused where `eval_path` is given.
      pattern: of the files in a directory, at any depth.
      pack: adds `segment_ids` and `positions`.
      loading: threads and processes.
    """

    name: ClassVar[str] = "text_files"

    path: str = ""
    eval_path: str | None = None
    eval_fraction: float = 0.1
    pattern: str = "*.txt"
    pack: bool = False
    loading: Loading = dataclasses.field(default_factory=Loading)

    def open(self) -> Dataset:
        """Reads the files into memory, two bytes for each of theirs.

        Raises:
          DataError: if a path is missing, holds no files or no bytes, or is too small to be split.
          ValueError: for a setting out of range.
        """
        check_fraction("eval_fraction", self.eval_fraction)
        train = self._read(self.path)
        if self.eval_path is not None:
            splits = {"train": train, "eval": self._read(self.eval_path)}
        elif len(train) > 1:
            count = max(1, round(len(train) * self.eval_fraction))
            chosen = {(2 * i + 1) * len(train) // (2 * count) for i in range(count)}
            splits = {
                "train": [text for i, text in enumerate(train) if i not in chosen],
                "eval": [text for i, text in enumerate(train) if i in chosen],
            }
        else:
            cut = len(train[0]) - max(1, round(len(train[0]) * self.eval_fraction))
            splits = {"train": [train[0][:cut]], "eval": [train[0][cut:]]}
        for split, texts in splits.items():
            if not any(texts):
                raise data_error(self.path, f"is too small to leave text for the {split} split", **_HELP)
        return text_dataset(
            self.name, splits, pack=self.pack, loading=self.loading, details={"path": Path(self.path).name}
        )

    def _read(self, name: str) -> list[bytes]:
        path = existing(name, "file or directory", **_HELP)
        files = sorted(file for file in path.rglob(self.pattern) if file.is_file()) if path.is_dir() else [path]
        if not files:
            raise data_error(path, f"holds no files that match {self.pattern!r}", **_HELP)
        texts = []
        for file in files:
            try:
                texts.append(file.read_bytes())
            except OSError as error:
                raise data_error(file, f"cannot be read ({error})", **_HELP) from error
        if not any(texts):
            raise data_error(path, "is empty", **_HELP)
        return [text for text in texts if text]
