"""The parameters of a module under the names, and in the layout, of the authors' PyTorch state dict, and back.

A table says where the two differ; what it does not name has the same path on both sides:

    {
        "queries": Squeezed("cls_token", 0),              # (1, Q, C) there, (Q, C) here
        ("query", "key", "value"): "attn.qkv",            # one map there, three here: its rows one after the other
        "kv": ("k", "v"),                                 # two maps there, one here
        "blocks.*.norm": "layers.*.ln_1",                 # for every layer; several stars keep their order
        "layers.*": lambda i: f"predictor.{2 * i}",       # the same, where numbers differ
        "blocks.*.mlp": "layers.*.feed_forward",          # a part that is no layer: all below it is renamed
        "blocks.*.mixer": Part("layers.*.attn", AGENT, WINDOW),   # described elsewhere, by the class of the part
        "gain": None,                                     # has no counterpart there and keeps its value
    }

What differs by the kind of a layer is known to `layers.leaves`: a Linear's weight is (out, in) there, (in, out) here, a
convolution's (out, in/groups, *k) there and (*k, in/groups, out) here, a norm's weight is called `scale` here, heads
have an axis of their own here. A part that is None, or a list without entries, has nothing to name. `resolve` makes of
module and table a list of rules, each between some of our variables and some official arrays, in both directions.
"""

import dataclasses
import difflib
import fnmatch
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from attnlab import registry
from attnlab.interop.layers import Leaf, Transform, leaves
from attnlab.suggest import suggestion

NEVER_LOADED = ("num_batches_tracked",)
"""Buffers that every state dict may hold and that no module here has a use for."""


class StateDictError(ValueError):
    """An official state dict, or the description of one, and a module do not fit."""


# ---- What a value of the table may be


@dataclasses.dataclass(frozen=True)
class Name:
    """Official name of a layer or a parameter, with what differs beyond the name.

    Args:
      base: names of the layers, "" for the state dict's own; several make up one of ours, its rows one after the other.
      leaves: official names of a layer's arrays where they are others: `{"weight": "gamma"}`; for several of ours, one
        for each where an array of theirs is not put together.
      there: from what a usual state dict would hold to the official weight; for a parameter that is no layer's, from
        the parameter itself.
      here: the inverse of `there`; None where `there` only changes the shape.
      interleaved: for several of ours that are one there: each head has its rows of the first, the second, ...; else
        all rows of the first come before those of the second.
      shares: of the rows, for several official layers; equal ones when empty.
    """

    base: str | tuple[str, ...]
    leaves: Mapping[str, str | tuple[str, ...]] = dataclasses.field(default_factory=dict)
    there: Transform | None = None
    here: Transform | None = None
    interleaved: bool = False
    shares: tuple[int, ...] = ()


def Named(base: str, **leaves: str) -> Name:
    """A layer whose arrays have other names there: `Named("ln", weight="gamma", bias="beta")`."""
    return Name(base, leaves=leaves)


def Squeezed(base: str, *axes: int) -> Name:
    """A weight or parameter that has further axes of size one there: `axes`, counted there."""
    return Name(base, there=lambda a: jnp.expand_dims(a, axes))


def Flattened(base: str) -> Name:
    """A table (*S, C) over a grid that is (1, N, C) there."""
    return Name(base, there=lambda a: a.reshape(1, -1, a.shape[-1]))


def Mapped(base: str, here: Transform, there: Transform) -> Name:
    """A weight or parameter that `here` makes ours, and `there`, its inverse, theirs."""
    return Name(base, there=there, here=here)


def Interleaved(base: str) -> Name:
    """One official map for several of ours, head by head: `[q|k|v]` inside each head."""
    return Name(base, interleaved=True)


def Joined(*bases: str, shares: tuple[int, ...] = ()) -> Name:
    """Several official maps for one of ours: its rows in shares, equal ones unless given."""
    return Name(bases, shares=shares)


class Part:
    """A part of a module that is described elsewhere.

    Args:
      base: its official name.
      *choices: tables, or objects with a `cls`, a table `names` and patterns `ignore`; the first counts that is a
        table, or whose `cls` the part is an instance of.
    """

    def __init__(self, base: str, *choices: Any):
        self.base, self.choices = base, choices

    def choose(self, part: nnx.Module) -> tuple[Mapping[Any, Any], Sequence[str]]:
        """Table and patterns to ignore for this part."""
        for choice in self.choices:
            if isinstance(choice, Mapping):
                return choice, ()
            if isinstance(part, made_class(choice.cls)):
                return choice.names, choice.ignore
        known = ", ".join(made_class(choice.cls).__name__ for choice in self.choices)
        raise StateDictError(f"{self.base!r} is one of {known} there, here it is a {type(part).__name__}")


