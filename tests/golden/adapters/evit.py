"""Golden adapter of `evit`, whose calls have arguments that the constructors have too."""

from attnlab.interop.evit import OFFICIAL
from attnlab.interop.official import runner

_run = runner(OFFICIAL)


def run(meta, param, inputs):
    """As `runner` says, with the arguments of the call called `call.…`."""
    return _run(meta | {"call": {f"call.{name}": value for name, value in meta["call"].items()}}, param, inputs)
