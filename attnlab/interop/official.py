"""One description per official class: it builds our counterpart, loads and dumps the authors' arrays, and calls it.

    Official(
        "EfficientProbing",                                    # the class over there
        EfficientProbing,                                      # and here
        config={"dim": "features", "qk_scale": "scale"},       # num_queries and more are called the same on both sides
        names={"queries": Squeezed("cls_token", 0), "value": "v"},
    )

An adapter of golden cases is `run = runner(OFFICIAL)`; `attnlab.interop.load` and `export` find a model's description
by its class among the lists `OFFICIAL` of the files in this folder.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from attnlab.interop.names import Rules, StateDictError, bare, builder, made_class, resolve
from attnlab.suggest import suggestion

Given = Mapping[str, Any]
Inputs = dict[str, jax.Array]
Outputs = jax.Array | Mapping[str, jax.Array]
Call = Callable[[Any, Inputs, Given], Outputs]

RATES = ("drop", "attn_drop", "proj_drop", "drop_path", "drop_rate", "attn_drop_rate", "drop_path_rate", "dropout")
"""Official arguments that do nothing at inference, and need not be described."""


class ConfigError(ValueError):
    """An official constructor argument that has no counterpart here, or a value of one."""


@dataclasses.dataclass(frozen=True)
class Only:
    """An official argument that is supported, without effect, for these values alone."""

    values: tuple[Any, ...]

    def __init__(self, *values: Any):
        object.__setattr__(self, "values", values)


def same_as(name: str, other: str) -> Callable[[Given], Mapping[str, Any]]:
    """An official argument that must be that of another, or None."""

    def check(given: Given) -> Mapping[str, Any]:
        if given[name] not in (None, given[other]):
            raise ConfigError(f"{name} must be equal to {other} here, got {given[name]!r} and {given[other]!r}")
        return {}

    return check


Option = str | None | Only | Callable[[Mapping[str, Any]], Mapping[str, Any]]


def plain(module: Any, inputs: Inputs, given: Given) -> Outputs:
    """The module on its inputs in their order."""
    return module(*inputs.values())


def masked(name: str) -> Call:
    """The module on tokens `x`, with a mask of that name, positive where tokens exist."""

    def call(module: Any, inputs: Inputs, given: Given) -> jax.Array:
        return module(inputs["x"], mask=inputs[name] > 0 if name in inputs else None)

    return call


def pair(side: int | Sequence[int]) -> tuple[int, ...]:
    """Both sides of a square, or the sides that are given."""
    return (side, side) if isinstance(side, int) else tuple(side)


def on_grid(*names: str) -> Call:
    """The official module takes tokens (B, N, C) of a grid, whose sides, or whose one side, these arguments give."""

    def call(module: Any, inputs: Inputs, given: Given) -> jax.Array:
        x, sides = inputs["x"], [given[name] for name in names]
        grid = pair(sides[0] if len(sides) == 1 else sides)
        return module(x.reshape(x.shape[0], *grid, x.shape[-1])).reshape(x.shape)

    return call


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
      cls: our class, or the name that it is registered under; or a function that builds one (annotated with what it
        returns, and with an argument `rngs`); or, for an official function, ours.
      config: for an official argument, of the constructor or of the call, the name of our constructor's; or None, if it
        has no effect here; or `Only(values)`; or a function of all official arguments that are given, or have a default
        here, which returns our arguments. What is not named is a rate of dropout (`RATES`), or an argument of ours of
        the same name, or is refused.
      names: where parameters stand, as `attnlab.interop.names` describes; or a function of the module that says so.
      call: `call(module, inputs, given)` returns the outputs by name, or one array, which is called `y`. `given` holds
        the official arguments.
      defaults: official arguments to add where they are not given: those whose default is another here.
      always: arguments of our constructor that do not follow from official ones.
      when: for several classes of one name, an argument that this one alone is given, or a function that tells by the
        arguments; a class without it is meant where no other is.
      ignore: patterns of official arrays, tables and buffers, that follow from the configuration or have no effect.
    """

    symbol: str
    cls: Callable[..., Any] | str
    config: Mapping[str, Option] = dataclasses.field(default_factory=dict)
    names: Mapping[Any, Any] | Callable[[Any], Mapping[Any, Any]] = dataclasses.field(default_factory=dict)
    call: Call = plain
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    always: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    when: str | Callable[[Given], bool] | None = None
    ignore: Sequence[str] = ()

    def options(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Our constructor's arguments for official ones.

        Raises:
          ConfigError: for an argument that has no counterpart, or a value that is not supported.
        """
        given, options, ours = {**self.defaults, **config}, dict(self.always), self.takes()
        for name, value in given.items():
            if name not in self.config and name not in RATES and ours is not None and name not in ours:
                raise ConfigError(
                    f"{self.symbol} has no option {name!r} here: {suggestion(name, [*self.config, *ours])}"
                )
            option = self.config.get(name, None if name in RATES else name)
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
        options, cls = self.options(config), builder(self.cls)
        if not isinstance(bare(cls), type) and "rngs" not in inspect.signature(bare(cls)).parameters:
            return functools.partial(cls, **options)
        return cls(**options, rngs=nnx.Rngs(0) if rngs is None else rngs)

    def takes(self) -> set[str] | None:
        """The names of our arguments; None where any are taken, to be handed on."""
        cls = bare(builder(self.cls))
        if not isinstance(cls, type):
            parameters = inspect.signature(cls).parameters.values()
            return None if any(p.kind is p.VAR_KEYWORD for p in parameters) else {p.name for p in parameters}
        if getattr(cls, "hands_options_on", False):  # to a part, not to the class above
            return None
        names: set[str] = set()
        for one in cls.__mro__:  # `**options` are those of the class above
            parameters = inspect.signature(one.__init__).parameters.values()
            names |= {p.name for p in parameters if p.kind is not p.VAR_KEYWORD}
            if not any(p.kind is p.VAR_KEYWORD for p in parameters):
                return names - {"self", "rngs", "dtype", "param_dtype"}
        return None

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

    def suits(self, config: Mapping[str, Any]) -> bool:
        """What `when` says of official arguments."""
        given = {**self.defaults, **config}
        return self.when in given if isinstance(self.when, str) else self.when is None or self.when(given)

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
    fitting = [each for each in named if each.when is not None and each.suits(config)]
    fitting = fitting or [each for each in named if each.when is None]
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
