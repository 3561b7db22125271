"""One description per official class: it builds our counterpart, loads and dumps the authors' arrays, and calls it.

    Official(
        "EfficientProbing",                                    # the class over there
        EfficientProbing,                                      # and here
        config={"dim": "features", "num_queries": "num_queries", "attn_drop": None},
        names={"queries": Squeezed("cls_token", 0), "value": "v"},
    )

An adapter of golden cases is `run = runner(OFFICIAL)`; `attnlab.interop.load` and `export` find a model's description
by its class among the lists `OFFICIAL` of the files in this folder.
"""

import dataclasses
import difflib
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from attnlab.interop.names import (
    NEVER_LOADED,
    Rules,
    StateDictError,
    Transform,
    join,
    made_class,
    matches,
    resolve,
)
from attnlab.nn.depthwise import DepthwiseConv
from attnlab.nn.heads import FromHeads, ToHeads, WithinHeads
from attnlab.suggest import suggestion

Outputs = jax.Array | Mapping[str, jax.Array]
Call = Callable[[Any, dict[str, jax.Array], dict[str, Any]], Outputs]


class ConfigError(ValueError):
    """An official constructor argument that has no counterpart here, or a value of one."""


@dataclasses.dataclass(frozen=True)
class Only:
    """An official argument that is supported, without effect, for these values alone."""

    values: tuple[Any, ...]

    def __init__(self, *values: Any):
        object.__setattr__(self, "values", values)


Option = str | None | Only | Callable[[Mapping[str, Any]], Mapping[str, Any]]


def plain(module: Any, inputs: dict[str, jax.Array], given: dict[str, Any]) -> Outputs:
    """The module on its inputs in their order."""
    return module(*inputs.values())


def options(*same: str, **others: Option) -> dict[str, Option]:
    """Options that have the same name on both sides, and others: `options("depth", dim="features", attn_drop=None)`."""
    return {**dict(zip(same, same, strict=True)), **others}


def decode(mixer: Any, x: jax.Array, start: int) -> tuple[jax.Array, Any]:
    """What a mixer makes of `(B, N, C)`, the first `start` tokens in one run, the others one by one; and its state."""
    y, state = mixer.prefill(x[:, :start], mixer.init_state(x.shape[0], x.shape[1]))
    rows = [y]
    for t in range(start, x.shape[1]):
        y, state = mixer.step(x[:, t], state)
        rows.append(y[:, None])
    return jnp.concatenate(rows, axis=1), state


