"""Choice of an implementation, with the reason why each other one was refused.

Each op keeps its implementations in one table, best first. An implementation is a module with two functions:

    supports(args) -> str | None     why it cannot take these arguments, or None when it can
    run(args)      -> Any            the op on its normal form `args`

The module is imported only when its platform and packages are there, so a table may name a Triton or TPU module on a
machine that has neither. `implementation=None` picks the first that supports the arguments on this platform, and is
qualified there if it is a kernel (`qualification`); a named implementation runs or raises, it never falls back.

Whoever compiles ahead of time, for a platform that this machine lacks, says so with `target`:

    with dispatch.target("tpu", device_kind="TPU v5e", qualified_only=False):
        lowered = jax.jit(step).trace(*shapes).lower(lowering_platforms=("tpu",))
"""

import contextlib
import contextvars
import dataclasses
import difflib
import importlib
import importlib.util
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import jax

from pallas_kernels import qualification


class UnsupportedError(ValueError):
    """No implementation, or not the named one, can take these arguments on this machine."""


class Choice(NamedTuple):
    """One line of an explanation: whether implementation `name` would run (`ok`), and if not, the `reason`."""

    name: str
    ok: bool
    reason: str


@dataclasses.dataclass(frozen=True)
class Implementation:
    """An entry of an op's table.

    Attributes:
      name: what the caller writes, such as "xla".
      module: dotted path of the module that holds `supports` and `run`.
      platforms: JAX platforms it runs on ("cpu", "gpu", "tpu"); empty for all.
      packages: Python packages it imports that an installation may lack.
    """

    name: str
    module: str
    platforms: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()

    @property
    def is_kernel(self) -> bool:
        """Whether it is for particular platforms: then it must be qualified to be chosen by itself."""
        return bool(self.platforms)

    def load(self) -> ModuleType:
        """The module of the implementation, imported now."""
        return importlib.import_module(self.module)

    def refusal(self, args: Any, platform: str) -> str | None:
        """Why this implementation cannot run `args` on `platform`; None when it can.

        `args` None asks about the machine alone.
        """
        if self.platforms and platform not in self.platforms:
            return f"needs {' or '.join(self.platforms)}; this machine has {platform}"
        missing = [name for name in self.packages if importlib.util.find_spec(name) is None]
        if missing:
            return f"needs the package {', '.join(missing)}, which is not installed"
        return None if args is None else self.load().supports(args)


_tables: dict[str, tuple[Implementation, ...]] = {}
_trials: dict[str, str] = {}


def register(op: str, implementations: Sequence[Implementation], *, trials: str | None = None) -> None:
    """Sets the table of `op`, best implementation first.

    Args:
      op: its name.
      implementations: with different names.
      trials: "module:function" that gives the op's `trials.Trial`s; without them its kernels never qualify.

    Raises:
      ValueError: if two implementations have the same name.
    """
    names = [implementation.name for implementation in implementations]
    if len(set(names)) < len(names):
        raise ValueError(f"implementations of {op!r} must have different names, got {names}")
    _tables[op] = tuple(implementations)
    if trials is not None:
        _trials[op] = trials


def ops() -> tuple[str, ...]:
    """Names of the ops that have a table, sorted."""
    return tuple(sorted(_tables))


def implementations(op: str) -> tuple[Implementation, ...]:
    """The table of `op`, best first.

    Raises:
      ValueError: for an unknown op, with a suggestion.
    """
    if op not in _tables:
        raise ValueError(f"unknown op {op!r}{_suggestion(op, ops())}; there are {', '.join(ops())}")
    return _tables[op]


def trials(op: str) -> Sequence[Any]:
    """The trials of `op`, each a `trials.Trial`; none for an op that registered none."""
    if op not in _trials:
        return ()
    module, function = _trials[op].split(":")
    return getattr(importlib.import_module(module), function)()


PLATFORMS = ("cpu", "gpu", "tpu")


class _Target(NamedTuple):
    platform: str
    device_kind: str | None
    qualified_only: bool


_target: contextvars.ContextVar[_Target | None] = contextvars.ContextVar("target", default=None)


@contextlib.contextmanager
def target(platform: str, device_kind: str | None = None, *, qualified_only: bool = True) -> Iterator[None]:
    """Inside, implementations are chosen for `platform` instead of this machine's: for ahead-of-time compilation.

    What is traced inside belongs to that platform, and JAX caches it: give `jax.jit` a function of its own.

    Args:
      platform: "cpu", "gpu" or "tpu".
      device_kind: kind of device as JAX names it, such as "TPU v5e" or "NVIDIA H200"; None for one that is not known,
        which kernels take as the least able one.
      qualified_only: whether, as ever, a kernel that is not qualified there is not chosen by itself.

    Raises:
      ValueError: for an unknown platform.
    """
    if platform not in PLATFORMS:
        raise ValueError(f"platform must be one of {', '.join(PLATFORMS)}, got {platform!r}")
    token = _target.set(_Target(platform, device_kind, qualified_only))
    try:
        yield
    finally:
        _target.reset(token)


