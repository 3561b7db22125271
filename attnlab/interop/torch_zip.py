"""Reading the zip files of `torch.save` without PyTorch, and without running what they hold.

Such a file is a zip archive, nothing compressed: `<root>/data.pkl`, the pickled objects, and `<root>/data/<key>`, the
bytes of one storage each. A pickle is a program; it may name any Python function to call. Here nothing that it names is
ever imported: the names that tensors need are given to inert stand-ins (a list of the arguments a tensor was made of),
and every other name (a script's arguments, a score of NumPy, a scheduler) to a foreign object that forgets what it is
given. Where one stands among the parameters that are asked for, the file is refused. Nothing is extracted to disk, and
what a tensor claims about its storage is checked against the bytes that are there.
"""

import io
import math
import pickle
import pickletools
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import ml_dtypes
import numpy as np


class StateDictFileError(ValueError):
    """A file of parameters is broken, of an unknown kind, or holds something that is refused."""


DTYPES: Mapping[str, np.dtype] = {
    name: np.dtype(kind)
    for name, kind in {
        "float64": np.float64,
        "float32": np.float32,
        "float16": np.float16,
        "bfloat16": ml_dtypes.bfloat16,
        "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
        "float8_e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
        "float8_e5m2": ml_dtypes.float8_e5m2,
        "float8_e5m2fnuz": ml_dtypes.float8_e5m2fnuz,
        "complex64": np.complex64,
        "complex128": np.complex128,
        "int64": np.int64,
        "int32": np.int32,
        "int16": np.int16,
        "int8": np.int8,
        "uint64": np.uint64,
        "uint32": np.uint32,
        "uint16": np.uint16,
        "uint8": np.uint8,
        "bool": np.bool_,
    }.items()
}
"""NumPy's counterparts of PyTorch's dtypes, by the names of the latter."""

_STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "UntypedStorage": None,
}
_LEGACY_MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."


def read_torch_zip(path: Path, key: str | tuple[str, ...] | None) -> dict[str, np.ndarray]:
    """The state dict in a zip file of `torch.save`; see `attnlab.interop.torch_files.read_state_dict`."""
    with path.open("rb") as file:
        head = file.read(512)
    try:
        archive = zipfile.ZipFile(path)
    except Exception as error:  # zipfile raises much besides BadZipFile on broken directories
        raise StateDictFileError(f"{path}: {_not_a_zip(head, error)}") from error
    with archive:
        records = _Records(path, archive)
        tree = _unpickle(path, records.read("data.pkl"))
        chosen = _choose(path, tree, key)
        return {name: _to_array(path, name, tensor, records) for name, tensor in chosen.items()}


def _not_a_zip(head: bytes, error: Exception) -> str:
    if not head:
        return "an empty file"
    if head.startswith(b"PK"):
        return f"a zip file that is broken or cut short ({error})"
    if head.startswith(_LEGACY_MAGIC) or b"torch" in head:
        return (
            "written in PyTorch's format of before version 1.6, which is not read here; "
            "torch.save(torch.load(path, weights_only=True), path) with a newer PyTorch rewrites it"
        )
    if head.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS, not the file itself; `git lfs pull` fetches that"
    return "not a file of parameters known here: .safetensors, .index.json, and zip files of torch.save are"


class _Records:
    """The entries of the archive, each read whole and checked (sizes here, CRC by zipfile)."""

    def __init__(self, path: Path, archive: zipfile.ZipFile):
        self.path, self.archive = path, archive
        infos = archive.infolist()
        names = [info.filename for info in infos]
        roots = [name.removesuffix("data.pkl") for name in names if name.split("/")[1:] == ["data.pkl"]]
        if any(name.split("/")[1:2] == ["constants.pkl"] for name in names):
            raise StateDictFileError(f"{path}: a TorchScript program; save its state_dict() instead")
        if len(roots) != 1:
            raise StateDictFileError(f"{path}: a zip file, but not of torch.save: {len(roots)} entries <root>/data.pkl")
        if len(set(names)) < len(names):
            raise StateDictFileError(f"{path}: the zip file holds two entries of one name")
        if any(info.compress_type != zipfile.ZIP_STORED for info in infos):
            raise StateDictFileError(f"{path}: compressed entries; torch.save writes none, rewrite the file with it")
        if sum(info.file_size for info in infos) > path.stat().st_size:
            raise StateDictFileError(f"{path}: the entries claim more bytes than the file has")
        self.root = roots[0]
        self.entries = {info.filename: info for info in infos}
        self.storages: dict[str, bytes] = {}
        if f"{self.root}byteorder" in self.entries and self.read("byteorder") != b"little":
            raise StateDictFileError(f"{path}: byte order {self.read('byteorder')!r}; only b'little' is read")

    def read(self, name: str) -> bytes:
        info = self.entries.get(self.root + name)
        if info is None:
            raise StateDictFileError(f"{self.path}: the entry {self.root + name!r} is missing")
        try:
            data = self.archive.read(info)
        except Exception as error:  # zipfile raises much besides BadZipFile on broken entries
            raise StateDictFileError(f"{self.path}: the entry {info.filename!r} is broken ({error})") from error
        if len(data) != info.file_size:
            raise StateDictFileError(f"{self.path}: the entry {info.filename!r} is cut short")
        return data

    def storage(self, key: str) -> bytes:
        if key not in self.storages:
            self.storages[key] = self.read(f"data/{key}")
        return self.storages[key]


