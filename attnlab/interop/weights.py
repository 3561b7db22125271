"""The authors' weights into a model of this library, and a model's weights into a file that the authors' code reads.

model = EfficientProbing(768, rngs=nnx.Rngs(0))
attnlab.interop.load(model, "probe.pth")
attnlab.interop.export(model, "probe.safetensors")
"""

import functools
import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from flax import nnx
from jax.typing import ArrayLike

from attnlab.interop.names import StateDictError, made_class
from attnlab.interop.official import Official, closest
from attnlab.interop.resized import resized_to
from attnlab.interop.torch_files import read_state_dict


def load(
    model: nnx.Module,
    source: str | Path | Mapping[str, ArrayLike],
    *,
    key: str | Sequence[str] | None = None,
    symbol: str | None = None,
    resize: bool = False,
) -> None:
    """Loads an official state dict into a model of the same configuration.

    The official class is found by the class of the model; where several are described for it, by the names of the
    arrays. Values are cast to the dtypes of the model's parameters.

    Args:
      model: a model, or one of its parts, of this library.
      source: arrays by their official names, or a file as `torch_files.read_state_dict` takes.
      key: where the state dict stands in a file of `torch.save` that holds more: `"model"`.
      symbol: name of the official class, to choose it.
      resize: whether tables of another image or window size (positions, biases, patches) are interpolated to those of
        the model, as the authors' scripts do; see `attnlab.interop.resized`.

    Raises:
      TypeError: if no official class is described for such a model, or none of that name.
      StateDictError: if the state dict and the model do not fit; nothing has changed then.
      StateDictFileError, FileNotFoundError: if the file cannot be read.
    """
    officials = find(model, symbol)
    if isinstance(source, Mapping):
        if key is not None:
            raise ValueError(f"key={key!r} is for files; the source is a mapping of arrays")
        arrays = source
    else:
        arrays = read_state_dict(source, key=key)
    official = officials[0] if len(officials) == 1 else closest(((each, model) for each in officials), arrays)
    official.load(model, resized_to(official.dump(model), arrays) if resize else arrays)


def export(model: nnx.Module, path: str | Path, *, symbol: str | None = None) -> None:
    """Writes a model's parameters to a safetensors file, under the authors' names and in their layout.

    Tables and buffers that follow from the configuration are left out: the authors' code has them already, so that
    `load_state_dict(..., strict=False)` is complete.

    Args:
      model: a model, or one of its parts, of this library.
      path: of the file, `*.safetensors`, which is replaced.
      symbol: name of the official class, where several are described for such a model.

    Raises:
      TypeError: if no official class is described for such a model, or none of that name.
      ValueError: for another ending, or if several are described and name the arrays differently.
      StateDictError: if the model lacks what the description names.
    """
    if Path(path).suffix != ".safetensors":
        raise ValueError(f"path must end in .safetensors, got {str(path)!r}")
    rules, problems = {}, []
    for official in find(model, symbol):
        try:
            found = official.rules(model)
        except StateDictError as error:
            problems.append(error)
        else:
            rules[tuple(sorted(found.names()))] = official.symbol, found
    if not rules:
        raise problems[0]
    symbols = sorted({name for name, _ in rules.values()})
    if len(symbols) > 1:
        raise ValueError(f"symbol must say which class's names to write: {' or '.join(symbols)}")
    found = next(found for _, found in rules.values())  # of one class's several names, those of its defaults
    arrays = {name: np.asarray(array, order="C") for name, array in found.dump().items()}
    safetensors.numpy.save_file(arrays, path, metadata={"format": "pt"})


def find(model: Any, symbol: str | None = None) -> list[Official]:
    """The descriptions of official classes whose counterpart here is the model's class.

    Raises:
      TypeError: if there are none.
    """
    found = [official for official in described() if official.describes(model)]
    if not found:
        raise TypeError(f"no official weights are described for a {type(model).__name__}")
    # What is described for a class is meant for those above it no more.
    depth = max(len(made_class(official.cls).__mro__) for official in found)
    found = [official for official in found if len(made_class(official.cls).__mro__) == depth]
    named = [official for official in found if symbol in (None, official.symbol)]
    if not named:
        symbols = ", ".join(dict.fromkeys(official.symbol for official in found))
        raise TypeError(f"symbol must be one of {symbols} for a {type(model).__name__}, got {symbol!r}")
    return named


@functools.cache
def described() -> tuple[Official, ...]:
    """All descriptions: the lists `OFFICIAL` of the files in this folder."""
    folder = importlib.import_module("attnlab.interop")
    names = [module.name for module in pkgutil.iter_modules(folder.__path__)]
    modules = [importlib.import_module(f"attnlab.interop.{name}") for name in names]
    return tuple(official for module in modules for official in getattr(module, "OFFICIAL", ()))
