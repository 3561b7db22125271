"""The papers' models by name: every table of sizes in `attnlab.models`, gathered at the first question.

    model = attnlab.models.create("davit_tiny", num_classes=1000, weights="davit_tiny.safetensors")
    logits = model(images)                                                       # (B, H, W, 3) -> (B, 1000)
    maps = attnlab.models.create("shvit_s1", num_classes=1000, features_only=True)(images)     # one map for each stage

A table is what a file annotates as `Models`, so that there is no list to edit.
"""

import functools
import importlib
import inspect
import pkgutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
from flax import nnx
from jax.typing import ArrayLike

from attnlab.contract import constructor_parameters
from attnlab.models.staged import Models, pair
from attnlab.suggest import suggestion


@functools.cache
def named_models() -> Models:
    """A class and its constructor arguments for each name, in alphabetical order.

    Raises:
      ValueError: if two tables hold the same name.
    """
    found: dict[str, tuple[type, Mapping[str, Any]]] = {}
    package = importlib.import_module("attnlab.models")
    for file in pkgutil.iter_modules(package.__path__, "attnlab.models."):
        module = importlib.import_module(file.name)
        for table, annotation in inspect.get_annotations(module).items():
            if annotation is not Models:
                continue
            entries = getattr(module, table)
            if twice := found.keys() & entries.keys():
                raise ValueError(f"two tables name {', '.join(sorted(twice))}; one is {file.name}.{table}")
            found |= entries
    return MappingProxyType(dict(sorted(found.items())))


class Features(nnx.Module):
    """A backbone that gives the map of every stage, for dense prediction.

    Args:
      backbone: what has `stages(images)`.
    """

    def __init__(self, backbone: nnx.Module):
        self.backbone = backbone

    def __call__(self, images: ArrayLike, *, deterministic: bool = True) -> tuple[jax.Array, ...]:
        """Images `(B, H, W, channels)` to one map `(B, Hh, Ww, C)` for each stage, from fine to coarse."""
        return self.backbone.stages(images, deterministic=deterministic)


def create(
    name: str,
    *,
    num_classes: int | None,
    weights: str | Path | Mapping[str, ArrayLike] | None = None,
    features_only: bool = False,
    image_size: int | Sequence[int] | None = None,
    key: str | Sequence[str] | None = None,
    rngs: nnx.Rngs | None = None,
    **options: Any,
) -> nnx.Module:
    """Builds a model of the papers by its name, with the authors' weights if a file is given.

    Args:
      name: as `attnlab list --kind backbone` prints it.
      num_classes: logits; None for the pooled features, and for models that make images. With `weights` it is that of
        the file, which holds the classifier too.
      weights: a file in the layout of the authors' code or of timm, safetensors or of `torch.save`, or arrays by their
        names there; drawn when None.
      features_only: the result is a `Features`, which gives the map of every stage, and has no classifier.
      image_size: rows and columns of the images, or one number for both; the paper's when None. Weights of another size
        are resized as the authors' scripts do, see `attnlab.interop.resized`.
      key: where the state dict stands in a file of `torch.save` that holds more: `"model"`.
      rngs: streams `params`, and `dropout` if there is any; `nnx.Rngs(0)` when None.
      **options: constructor arguments in place of those in the table.

    Raises:
      KeyError: for another name, with the nearest.
      ValueError: for an option that the model has not, or a size that does not suit it.
      attnlab.interop.names.StateDictError: if weights and model do not fit; it names every missing, unknown and
        mis-shaped array.
    """
    table = named_models()
    if name not in table:
        raise KeyError(f"no model is called {name!r}: {suggestion(name, table)}")
    cls, own = table[name]
    known = constructor_parameters(cls)
    given = options if num_classes is None and "num_classes" not in known else {"num_classes": num_classes, **options}
    if image_size is not None:
        given["image_size"] = pair(image_size)
    for option in given:
        if option not in known and not getattr(cls, "hands_options_on", False):
            raise ValueError(f"{name} has no option {option!r}: {suggestion(option, sorted(known))}")
    if features_only and not callable(getattr(cls, "stages", None)):
        raise ValueError(f"features_only: {name} has no stages")
    model = cls(**(dict(own) | given), rngs=nnx.Rngs(0) if rngs is None else rngs)
    if weights is not None:
        # Descriptions of the authors' classes import the models.
        from attnlab.interop import load

        load(model, weights, key=key, resize=image_size is not None)
    if not features_only:
        return model
    if getattr(model, "head", None) is not None:
        model.head = nnx.data(None)
    return Features(model)