_forward_mode: contextvars.ContextVar[bool] = contextvars.ContextVar("forward_mode", default=False)


@contextlib.contextmanager
def forward_mode() -> Iterator[None]:
    """Inside, the implementation "reference" is chosen: of it JAX has forward-mode derivatives (`jax.jvp`, `jacfwd`).

        with dispatch.forward_mode():
            y, change = jax.jvp(model, (x,), (direction,))

    The others write their backward pass by hand, which JAX cannot turn around: there `jax.jvp` raises a `TypeError`,
    and may for a gradient too (`jax.hessian`; the gradient of a gradient is right everywhere). What is traced inside
    keeps its choice, and JAX caches it: give `jax.jit` a function of its own.
    """
    token = _forward_mode.set(True)
    try:
        yield
    finally:
        _forward_mode.reset(token)


def in_forward_mode() -> bool:
    """Whether this is inside `forward_mode`."""
    return _forward_mode.get()


def current_platform() -> str:
    """The platform of `target`, or where JAX puts an array that nothing else places: "cpu", "gpu" or "tpu"."""
    if (chosen := _target.get()) is not None:
        return chosen.platform
    device = jax.config.jax_default_device  # type: ignore[attr-defined]
    if device is None:
        return jax.default_backend()
    return device if isinstance(device, str) else device.platform


def current_device_kind() -> str | None:
    """The device kind of `target`, or that of the device where JAX puts arrays; None when `target` names none."""
    if (chosen := _target.get()) is not None:
        return chosen.device_kind
    device = jax.config.jax_default_device  # type: ignore[attr-defined]
    return (jax.devices(device)[0] if device is None or isinstance(device, str) else device).device_kind


def explain(op: str, args: Any = None, *, platform: str | None = None) -> list[Choice]:
    """Whether each implementation of `op` may be chosen for `args` on this machine, best implementation first.

    A named one need not be qualified.

    Args:
      op: name of the op, one of `ops()`.
      args: normal form of the arguments, or None to ask about the machine alone.
      platform: "cpu", "gpu" or "tpu"; the current one when None.

    Raises:
      ValueError: for an unknown op.
    """
    platform = platform or current_platform()
    refusals = [(entry.name, _refusal_by_itself(op, entry, args, platform)) for entry in implementations(op)]
    return [Choice(name, refusal is None, refusal or "") for name, refusal in refusals]


def _refusal_by_itself(op: str, entry: Implementation, args: Any, platform: str) -> str | None:
    """Why an implementation is not chosen without its name: what it refuses, or that it is not qualified."""
    refusal = entry.refusal(None, platform)
    chosen = _target.get()
    if refusal is None and entry.is_kernel and (chosen is None or chosen.qualified_only):
        kind = current_device_kind() if platform == current_platform() else None
        refusal = qualification.refusal(op, entry.name, kind)
    return refusal or (None if args is None else entry.refusal(args, platform))


def choose(op: str, args: Any, implementation: str | None = None, *, platform: str | None = None) -> Implementation:
    """The implementation that runs `args`: the named one, that of `forward_mode`, or the first that supports them.

    Raises:
      ValueError: for an unknown op or implementation, with a suggestion.
      UnsupportedError: if the named implementation, or every implementation, refuses; the message holds the reasons.
    """
    table = {entry.name: entry for entry in implementations(op)}
    if implementation is not None:
        if implementation not in table:
            known = f"{_suggestion(implementation, table)}; there are {', '.join(table)}"
            raise ValueError(f"implementation={implementation!r} of {op} is unknown{known}")
        refusal = table[implementation].refusal(args, platform or current_platform())
        if refusal is not None:
            raise UnsupportedError(f"{op}: implementation={implementation!r} refuses: {refusal}")
        return table[implementation]
    if in_forward_mode() and "reference" in table:
        return choose(op, args, "reference", platform=platform)
    answers = explain(op, args, platform=platform)
    for answer in answers:
        if answer.ok:
            return table[answer.name]
    reasons = "; ".join(f"{answer.name}: {answer.reason}" for answer in answers)
    raise UnsupportedError(f"{op}: no implementation takes these arguments ({reasons})")


def _suggestion(name: str, known: Sequence[str] | dict[str, Any]) -> str:
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f", did you mean {close[0]!r}?" if close else ""