class _Inert:
    """An object on the unpickler's stack: nothing can be set on it, and `__setstate__` does nothing."""

    __slots__ = ()

    def __setattr__(self, name: str, value: Any) -> None:
        raise StateDictFileError(f"the pickle sets the attribute {name!r}")

    def __setstate__(self, state: Any) -> None:
        """Attributes of a state dict (`_metadata`) and of parameters are of no use here."""


class _Dict(_Inert, dict):
    """Stands for OrderedDict."""

    __slots__ = ()


class _Record(_Inert, tuple):
    """A tuple that pickles cannot make of themselves: its first entry says what it is."""

    __slots__ = ()


class _Function(_Inert):
    """Stands for a function or class that the pickle may call."""

    __slots__ = ("call",)

    def __init__(self, call: Callable[..., Any]):
        object.__setattr__(self, "call", call)

    def __call__(self, *args: Any) -> Any:
        return self.call(*args)


class _Foreign(_Inert):
    """Stands for an object of no known class, and takes whatever a pickle does with it without keeping anything.

    Attributes:
      name: what the pickle calls it.
    """

    __slots__ = ()
    name: ClassVar[str]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        return object.__new__(cls)

    def _forget(self, *args: Any) -> None:
        """What lists, sets and mappings do with an item."""

    append = extend = add = update = __setitem__ = _forget


def _from_type(function: Any, kind: Any, arguments: Any, state: Any) -> Any:
    """A tensor of a subclass, such as a parameter with attributes: the tensor."""
    if not isinstance(function, _Function):
        raise StateDictFileError(f"a tensor is made by {getattr(function, 'name', function)!r}, which is refused")
    return function(*arguments)


def _tensor(
    storage: Any, offset: Any, size: Any, stride: Any, requires_grad: Any, hooks: Any, *rest: Any, dtype: Any = None
) -> _Record:
    """What `torch._utils._rebuild_tensor_v2` and `_v3` are given; nothing is trusted yet."""
    if rest and rest[0]:
        raise StateDictFileError(f"a conjugate or negative view {rest[0]!r} is not read here")
    return _Record(("tensor", storage, offset, size, stride, dtype))


def _tensor_v3(*args: Any) -> _Record:
    return _tensor(*args[:6], *args[7:], dtype=args[6])


