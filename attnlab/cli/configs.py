"""Finds a configuration by name or path, and changes it by options of the command line."""

import importlib.util
import pkgutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tyro

import experiments
from attnlab import experiment as saved
from attnlab.experiment import Experiment
from attnlab.suggest import suggestion

NOT_CONFIGURATIONS = ("demo",)
# The kinds of model, data and task are those of the configuration; options change their settings alone.
SETTINGS = (tyro.conf.AvoidSubcommands,)


def names() -> tuple[str, ...]:
    """Names of the configurations in `experiments`."""
    found = (module.name for module in pkgutil.iter_modules(experiments.__path__))
    return tuple(sorted(name for name in found if name not in NOT_CONFIGURATIONS))


def load(name: str) -> Experiment:
    """A configuration.

    Args:
      name: of a module in `experiments`, path of a Python file with `CONFIG` or `config()`, or directory (or
        `experiment.json`) of an earlier run.

    Raises:
      ValueError: if there is no such configuration, with the nearest names, or the file does not define one.
    """
    path = Path(name)
    if path.suffix == ".json" or (path / saved.EXPERIMENT_FILE).is_file():
        return saved.load(path)[0]
    if path.suffix == ".py":
        if not path.is_file():
            raise ValueError(f"{name}: no such file")
        spec = importlib.util.spec_from_file_location(path.stem, path)
    elif name in names():
        spec = importlib.util.find_spec(f"experiments.{name}")
    else:
        raise ValueError(f"no configuration is called {name!r}: {suggestion(name, names())}")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise ValueError(f"{error.filename}:{error.lineno}: {error.msg}") from error
    except Exception as error:
        raise ValueError(f"{spec.origin} cannot be read: {type(error).__name__}: {error}") from error
    config = getattr(module, "CONFIG", None)
    config = module.config() if config is None and hasattr(module, "config") else config
    if not isinstance(config, Experiment):
        raise ValueError(f"{spec.origin} defines no CONFIG or config() that is an attnlab.experiment.Experiment")
    return config


def take_name(arguments: list[str], command: str, explain: Callable[[], str]) -> tuple[str, list[str]]:
    """The configuration's name, which comes first, and the other arguments.

    Raises:
      SystemExit: after `--help` without a name, or with neither.
    """
    if arguments and not arguments[0].startswith("-"):
        return arguments[0], arguments[1:]
    asked = bool(arguments) and arguments[0] in ("-h", "--help")
    print(explain(), file=sys.stdout if asked else sys.stderr)
    print(f"\nConfigurations: {', '.join(names())}", file=sys.stdout if asked else sys.stderr)
    print(f"`attnlab {command} CONFIG --help` prints every option of one.", file=sys.stdout if asked else sys.stderr)
    raise SystemExit(0 if asked else 2)


def parse(kind: Any, arguments: list[str], default: Any, prog: str, description: str) -> Any:
    """Options of the command line over defaults; a misspelt one ends the program with a suggestion."""
    return tyro.cli(kind, default=default, args=arguments, prog=prog, description=description, config=SETTINGS)


def directory(name: str) -> Path:
    """The directory of that name, to be written into.

    Raises:
      ValueError: if the name is no text: checkpoints, which name it too, are kept by libraries that take only text.
    """
    try:
        name.encode()
    except UnicodeEncodeError:
        raise ValueError(f"the directory {name!r} has no name in UTF-8; give another --out-dir") from None
    return Path(name)


def show(experiment: Experiment) -> None:
    """Prints an experiment in full, one setting on a line, as the options that would give it."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    for part in ("model", "data", "task", "train"):
        value = saved.as_dict(getattr(experiment, part))
        console.print(Text(f"{part}: {value['type']}", "bold"))
        for name, setting in _flat(value):
            console.print(Text(f"  {part}.{name} = {setting!r}"))


def _flat(settings: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows = []
    for name, value in settings.items():
        if isinstance(value, dict) and "type" in value:
            rows += _flat(value, f"{prefix}{name}.")
        elif name != "type":
            rows.append((prefix + name, tuple(value) if isinstance(value, list) else value))
    return rows