@dataclasses.dataclass(frozen=True, eq=False)
class Official:
    """A class, or a function, of the authors' code and what it is here.

    Args:
      symbol: its name over there.
      cls: our class; or a function that builds one (annotated with what it returns, and with an argument `rngs`); or,
        for an official function, ours.
      config: for every official argument, of the constructor or of the call, the name of our constructor's; or None, if
        it has no effect here; or `Only(values)`; or a function of all official arguments that are given, or have a
        default here, which returns our arguments. An argument that is not named is refused. None instead of it: `cls`
        takes the official arguments themselves, and refuses others.
      names: where parameters stand, as `attnlab.interop.names` describes; or a function of the module that says so.
      call: `call(module, inputs, given)` returns the outputs by name, or one array, which is called `y`. `given` holds
        the official arguments.
      defaults: official arguments to add where they are not given: those whose default is another here.
      always: arguments of our constructor that do not follow from official ones.
      when: whether official arguments are those of this class, for several of one name.
      ignore: patterns of official arrays, tables and buffers, that follow from the configuration or have no effect.
    """

    symbol: str
    cls: Callable[..., Any]
    config: Mapping[str, Option] | None = dataclasses.field(default_factory=dict)
    names: Mapping[Any, Any] | Callable[[Any], Mapping[Any, Any]] = dataclasses.field(default_factory=dict)
    call: Call = plain
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    always: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    when: Callable[[Mapping[str, Any]], bool] | None = None
    ignore: Sequence[str] = ()

    def options(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Our constructor's arguments for official ones.

        Raises:
          ConfigError: for an argument that this description does not name, or a value that it does not support.
        """
        given, options = {**self.defaults, **config}, dict(self.always)
        if self.config is None:
            return options | given
        for name, value in given.items():
            if name not in self.config:
                raise ConfigError(f"{self.symbol} has no option {name!r} here: {suggestion(name, self.config)}")
            option = self.config[name]
            if isinstance(option, str):
                options[option] = value
            elif isinstance(option, Only):
                if value not in option.values:
                    allowed = " or ".join(map(repr, option.values))
                    raise ConfigError(f"{self.symbol}: {name} must be {allowed} here, got {value!r}")
            elif option is not None:
                options |= option(given)
        return options

    def build(self, config: Mapping[str, Any], *, rngs: nnx.Rngs | None = None) -> Any:
        """Our counterpart for official arguments: a module, or a function with its options."""
        options, cls = self.options(config), self.cls
        while isinstance(cls, functools.partial):
            cls = cls.func
        if not isinstance(cls, type) and "rngs" not in inspect.signature(cls).parameters:
            return functools.partial(self.cls, **options)
        return self.cls(**options, rngs=nnx.Rngs(0) if rngs is None else rngs)

    def rules(self, module: Any) -> Rules:
        """What stands where, for this module.

        Raises:
          StateDictError: if the module lacks what the description names.
        """
        return resolve(module, self.names(module) if callable(self.names) else self.names, self.ignore)

    def load(self, module: Any, arrays: Mapping[str, ArrayLike]) -> None:
        """Gives a module the values of an official state dict, cast to the dtypes of its parameters.

        Raises:
          StateDictError: if the two do not fit; nothing has changed then.
        """
        self.rules(module).load(arrays)

    def dump(self, module: Any) -> dict[str, jax.Array]:
        """The official state dict of a module, without what `ignore` names; the inverse of `load`."""
        return self.rules(module).dump()

    def run(self, module: Any, inputs: dict[str, jax.Array], config: Mapping[str, Any]) -> Mapping[str, jax.Array]:
        """The outputs of a call by their official names."""
        outputs = self.call(module, inputs, {**self.defaults, **config})
        return outputs if isinstance(outputs, Mapping) else {"y": outputs}

    def describes(self, module: Any) -> bool:
        """Whether the module is of our class."""
        return isinstance(module, made_class(self.cls))


def choose(officials: Iterable[Official], symbol: str, config: Mapping[str, Any], names: Iterable[str]) -> Official:
    """The description of an official class; of several with that name, the one that fits.

    Args:
      officials: to choose from.
      symbol: name of the class.
      config: its arguments.
      names: of the arrays in its state dict.

    Raises:
      ConfigError: if there is none for these arguments.
      StateDictError: if there are several for these arguments, and the names fit none.
    """
    named = [official for official in officials if official.symbol == symbol]
    fitting = [official for official in named if official.when is None or official.when(config)]
    if not fitting:
        raise ConfigError(f"{symbol} is not described{' for these options' if named else ''}: {dict(config)}")
    if len(fitting) == 1:
        return fitting[0]
    return closest(((official, official.build(config)) for official in fitting), names)


def closest(pairs: Iterable[tuple[Official, Any]], names: Iterable[str]) -> Official:
    """The description under which a module has official arrays of exactly these names.

    Args:
      pairs: descriptions, each with the module that it is to describe.
      names: official names of arrays.

    Raises:
      StateDictError: if none fits; with what is wrong under the one that has most of the names.
    """
    names, best, problem = list(names), -1, "nothing to choose from"
    for official, module in pairs:
        try:
            rules = official.rules(module)
        except StateDictError as error:
            if best < 0:
                problem = str(error)
            continue
        misfit = rules.misfit(names)
        if misfit is None:
            return official
        if (common := len(set(names) & set(rules.names()))) > best:
            best, problem = common, f"as {official.symbol}: {misfit}"
    raise StateDictError(problem)


def runner(officials: Sequence[Official]) -> Callable[..., Mapping[str, jax.Array]]:
    """The function `run(meta, param, inputs)` of a golden adapter; `tests/golden/README.md` says what it is to do."""

    def run(
        meta: Mapping[str, Any], param: Mapping[str, ArrayLike], inputs: Mapping[str, jax.Array]
    ) -> Mapping[str, jax.Array]:
        config = meta["config"] | meta["call"]
        official = choose(officials, meta["class"], config, param)
        module = official.build(config)
        official.load(module, param)
        order = [*meta["inputs"], *(name for name in inputs if name not in meta["inputs"])]
        return official.run(module, {name: inputs[name] for name in order if name in inputs}, config)

    return run


# ---- Loaders written as functions


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
        left = [n for n in self._record.arrays if n not in self._record.taken and not matches(n, self._ignore)]
        problems = [f"official arrays never loaded: {', '.join(left)}"] if left else []
        if self._into is not None:
            loaded = {id(variable) for variable in self._record.assigned}
            bare = [
                ".".join(map(str, path))
                for path, variable in nnx.iter_graph(self._into)
                if isinstance(variable, nnx.Param) and id(variable) not in loaded
            ]
            bare = [name for name in bare if not matches(name, self._keep)]
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
    param(getattr(module, kernel, None), weights, join(name, weight), to_kernel)
    _check_bias([module], weights, join(name, bias))
    if module.bias is not None:
        param(module.bias, weights, join(name, bias), to_bias)


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
    source = weights._full(join(name, weight))
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
    source = weights._full(join(name, weight))
    matrix = rows(_pointwise(weights[join(name, weight)], source))
    sizes = [module.out_features for module in modules]
    if sum(sizes) != matrix.shape[0]:
        raise StateDictError(f"official {source!r} has {matrix.shape[0]} output channels; here they are {sizes}")
    _check_bias(modules, weights, join(name, bias))
    vector = rows(weights[join(name, bias)]) if join(name, bias) in weights else None
    start = 0
    for module, size in zip(modules, sizes, strict=True):
        part = slice(start, start + size)
        weights.assign(module.kernel, matrix[part].T, f"official {source!r}, rows {part.start}:{part.stop},")
        if vector is not None:
            weights.assign(module.bias, vector[part], f"official {weights._full(join(name, bias))!r}")
        start += size


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
    source, heads, size = weights._full(join(name, weight)), modules[0].num_heads, modules[0].head_dim
    shape = (heads, len(modules), size) if heads_first else (len(modules), heads, size)
    matrix = _pointwise(weights[join(name, weight)], source)
    if matrix.shape[0] != len(modules) * heads * size:
        raise StateDictError(f"official {source!r} has {matrix.shape[0]} output channels; here they are {shape}")
    _check_bias(modules, weights, join(name, "bias"))
    parts = jnp.moveaxis(matrix.reshape(*shape, -1), 1 if heads_first else 0, 0)
    vector = weights[join(name, "bias")].reshape(shape) if join(name, "bias") in weights else None
    for index, module in enumerate(modules):
        weights.assign(module.kernel, jnp.moveaxis(parts[index], -1, 0), f"official {source!r}")
        if vector is not None:
            part = vector[:, index] if heads_first else vector[index]
            weights.assign(module.bias, part, f"official {weights._full(join(name, 'bias'))!r}")


def from_heads(module: FromHeads, weights: StateDict, name: str) -> None:
    """Loads a linear map out of heads: (out, H·E) there, (H, E, out) here.

    Raises:
      StateDictError: as `linear`.
    """
    source = weights._full(join(name, "weight"))

    def to_kernel(weight: jax.Array) -> jax.Array:
        return _pointwise(weight, source).T.reshape(module.num_heads, -1, module.features)

    _pair(module, "kernel", weights, name, "weight", "bias", to_kernel, _same)


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
    matrices = [_pointwise(weights[join(n, "weight")], weights._full(join(n, "weight"))) for n in names]
    if len({matrix.shape[1] for matrix in matrices}) > 1:
        raise StateDictError(f"official {source} have different input channels: {[m.shape[1] for m in matrices]}")
    weights.assign(module.kernel, rows(jnp.concatenate(matrices)).T, f"official {source}")
    for name in names:
        _check_bias([module], weights, join(name, "bias"))
    if module.bias is not None:
        vector = rows(jnp.concatenate([weights[join(n, "bias")] for n in names]))
        weights.assign(module.bias, vector, f"official biases of {source}")


def within_heads(module: WithinHeads, weights: StateDict, name: str) -> None:
    """Loads a grouped convolution of size one: (H·E, D, 1) there, (H, D, E) here.

    Raises:
      StateDictError: as `linear`.
    """
    source, heads = weights._full(join(name, "weight")), module.num_heads

    def to_kernel(weight: jax.Array) -> jax.Array:
        return _pointwise(weight, source).reshape(heads, -1, weight.shape[1]).swapaxes(1, 2)

    _pair(module, "kernel", weights, name, "weight", "bias", to_kernel, lambda bias: bias.reshape(heads, -1))


def depthwise(module: DepthwiseConv, weights: StateDict, name: str) -> None:
    """Loads a depthwise convolution: (C, 1, *k) there, (*k, *channels) here.

    Raises:
      StateDictError: as `linear`.
    """
    _pair(
        module,
        "kernel",
        weights,
        name,
        "weight",
        "bias",
        lambda a: jnp.moveaxis(a, (0, 1), (-1, -2)).reshape(*a.shape[2:], *module.channels),
        lambda bias: bias.reshape(module.channels),
    )


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
    if (join(name, weight) in weights) or module.scale is not None:
        param(module.scale, weights, join(name, weight))
    _check_bias([module], weights, join(name, bias))
    if getattr(module, "bias", None) is not None:
        param(module.bias, weights, join(name, bias))


def batch_norm(module: nnx.BatchNorm, weights: StateDict, name: str) -> None:
    """Loads a BatchNorm: `norm`'s parameters, and `running_mean` and `running_var` into `mean` and `var`.

    Raises:
      StateDictError: if something is missing or left over on either side, or has another shape.
    """
    norm(module, weights, name)
    param(module.mean, weights, join(name, "running_mean"))
    param(module.var, weights, join(name, "running_var"))


def embedding(module: nnx.Embed, weights: StateDict, name: str, *, weight: str = "weight") -> None:
    """Loads an embedding table, (entries, features) on both sides.

    Raises:
      StateDictError: if it is missing or has another shape.
    """
    param(module.embedding, weights, join(name, weight))