class _Unpickler(pickle.Unpickler):
    """Gives stand-ins for the names that state dicts need, and foreign objects for all others."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.foreign: dict[str, type[_Foreign]] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return _Function(_Dict)
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _Function(_tensor)
        if (module, name) == ("torch._utils", "_rebuild_tensor_v3"):
            return _Function(_tensor_v3)
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return _Function(lambda data, requires_grad, hooks: data)
        if (module, name) == ("torch._utils", "_rebuild_parameter_with_state"):
            return _Function(lambda data, requires_grad, hooks, state: data)
        if (module, name) == ("torch._tensor", "_rebuild_from_type_v2"):
            return _Function(_from_type)
        if (module, name) == ("torch", "Size"):
            return _Function(lambda sizes=(): tuple(sizes))
        if (module, name) == ("torch", "device"):
            return _Function(lambda *args: _Record(("device", *args)))
        if module in ("torch", "torch.storage") and name in _STORAGES:
            return _Record(("storage type", _STORAGES[name]))
        if module == "torch" and name in DTYPES:
            return _Record(("dtype", name))
        full = f"{module}.{name}"
        if full not in self.foreign:
            self.foreign[full] = type("_Foreign", (_Foreign,), {"__slots__": (), "name": full})
        return self.foreign[full]

    def persistent_load(self, pid: Any) -> _Record:
        match pid:
            case ("storage", _Record() as kind, str() as key, _, int() as length) if kind[0] == "storage type":
                return _Record(("storage", kind[1], key, length))
        raise StateDictFileError(f"the pickle refers to {pid!r}, which is not a storage")


def _unpickle(path: Path, data: bytes) -> Any:
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name in ("EXT1", "EXT2", "EXT4"):  # may be resolved from a cache, past find_class
                raise StateDictFileError(f"the pickle uses the opcode {opcode.name}, which is refused")
            if opcode.name in ("PUT", "LONG_BINPUT") and argument > len(data):  # the memo would grow to that index
                raise StateDictFileError(f"the pickle numbers an object {argument}, more than it can hold")
        return _Unpickler(io.BytesIO(data)).load()
    except StateDictFileError as error:
        raise StateDictFileError(f"{path}: {error}") from None
    except Exception as error:  # a broken pickle can make the unpickler raise nearly anything
        raise StateDictFileError(f"{path}: data.pkl is broken ({type(error).__name__}: {error})") from error


def _is_tensor(value: Any) -> bool:
    return isinstance(value, _Record) and value[0] == "tensor"


def _is_state_dict(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and all(_is_tensor(v) for v in value.values())


def _choose(path: Path, tree: Any, key: str | tuple[str, ...] | None) -> dict[str, _Record]:
    """Walks down `key` and checks that a state dict stands there."""
    steps = () if key is None else (key,) if isinstance(key, str) else tuple(key)
    at = "the file"
    for step in steps:
        if not isinstance(tree, dict) or step not in tree:
            raise StateDictFileError(f"{path}: {at} has no key {step!r}; {_describe(tree)}")
        tree, at = tree[step], f"{at}[{step!r}]"
    if not isinstance(tree, dict) or not tree:
        raise StateDictFileError(f"{path}: {at} is not a state dict; {_describe(tree)}")
    foreign = [v for v in tree.values() if isinstance(v, _Foreign) or (isinstance(v, type) and issubclass(v, _Foreign))]
    if foreign and not any(map(_is_state_dict, tree.values())):
        raise StateDictFileError(
            f"{path}: the pickle asks for {foreign[0].name}, which is refused: no tensor needs it. "
            "A file that holds more than parameters can be written anew with the state dict alone"
        )
    if other := [name for name, value in tree.items() if not (isinstance(name, str) and _is_tensor(value))]:
        raise StateDictFileError(
            f"{path}: {at} holds more than tensors: {', '.join(map(repr, other[:8]))}; {_describe(tree)}"
        )
    return tree


def _describe(tree: Any) -> str:
    if not isinstance(tree, dict):
        return f"it is of type {'tensor' if _is_tensor(tree) else type(tree).__name__.strip('_').lower()}"
    if nested := [name for name, value in tree.items() if _is_state_dict(value)]:
        return f"state dicts stand under key={' or '.join(map(repr, nested))} (all keys: {_some(tree)})"
    return f"its keys are {_some(tree)}"


def _some(names: Mapping[Any, Any]) -> str:
    shown = [repr(name) for name in list(names)[:12]]
    return ", ".join(shown) + (f" and {len(names) - 12} more" if len(names) > 12 else "")


def _to_array(path: Path, name: str, tensor: _Record, records: _Records) -> np.ndarray:
    """The tensor as a view of its storage's bytes, after checking that it lies within them."""
    _, storage, offset, size, stride, dtype = tensor
    where = f"{path}: tensor {name!r}"
    if not (isinstance(storage, _Record) and storage[0] == "storage"):
        raise StateDictFileError(f"{where} has no storage")
    _, kind, key, length = storage
    if dtype is not None and not (isinstance(dtype, _Record) and dtype[0] == "dtype"):
        raise StateDictFileError(f"{where} has a dtype that is none: {dtype!r}")
    kind = dtype[1] if dtype is not None else kind
    if kind is None:
        raise StateDictFileError(f"{where} is in an untyped storage and names no dtype")
    numbers = (offset, *size, *stride) if isinstance(size, tuple) and isinstance(stride, tuple) else ("no tuple",)
    if not all(type(n) is int and 0 <= n < 2**62 for n in numbers) or len(size) != len(stride) or len(size) > 32:
        raise StateDictFileError(f"{where} has an impossible geometry: offset {offset}, size {size}, stride {stride}")

    itemsize = DTYPES[kind].itemsize
    data = records.storage(key)
    expected = length if storage[1] is None else length * DTYPES[storage[1]].itemsize
    if len(data) != expected:
        raise StateDictFileError(f"{where}: storage {key!r} has {len(data)} bytes where {expected} were announced")
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    if math.prod(size) == 0:
        return np.zeros(size, DTYPES[kind])
    if (last + 1) * itemsize > len(data):
        raise StateDictFileError(f"{where} reaches element {last} of a storage of {len(data) // itemsize}")
    flat = np.frombuffer(data, np.uint8 if kind == "bool" else DTYPES[kind], count=len(data) // itemsize)
    flat = flat != 0 if kind == "bool" else flat
    strides = tuple(s * itemsize for s in stride)
    return np.lib.stride_tricks.as_strided(flat[offset:], size, strides, writeable=False)
