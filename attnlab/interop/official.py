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
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from attnlab.interop.names import Rules, StateDictError, made_class, resolve
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
