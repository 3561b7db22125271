"""Loading parameters in the layout of the authors' PyTorch state dicts into Flax NNX modules.

The differences between the layouts stand here, once: a `Linear` weight is (out, in) there and (in, out) here, a
convolution's (out, in/groups, *k) there and (*k, in/groups, out) here, a norm's weight is called `scale` here. A loader
of a whole module is then a list of pairs:

    with official.StateDict(param, into=module) as weights:
        official.linears((module.query, module.key, module.value), weights, "qkv")
        official.conv(module.positional, weights, "dwc")
        official.param(module.tokens, weights, "cls_token", lambda a: a[0])
        for i, block in enumerate(module.blocks):
            load_block(block, weights.sub(f"blocks.{i}"))

Leaving the `with` block fails unless every official array was loaded, or is named in `ignore`, and unless every
parameter of `into` got its value. A bias that only one side has is an error too. Shapes are checked, after the change
of layout; values are cast to the dtype of the parameter. All of it can be traced by JAX: gradients flow to `param`.

Every function takes the official name after the state dict; "" means that the state dict given is the layer's own.
`weight=` and `bias=` rename the two arrays of the layer (`weight="in_proj_weight"` in PyTorch's MultiheadAttention).
"""

import difflib
import fnmatch
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from attnlab.nn.heads import FromHeads, ToHeads

Transform = Callable[[jax.Array], jax.Array]

NEVER_LOADED = ("num_batches_tracked",)
"""Buffers that every state dict may hold and that no module here has a use for."""


class StateDictError(ValueError):
    """An official state dict and a module do not fit."""


class _Record:
    """What a state dict holds and what became of it; shared by all its views."""

    def __init__(self, arrays: Mapping[str, ArrayLike]):
        self.arrays = arrays
        self.taken: set[str] = set()
        self.assigned: list[nnx.Variable] = []


