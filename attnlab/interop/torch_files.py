"""Checkpoint files of PyTorch as dictionaries of NumPy arrays, without PyTorch."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from attnlab.interop.torch_zip import DTYPES, StateDictFileError, read_torch_zip

__all__ = ["StateDictFileError", "read_state_dict"]

_SAFETENSORS = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "C64": "complex64",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}


def read_state_dict(path: str | Path, *, key: str | Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """Reads the parameters of a checkpoint file, all of them or none.

    No code of the file is run, whoever it comes from. Objects of other kinds that stand beside the state dict, as
    training scripts leave them there (arguments, scores, schedulers), are passed over; a state dict that holds such an
    object is refused, by the name of what it asks for.

    Args:
      path: a `.safetensors` file; an index of several (`model.safetensors.index.json`, `pytorch_model.bin.index.json`),
        whose files lie beside it; anything else must be a zip file of `torch.save` (PyTorch 1.6 and newer).
      key: where the state dict stands in a file of `torch.save` that holds more: `"model"`, or `("state", "model")`.

    Returns:
      Arrays by their official names, in the dtypes of the file (bfloat16 and float8 from `ml_dtypes`). They are
      read-only; those that shared memory in PyTorch share it here.

    Raises:
      FileNotFoundError: if the file is not there.
      StateDictFileError: if it is broken, cut short, of another kind, or asks for what is refused; if `key` is needed
        or wrong (the message lists the keys).
    """
    path = Path(path)
    if key is not None and path.name.endswith((".json", ".safetensors")):
        raise StateDictFileError(f"{path}: key={key!r} is for files of torch.save; this kind holds one state dict")
    if path.name.endswith(".index.json"):
        return _read_shards(path)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    return read_torch_zip(path, key if key is None or isinstance(key, str) else tuple(key))


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    try:
        entries = safetensors.deserialize(path.read_bytes())
    except safetensors.SafetensorError as error:
        raise StateDictFileError(f"{path}: not a whole safetensors file ({error})") from error
    return {name: _safetensor(path, name, entry) for name, entry in entries}


def _safetensor(path: Path, name: str, entry: dict[str, Any]) -> np.ndarray:
    if entry["dtype"] not in _SAFETENSORS:
        raise StateDictFileError(
            f"{path}: tensor {name!r} has the dtype {entry['dtype']}; known are {', '.join(_SAFETENSORS)}"
        )
    array = np.frombuffer(bytes(entry["data"]), DTYPES[_SAFETENSORS[entry["dtype"]]])
    return array.reshape(entry["shape"])


def _read_shards(path: Path) -> dict[str, np.ndarray]:
    """The tensors of `weight_map`, from name to file, out of the files beside the index."""
    try:
        places = json.loads(path.read_text())["weight_map"]
        shards = sorted(set(places.values()))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise StateDictFileError(f"{path}: not an index of files: no object weight_map from names to files") from error
    if not shards:
        raise StateDictFileError(f"{path}: an index that lists no files")
    arrays: dict[str, np.ndarray] = {}
    for shard in shards:
        if not isinstance(shard, str) or shard in ("", ".", "..") or "/" in shard or "\\" in shard:
            raise StateDictFileError(f"{path}: {shard!r} is not the name of a file beside the index")
        if shard.endswith(".index.json"):
            raise StateDictFileError(f"{path}: {shard!r} is an index itself")
        if not (path.parent / shard).exists():
            raise StateDictFileError(f"{path}: its file {shard} is missing")
        content = read_state_dict(path.parent / shard)
        named = {name for name, place in places.items() if place == shard}
        if content.keys() != named:
            missing, extra = sorted(named - content.keys()), sorted(content.keys() - named)
            raise StateDictFileError(
                f"{path}: {shard} does not hold what the index says: missing {missing[:4]}, not listed {extra[:4]}"
            )
        arrays |= content
    return {name: arrays[name] for name in places}
