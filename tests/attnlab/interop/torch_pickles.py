"""Writes files as `torch.save` does, pickle opcode by opcode, so that tests can also write what it never would."""

import dataclasses
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Code:
    """Opcodes that push one object."""

    opcodes: bytes


def dump(value: Any) -> bytes:
    """Opcodes that push `value`: plain Python, `Code`, and dictionaries and tuples of these."""
    if isinstance(value, Code):
        return value.opcodes
    if isinstance(value, dict):
        return b"}(" + b"".join(dump(k) + dump(v) for k, v in value.items()) + b"u"
    if isinstance(value, tuple):
        return b"(" + b"".join(map(dump, value)) + b"t"
    return pickle.dumps(value, 2)[2:-1]


def name(module: str, attribute: str) -> Code:
    return Code(f"c{module}\n{attribute}\n".encode())


def call(function: Code, *args: Any) -> Code:
    return Code(function.opcodes + dump(args) + b"R")


def storage(kind: str, key: str, length: Any, module: str = "torch") -> Code:
    return Code(dump(("storage", name(module, kind), key, "cpu", length)) + b"Q")


def ordered_dict(items: dict[str, Any]) -> Code:
    empty = call(name("collections", "OrderedDict"))
    metadata = dump({"_metadata": call(name("collections", "OrderedDict"))})
    return Code(empty.opcodes + b"(" + b"".join(dump(k) + dump(v) for k, v in items.items()) + b"u" + metadata + b"b")


def tensor(where: Code, size: Any, stride: Any, offset: Any = 0, *rest: Any) -> Code:
    hooks = call(name("collections", "OrderedDict"))
    return call(name("torch._utils", "_rebuild_tensor_v2"), where, offset, size, stride, False, hooks, *rest)


def contiguous(kind: str, key: str, array: np.ndarray) -> Code:
    strides = tuple(s // array.itemsize for s in np.ascontiguousarray(array).strides)
    return tensor(storage(kind, key, array.size), array.shape, strides)


def write(path: Path, tree: Any, storages: dict[str, bytes], *, root: str = "archive", **options: Any) -> Path:
    """Writes the zip file; `tree` is pickled by `dump`, unless it is the bytes of a whole pickle."""
    data = tree if isinstance(tree, bytes) else b"\x80\x02" + dump(tree) + b"."
    with zipfile.ZipFile(path, "w", options.get("compression", zipfile.ZIP_STORED)) as archive:
        archive.writestr(f"{root}/data.pkl", data)
        archive.writestr(f"{root}/byteorder", options.get("byteorder", "little"))
        for key, content in storages.items():
            archive.writestr(f"{root}/data/{key}", content)
        archive.writestr(f"{root}/version", "3\n")
    return path