class StateDict:
    """A view of an official state dict that remembers which of its arrays were loaded.

    Args:
      arrays: from official names to arrays (NumPy, JAX, or tracers).
      into: module whose parameters (`nnx.Param`) must all have been loaded in the end; None checks the official side
        alone.
      ignore: official names that need not be loaded; a pattern (`fnmatch`) of a whole name, or of what follows a dot in
        it: `"relative_position_index"` stands for those of all layers.
      keep: the same for parameters of `into` (`"blocks.0.gain"`) that keep the values they have.
    """

    def __init__(
        self,
        arrays: Mapping[str, ArrayLike],
        *,
        into: nnx.Module | None = None,
        ignore: Sequence[str] = (),
        keep: Sequence[str] = (),
    ):
        for argument, patterns in (("ignore", ignore), ("keep", keep)):
            if isinstance(patterns, str):
                raise TypeError(f"{argument} must be a sequence of patterns, not the string {patterns!r}")
        self._record = _Record(arrays)
        self._prefix = ""
        self._into = into
        self._ignore = (*NEVER_LOADED, *ignore)
        self._keep = tuple(keep)

    def sub(self, name: str) -> "StateDict":
        """The view of what stands below `name`: `sub("blocks.0")["norm.weight"]` is `["blocks.0.norm.weight"]`.

        Raises:
          StateDictError: if nothing stands there.
        """
        view = StateDict.__new__(StateDict)
        view._record, view._prefix = self._record, self._full(name) + "." if name else self._prefix
        view._into, view._ignore, view._keep = None, (), ()
        if not any(True for _ in view):
            raise StateDictError(f"the state dict has nothing below {view._prefix[:-1]!r}{self._hint(view._prefix)}")
        return view

    def __iter__(self) -> Iterator[str]:
        """The names below this view, without its prefix."""
        return (name.removeprefix(self._prefix) for name in self._record.arrays if name.startswith(self._prefix))

    def __contains__(self, name: str) -> bool:
        return self._full(name) in self._record.arrays

    def __getitem__(self, name: str) -> jax.Array:
        """The array of that name, which counts as loaded from now on.

        Raises:
          StateDictError: if there is none.
        """
        full = self._full(name)
        if full not in self._record.arrays:
            raise StateDictError(f"the state dict has no {full!r}{self._hint(full)}")
        self._record.taken.add(full)
        return jnp.asarray(self._record.arrays[full])

    def assign(self, variable: nnx.Variable, value: ArrayLike, source: str) -> None:
        """Gives `variable` the value, in the variable's dtype.

        Args:
          variable: a parameter or a statistic of a module.
          value: of exactly the variable's shape.
          source: where the value comes from, for messages.

        Raises:
          StateDictError: if shapes differ, or kinds (integers for a floating-point parameter).
        """
        if not isinstance(variable, nnx.Variable):
            raise StateDictError(f"{source} has no counterpart here: the module has {variable!r} in its place")
        value, dtype = jnp.asarray(value), variable[...].dtype
        if value.shape != variable.shape:
            raise StateDictError(
                f"{source} gives shape {value.shape} in this library's layout; the parameter here is {variable.shape}"
            )
        if not any(jnp.issubdtype(value.dtype, k) and jnp.issubdtype(dtype, k) for k in _KINDS):
            raise StateDictError(f"{source} is {value.dtype}; the parameter here is {dtype}")
        variable[...] = value.astype(dtype)
        self._record.assigned.append(variable)

    def finish(self) -> None:
        """Checks that nothing was left over, here or there.

        Raises:
          StateDictError: naming the official arrays never loaded, and the parameters of `into` that got no value.
        """
        left = [n for n in self._record.arrays if n not in self._record.taken and not _matches(n, self._ignore)]
        problems = [f"official arrays never loaded: {', '.join(left)}"] if left else []
        if self._into is not None:
            loaded = {id(variable) for variable in self._record.assigned}
            bare = [
                ".".join(map(str, path))
                for path, variable in nnx.iter_graph(self._into)
                if isinstance(variable, nnx.Param) and id(variable) not in loaded
            ]
            bare = [name for name in bare if not _matches(name, self._keep)]
            problems += [f"parameters here without an official value: {', '.join(bare)}"] if bare else []
        if problems:
            raise StateDictError("; ".join(problems))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: Any, traceback: TracebackType | None) -> None:
        if kind is None:
            self.finish()

    def _full(self, name: str) -> str:
        return self._prefix + name if name else self._prefix[:-1]

    def _hint(self, name: str) -> str:
        near = difflib.get_close_matches(name, list(self._record.arrays), n=2, cutoff=0.5)
        return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""


_KINDS = (jnp.floating, jnp.complexfloating, jnp.integer, jnp.bool_)


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, p) or fnmatch.fnmatchcase(name, f"*.{p}") for p in patterns)


def _join(name: str, leaf: str) -> str:
    return f"{name}.{leaf}" if name else leaf


def _same(array: jax.Array) -> jax.Array:
    return array


def param(variable: nnx.Variable, weights: StateDict, name: str, transform: Transform = _same) -> None:
    """Loads one array as it is, or as `transform` makes it (a squeeze, a transpose, a slice)."""
    weights.assign(variable, transform(weights[name]), f"official {weights._full(name)!r}")


def _pair(
    module: Any,
    kernel: str,
    weights: StateDict,
    name: str,
    weight: str,
    bias: str,
    to_kernel: Transform,
    to_bias: Transform,
) -> None:
    """Loads a layer's two arrays; a bias must stand on both sides or on neither."""
    param(getattr(module, kernel, None), weights, _join(name, weight), to_kernel)
    _check_bias([module], weights, _join(name, bias))
    if module.bias is not None:
        param(module.bias, weights, _join(name, bias), to_bias)


def _check_bias(modules: Iterable[Any], weights: StateDict, name: str) -> None:
    for module in modules:
        if (name in weights) != (getattr(module, "bias", None) is not None):
            there, here = ("has", "has none") if name in weights else ("has no", "has one")
            raise StateDictError(f"the state dict {there} {weights._full(name)!r}; the {type(module).__name__} {here}")


