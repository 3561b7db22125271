"""Entry point of `attnlab`: finds the command, and turns a user's mistake into a message instead of a traceback."""

import importlib
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import attnlab
from attnlab.suggest import suggestion

COMMANDS = {
    "train": "train a configuration",
    "compare": "train the same model with several mixers, and write a report",
    "qualify": "try the kernels on this device, and remember which are right and faster",
    "bench": "time a kernel against its peers and this machine, or mixers against each other",
    "convert": "make a linear language model, or another, of a trained one",
    "generate": "continue a prompt with a trained language model",
    "predict": "print what a classifier sees in images",
    "attend": "draw where a classifier looks in images",
    "list": "print the variants",
    "show": "print everything about one variant",
    "new": "write the skeleton of a mechanism with its test",
    "docs": "write the pages of docs/mechanisms and the README's tables",
    "doctor": "print versions, devices, and which kernels work on this machine",
}
MODULES = {"list": "list_variants", "show": "show_variant"}

USAGE = """\
usage: attnlab COMMAND ... [--debug]

{commands}

  attnlab COMMAND --help   explains a command
  attnlab --version        prints the version
  --debug                  shows the traceback of an error
"""

DEVICES = Path("/dev")
# What libtpu, which also compiles for TPUs, is told where there is none: told nothing, it complains at length.
WITHOUT_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
}

MISTAKES = (ValueError, KeyError, TypeError, OSError, NotImplementedError, OverflowError)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
      argv: arguments after the program's name; those of the process when None.

    Returns:
      The exit code: 0, 1 for a check or a training that failed, 2 for a mistake in what was asked, 130 after Ctrl-C.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        width = max(map(len, COMMANDS))
        print(USAGE.format(commands="\n".join(f"  {name:{width}}   {text}" for name, text in COMMANDS.items())), end="")
        return 0 if arguments else 2
    command, *rest = arguments
    if command == "--version":
        print(attnlab.__version__)
        return 0
    if command not in COMMANDS:
        print(f"attnlab: no command is called {command!r}: {suggestion(command, COMMANDS)}", file=sys.stderr)
        return 2
    quiet()
    try:
        module = importlib.import_module(f"attnlab.cli.{MODULES.get(command, command)}")
        return module.run(rest)
    except SystemExit as stop:  # how the parser of options ends after --help or a mistake
        return stop.code if isinstance(stop.code, int) else 2
    except KeyboardInterrupt:
        print(f"\nattnlab {command}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has left
        sys.stderr.close()
        return 0
    except MISTAKES as error:
        if debug:
            raise
        print(f"attnlab {command}: {message(error)}", file=sys.stderr)
        print(f"(`attnlab {command} ... --debug` shows where)", file=sys.stderr)
        return 2


def quiet() -> None:
    """Keeps notes that are for developers of checkpointing and of TPU's runtime off the terminal.

    Warnings of Python itself stay.
    """
    logging.getLogger("absl").setLevel(logging.ERROR)
    if not any(path for pattern in ("accel*", "vfio/*") for path in DEVICES.glob(pattern)):
        for name, value in WITHOUT_TPU.items():
            os.environ.setdefault(name, value)


def message(error: BaseException) -> str:
    """The text of an error for a person; a bare `KeyError` has only quotes around its key."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return text or type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