def builder(cls: Callable[..., Any] | str) -> Callable[..., Any]:
    """A class or function, itself or by the name that it is registered under."""
    return registry.get(cls).cls if isinstance(cls, str) else cls


def bare(cls: Callable[..., Any]) -> Callable[..., Any]:
    """A class or function without the arguments that a `functools.partial` fixes."""
    return bare(cls.func) if isinstance(cls, functools.partial) else cls


def made_class(cls: Callable[..., Any] | str) -> type:
    """The class that `builder` names, or the one that a function returns by its annotation."""
    made = bare(builder(cls))
    made = made if isinstance(made, type) else getattr(made, "__annotations__", {}).get("return")
    return made if isinstance(made, type) else type(None)


# ---- From a table to rules


class Rule(NamedTuple):
    """Some of our variables and the official arrays that hold them.

    Attributes:
      ours: paths of the variables.
      variables: the variables.
      names: official names.
      here: from the official arrays, in the order of `names`, to the values of the variables.
      there: the inverse.
    """

    ours: tuple[str, ...]
    variables: tuple[nnx.Variable, ...]
    names: tuple[str, ...]
    here: Callable[[Sequence[jax.Array]], list[jax.Array]]
    there: Callable[[Sequence[jax.Array]], list[jax.Array]]

    def official(self) -> list[jax.Array]:
        """The official arrays of the variables' present values."""
        return self.there([variable[...] for variable in self.variables])

    def shapes(self) -> list[tuple[int, ...]]:
        """Shapes of the official arrays."""
        return [array.shape for array in jax.eval_shape(self.official)]


class Rules(NamedTuple):
    """What `resolve` finds: the rules, and patterns of official names that nothing here needs."""

    rules: list[Rule]
    ignore: tuple[str, ...]

    def names(self) -> list[str]:
        """All official names."""
        return [name for rule in self.rules for name in rule.names]

    def misfit(self, names: Iterable[str]) -> str | None:
        """What official arrays are missing among `names` or left over, in words; None if none are."""
        names, wanted = list(names), self.names()
        missing = [name for name in wanted if name not in names]
        left = [name for name in names if name not in wanted and not matches(name, self.ignore)]
        problems = []
        if missing:
            near = (difflib.get_close_matches(name, left, n=1, cutoff=0.6) for name in missing)
            problems.append(
                "the state dict has no "
                + ", ".join(
                    f"{name!r} (did you mean {hint[0]!r}?)" if hint else repr(name)
                    for name, hint in zip(missing, near, strict=True)
                )
            )
        if left:
            problems.append(f"official arrays without a place here: {', '.join(left)}")
        return "; ".join(problems) or None

    def load(self, arrays: Mapping[str, ArrayLike]) -> None:
        """Gives every variable its official value, in the variable's dtype; can be traced by JAX.

        Raises:
          StateDictError: if anything is missing or left over, or has another shape, or another kind of dtype (integers
            for a floating-point parameter). Nothing has changed then.
        """
        if problem := self.misfit(arrays):
            raise StateDictError(problem)
        values = []
        for rule in self.rules:
            official = [jnp.asarray(arrays[name]) for name in rule.names]
            for name, array, shape in zip(rule.names, official, rule.shapes(), strict=True):
                if array.shape != shape:
                    place = " and ".join(rule.ours)
                    raise StateDictError(f"official {name!r} has shape {array.shape}; {place} here needs {shape}")
                dtype = rule.variables[0][...].dtype
                if not any(jnp.issubdtype(array.dtype, k) and jnp.issubdtype(dtype, k) for k in _KINDS):
                    raise StateDictError(f"official {name!r} is {array.dtype}; the parameter here is {dtype}")
            values += zip(rule.variables, rule.here(official), strict=True)
        for variable, value in values:
            variable[...] = value.astype(variable[...].dtype)

    def dump(self) -> dict[str, jax.Array]:
        """The official arrays of the present values; the inverse of `load`. Can be traced by JAX."""
        return {name: array for rule in self.rules for name, array in zip(rule.names, rule.official(), strict=True)}