def _pointwise(weight: jax.Array, source: str) -> jax.Array:
    """(out, in) from (out, in, 1, …): a convolution of size one is a linear map."""
    if weight.ndim < 2 or any(k != 1 for k in weight.shape[2:]):
        raise StateDictError(
            f"official {source!r} has shape {weight.shape}; a linear map needs (out, in) or (out, in, 1, …)"
        )
    return weight.reshape(weight.shape[:2])


def linear(
    module: nnx.Linear,
    weights: StateDict,
    name: str,
    *,
    rows: Transform = _same,
    weight: str = "weight",
    bias: str = "bias",
) -> None:
    """Loads a linear map, or a convolution of size one: (out, in[, 1, …]) there, (in, out) here.

    Args:
      module: with `kernel` (in, out) and `bias` (out,) or None.
      weights: the state dict.
      name: of the layer in it.
      rows: applied to the output channels, the first axis of the official weight and bias: a slice or a permutation.
      weight: name of the official weight below `name`.
      bias: name of the official bias below `name`.

    Raises:
      StateDictError: if something is missing or left over on either side, or has another shape.
    """
    source = weights._full(_join(name, weight))
    _pair(module, "kernel", weights, name, weight, bias, lambda a: rows(_pointwise(a, source)).T, rows)


def linears(
    modules: Sequence[nnx.Linear],
    weights: StateDict,
    name: str,
    *,
    rows: Transform = _same,
    weight: str = "weight",
    bias: str = "bias",
) -> None:
    """Loads one official linear map into several: their output channels, one after the other (`qkv` into three).

    Args:
      modules: linear maps of the same input channels.
      weights: the state dict.
      name: of the layer in it.
      rows: applied to the official output channels before they are shared out.
      weight: name of the official weight below `name`.
      bias: name of the official bias below `name`.

    Raises:
      StateDictError: as `linear`, and if the output channels do not add up.
    """
    source = weights._full(_join(name, weight))
    matrix = rows(_pointwise(weights[_join(name, weight)], source))
    sizes = [module.out_features for module in modules]
    if sum(sizes) != matrix.shape[0]:
        raise StateDictError(f"official {source!r} has {matrix.shape[0]} output channels; here they are {sizes}")
    _check_bias(modules, weights, _join(name, bias))
    vector = rows(weights[_join(name, bias)]) if _join(name, bias) in weights else None
    start = 0
    for module, size in zip(modules, sizes, strict=True):
        part = slice(start, start + size)
        weights.assign(module.kernel, matrix[part].T, f"official {source!r}, rows {part.start}:{part.stop},")
        if vector is not None:
            weights.assign(module.bias, vector[part], f"official {weights._full(_join(name, bias))!r}")
        start += size


def joined_linear(module: nnx.Linear, weights: StateDict, names: Sequence[str], *, rows: Transform = _same) -> None:
    """Loads several official linear maps into one that has their output channels one after the other.

    Args:
      module: with `kernel` (in, out) and `bias` (out,) or None.
      weights: the state dict.
      names: of the layers in it (`("q", "kv")` into `qkv`).
      rows: applied to the joined output channels: a permutation.

    Raises:
      StateDictError: as `linear`.
    """
    source = " + ".join(repr(weights._full(name)) for name in names)
    matrices = [_pointwise(weights[_join(n, "weight")], weights._full(_join(n, "weight"))) for n in names]
    if len({matrix.shape[1] for matrix in matrices}) > 1:
        raise StateDictError(f"official {source} have different input channels: {[m.shape[1] for m in matrices]}")
    weights.assign(module.kernel, rows(jnp.concatenate(matrices)).T, f"official {source}")
    for name in names:
        _check_bias([module], weights, _join(name, "bias"))
    if module.bias is not None:
        vector = rows(jnp.concatenate([weights[_join(n, "bias")] for n in names]))
        weights.assign(module.bias, vector, f"official biases of {source}")