_KINDS = (jnp.floating, jnp.complexfloating, jnp.integer, jnp.bool_)


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a pattern (`fnmatch`) is that of the whole name, or of what follows a dot in it."""
    return any(fnmatch.fnmatchcase(name, p) or fnmatch.fnmatchcase(name, f"*.{p}") for p in patterns)


def join(*names: str) -> str:
    """Names with dots between those that are not empty."""
    return ".".join(name for name in names if name)


def resolve(module: Any, table: Mapping[Any, Any], ignore: Sequence[str] = (), base: str = "") -> Rules:
    """The rules between a module's parameters and official arrays.

    Args:
      module: with all its parts; a function without parameters has no rules.
      table: as the docstring of this file describes.
      ignore: patterns (`matches`) of official names that need not be loaded and are not dumped.
      base: official name of the module.

    Raises:
      StateDictError: if the table names what the module does not have.
    """
    found = Rules([], (*NEVER_LOADED, *ignore))
    if not isinstance(module, nnx.Module):
        return found
    renamed: dict[str, str | None] = {}
    for key, value in table.items():
        for paths, stars in _expand(module, key):
            name = value(*stars) if callable(value) else _substitute(value, stars)
            parts = [_walk(module, path) for path in paths]
            if all(part is None for part in parts):
                continue
            if len(paths) == 1 and (name is None or isinstance(name, str)):
                renamed[paths[0]] = None if name is None else join(base, name)
                continue
            renamed |= dict.fromkeys(paths)
            if isinstance(name, Part):
                names, more = name.choose(parts[0])
                rules, patterns = resolve(parts[0], names, more, join(base, name.base))
                found = Rules(found.rules + rules, tuple(dict.fromkeys(found.ignore + patterns)))
            else:
                name = name if isinstance(name, Name) else Name(name)
                found.rules.extend(_layer_rules(paths, parts, name, base))
    found.rules.extend(_unnamed(module, "", base, renamed))
    return found


def _unnamed(part: Any, here: str, there: str, renamed: Mapping[str, str | None]) -> Iterator[Rule]:
    """Rules for all below `part` that has a name there: as `renamed` says, or that of the part above and its own."""
    if here in renamed:
        if renamed[here] is None:
            return
        there = renamed[here]
    if isinstance(part, nnx.Variable):
        if isinstance(part, nnx.Param) or here in renamed:
            yield from _layer_rules((here,), [part], Name(there), "")
    elif leaves(part) is not None:
        yield from _layer_rules((here,), [part], Name(there), "")
    elif isinstance(part, _PARTS):
        for name, child in _children(part):
            yield from _unnamed(child, join(here, name), join(there, name), renamed)


def _layer_rules(paths: Sequence[str], layers: Sequence[Any], name: Name, base: str) -> Iterator[Rule]:
    """A rule for each array of a layer, or of several layers that are one there."""
    held = [leaves(layer) for layer in layers]
    for path, layer, one in zip(paths, layers, held, strict=True):
        if one is None:
            raise StateDictError(f"{path}, a {type(layer).__name__}, is named like a layer or parameter; it is none")
        if one.keys() != held[0].keys():
            sides = " and ".join(f"{p} has {', '.join(h) or 'nothing'}" for p, h in zip(paths, held, strict=True))
            raise StateDictError(f"{name.base!r} is one layer there; here {sides}")
    heads = getattr(layers[0], "num_heads", None)
    if name.interleaved and heads is None:
        raise StateDictError(f"{name.base!r} goes head by head there; {paths[0]} here has no axis of heads")
    groups = heads if name.interleaved else 1
    for leaf in held[0]:
        ours = [one[leaf] for one in held]
        apart = name.leaves.get(leaf, leaf)
        if not isinstance(apart, str):
            for path, one, official in zip(paths, ours, apart, strict=True):
                both = functools.partial(_here, [one], 1, Name("")), functools.partial(_there, [one], 1, Name(""))
                yield Rule((join(path, one.path),), (one.variable,), (join(base, str(name.base), official),), *both)
            continue
        bases = (name.base,) if isinstance(name.base, str) else name.base
        layout = name if leaf in ("", "weight") else dataclasses.replace(name, here=None, there=None)
        yield Rule(
            tuple(join(path, one.path) for path, one in zip(paths, ours, strict=True)),
            tuple(one.variable for one in ours),
            tuple(join(base, b, apart) for b in bases),
            functools.partial(_here, ours, groups, layout),
            functools.partial(_there, ours, groups, layout),
        )


def _there(ours: Sequence[Leaf], groups: int, name: Name, values: Sequence[jax.Array]) -> list[jax.Array]:
    """Official arrays of our values: layouts changed, rows put together, transformed, shared out."""
    whole = _together([leaf.there(value) for leaf, value in zip(ours, values, strict=True)], groups)
    whole = whole if name.there is None else name.there(whole)
    if isinstance(name.base, str):
        return [whole]
    shares = name.shares or (1,) * len(name.base)
    if whole.shape[0] % sum(shares):
        raise StateDictError(f"{whole.shape[0]} rows cannot be {' to '.join(map(str, shares))} in {name.base}")
    return _apart(whole, [share * whole.shape[0] // sum(shares) for share in shares], 1)


def _here(ours: Sequence[Leaf], groups: int, name: Name, arrays: Sequence[jax.Array]) -> list[jax.Array]:
    """The inverse of `_there`."""
    whole = _together(arrays, 1)
    shapes = [jax.eval_shape(leaf.there, leaf.variable[...]).shape for leaf in ours]
    rows = [shape[0] for shape in shapes] if len(ours) > 1 else []
    if name.here is not None:
        whole = name.here(whole)
    elif name.there is not None:
        whole = whole.reshape((sum(rows), *shapes[0][1:]) if rows else shapes[0])
    parts = _apart(whole, rows, groups) if rows else [whole]
    return [leaf.here(part) for leaf, part in zip(ours, parts, strict=True)]


def _together(parts: Sequence[jax.Array], groups: int) -> jax.Array:
    """Rows of the parts one after the other, in each of so many groups."""
    if len(parts) == 1:
        return parts[0]
    whole = jnp.concatenate([part.reshape(groups, -1, *part.shape[1:]) for part in parts], 1)
    return whole.reshape(-1, *whole.shape[2:])


def _apart(whole: jax.Array, rows: Sequence[int], groups: int) -> list[jax.Array]:
    """The inverse of `_together`, for parts of so many rows each."""
    ends = [sum(rows[:end]) // groups for end in range(1, len(rows))]
    parts = jnp.split(whole.reshape(groups, -1, *whole.shape[1:]), ends, axis=1)
    return [part.reshape(-1, *part.shape[2:]) for part in parts]


_PARTS = (nnx.Variable, nnx.Module, dict, list, tuple)


def _children(part: Any) -> list[tuple[str, Any]]:
    if isinstance(part, nnx.List | list | tuple):
        return [(str(index), child) for index, child in enumerate(part)]
    return [(str(name), child) for name, child in (part if isinstance(part, dict) else vars(part)).items()]


def _walk(part: Any, path: str) -> Any:
    """The part at a path; None if the path leads through a part that is None."""
    for step in path.split("."):
        if part is None:
            return None
        children = dict(_children(part))
        if step not in children:
            names = [name for name in children if not name.startswith("_")]
            raise StateDictError(f"{type(part).__name__} has no part {step!r} ({path}): {suggestion(step, names)}")
        part = children[step]
    return part


def _expand(module: nnx.Module, key: str | tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], tuple[int | str, ...]]]:
    """The paths that a key of the table stands for, with what its stars stand for."""
    patterns = (key,) if isinstance(key, str) else key
    for stars in _stars(module, patterns[0].split("."), ""):
        yield tuple(_substitute(pattern, stars) for pattern in patterns), stars


def _stars(module: nnx.Module, steps: Sequence[str], above: str) -> Iterator[tuple[int | str, ...]]:
    at = next((index for index, step in enumerate(steps) if "*" in step), None)
    if at is None:
        yield ()
        return
    above = join(above, *steps[:at])
    pattern = re.compile(re.escape(steps[at]).replace(r"\*", "(.+)"))
    part = _walk(module, above) if above else module
    for name, child in [] if part is None else _children(part):
        if isinstance(child, _PARTS) and (found := pattern.fullmatch(name)):
            for rest in _stars(module, steps[at + 1 :], join(above, name)):
                yield (*(int(star) if star.isdigit() else star for star in found.groups()), *rest)


def _substitute(value: Any, stars: Sequence[int | str]) -> Any:
    """A path or official name, of whatever kind, with its stars replaced in their order."""
    if isinstance(value, str):
        for star in stars:
            value = value.replace("*", str(star), 1)
        return value
    if isinstance(value, tuple):
        return tuple(_substitute(name, stars) for name in value)
    if isinstance(value, Name):
        return dataclasses.replace(value, base=_substitute(value.base, stars))
    if isinstance(value, Part):
        return Part(_substitute(value.base, stars), *value.choices)
    return value