def to_heads(
    modules: Sequence[ToHeads], weights: StateDict, name: str, *, heads_first: bool = False, weight: str = "weight"
) -> None:
    """Loads one official linear map into several maps into heads, of the same heads and sizes.

    Args:
      modules: maps with `kernel` (in, H, D) and `bias` (H, D) or None.
      weights: the state dict.
      name: of the layer in it, with output channels (parts, H, D), or (H, parts, D) with `heads_first`.
      heads_first: whether the parts follow each other inside each head.
      weight: name of the official weight below `name`.

    Raises:
      StateDictError: as `linear`.
    """
    source, heads, size = weights._full(_join(name, weight)), modules[0].num_heads, modules[0].head_dim
    shape = (heads, len(modules), size) if heads_first else (len(modules), heads, size)
    matrix = _pointwise(weights[_join(name, weight)], source)
    if matrix.shape[0] != len(modules) * heads * size:
        raise StateDictError(f"official {source!r} has {matrix.shape[0]} output channels; here they are {shape}")
    _check_bias(modules, weights, _join(name, "bias"))
    parts = jnp.moveaxis(matrix.reshape(*shape, -1), 1 if heads_first else 0, 0)
    vector = weights[_join(name, "bias")].reshape(shape) if _join(name, "bias") in weights else None
    for index, module in enumerate(modules):
        weights.assign(module.kernel, jnp.moveaxis(parts[index], -1, 0), f"official {source!r}")
        if vector is not None:
            part = vector[:, index] if heads_first else vector[index]
            weights.assign(module.bias, part, f"official {weights._full(_join(name, 'bias'))!r}")


def from_heads(module: FromHeads, weights: StateDict, name: str) -> None:
    """Loads a linear map out of heads: (out, H·E) there, (H, E, out) here.

    Raises:
      StateDictError: as `linear`.
    """
    source = weights._full(_join(name, "weight"))

    def to_kernel(weight: jax.Array) -> jax.Array:
        return _pointwise(weight, source).T.reshape(module.num_heads, -1, module.features)

    _pair(module, "kernel", weights, name, "weight", "bias", to_kernel, _same)


def conv(module: nnx.Conv, weights: StateDict, name: str, *, weight: str = "weight", bias: str = "bias") -> None:
    """Loads a convolution of 1, 2 or 3 axes: (out, in/groups, *k) there, (*k, in/groups, out) here.

    Raises:
      StateDictError: if something is missing or left over on either side, or has another shape.
    """
    _pair(module, "kernel", weights, name, weight, bias, lambda a: jnp.moveaxis(a, (0, 1), (-1, -2)), _same)


def norm(module: nnx.Module, weights: StateDict, name: str, *, weight: str = "weight", bias: str = "bias") -> None:
    """Loads a LayerNorm, RMSNorm or GroupNorm: `weight` and `bias` there, `scale` and `bias` here.

    A norm without learned parameters has nothing to load: `scale` and `bias` are None, and the state dict has neither.

    Raises:
      StateDictError: if something is missing or left over on either side, or has another shape.
    """
    if (_join(name, weight) in weights) or module.scale is not None:
        param(module.scale, weights, _join(name, weight))
    _check_bias([module], weights, _join(name, bias))
    if getattr(module, "bias", None) is not None:
        param(module.bias, weights, _join(name, bias))


def batch_norm(module: nnx.BatchNorm, weights: StateDict, name: str) -> None:
    """Loads a BatchNorm: `norm`'s parameters, and `running_mean` and `running_var` into `mean` and `var`.

    Raises:
      StateDictError: if something is missing or left over on either side, or has another shape.
    """
    norm(module, weights, name)
    param(module.mean, weights, _join(name, "running_mean"))
    param(module.var, weights, _join(name, "running_var"))


def embedding(module: nnx.Embed, weights: StateDict, name: str, *, weight: str = "weight") -> None:
    """Loads an embedding table, (entries, features) on both sides.

    Raises:
      StateDictError: if it is missing or has another shape.
    """
    param(module.embedding, weights, _join(name, weight))
