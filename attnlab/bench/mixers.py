"""Registered mixers against each other: the forward pass, and the forward and the backward pass together.

A mixer is timed only if it computes what it computes in float64. That is looked at on fewer tokens, `GATE_TOKENS` at
most, of one example: the result, the gradient of the tokens and those of all parameters together. Many mechanisms are
quadratic, and float64 on the tokens that are timed would take longer than all that is timed.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attnlab import registry
from attnlab.bench.problem import DTYPES
from attnlab.bench.timing import median_seconds
from attnlab.contract import Layout, Pattern, Site, constructor_parameters
from attnlab.models.block import site_seen_by
from pallas_kernels import dispatch

GATE_TOKENS = 256
TOLERANCE = {"float32": 2e-5, "bfloat16": 3e-2, "float16": 3e-2}  # five times that for gradients
HOST_BYTES = 2**32  # that a call may take where the device does not say how much it has
LAYOUTS = {layout.axes: layout for layout in Layout}


@dataclasses.dataclass(frozen=True)
class MixerProblem:
    """What is timed.

    Attributes:
      batch: B.
      grid: lengths of the token axes: (N,), (H, W) or (T, H, W).
      features: channels C.
      heads: H, for mixers that have heads.
      causal: whether token i sees tokens up to i only.
      dtype: of tokens and computation, one of `DTYPES`; parameters are float32.

    Raises:
      ValueError: for an unknown dtype, or heads that do not divide the channels.
    """

    batch: int
    grid: tuple[int, ...]
    features: int
    heads: int
    causal: bool = False
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.heads < 1 or self.features % self.heads:
            raise ValueError(f"heads must divide the {self.features} channels, got {self.heads}")

    @classmethod
    def parse(cls, text: str, **others: Any) -> "MixerProblem":
        """Reads BxNxC, BxHxWxC or BxTxHxWxC, such as 1x4096x512: a sequence, images or videos.

        Raises:
          ValueError: for any other text.
        """
        if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){2,4}", text):
            raise ValueError(f"--shape must be BxNxC, BxHxWxC or BxTxHxWxC, such as 1x4096x512, got {text!r}")
        batch, *grid, features = (int(size) for size in text.split("x"))
        return cls(batch, tuple(grid), features, **others)

    @property
    def tokens(self) -> int:
        """N, the tokens of an example."""
        return math.prod(self.grid)

    @property
    def layout(self) -> Layout:
        return LAYOUTS[len(self.grid)]

    def __str__(self) -> str:
        sizes = "x".join(map(str, (self.batch, *self.grid, self.features)))
        return f"{self.layout} {sizes}, {self.heads} heads, {'causal, ' if self.causal else ''}{self.dtype}"

    def with_tokens(self, tokens: int, batch: int) -> "MixerProblem":
        """The same with about so many tokens: on equal axes where there are several."""
        side = max(1, round(tokens ** (1 / len(self.grid))))
        return dataclasses.replace(self, batch=batch, grid=(side,) * len(self.grid))

    def site(self, mixer: type) -> Site:
        """The place of a mixer that is given such tokens; one of sequences is given those of an image in a row."""
        site = Site(self.features, self.heads, layout=self.layout, causal=self.causal, grid=self.grid)
        return site_seen_by(mixer, site)


@dataclasses.dataclass(frozen=True)
class MixerResult:
    """One mixer at one problem.

    Attributes:
      problem: what was computed.
      mixer: by which, its registered name.
      forward: seconds of a call; None where there is a reason.
      gradient: seconds of a call and the gradients of tokens and parameters.
      memory: bytes that the latter takes beside its arguments and results; None where that is not known.
      parameters: trained scalars.
      error: at the gate, over what the dtype allows, see `gate`; None where it was not reached.
      reason: why it was not timed; empty if it was.
      failed: whether it was tried, and gave no result or a wrong one.
    """

    problem: MixerProblem
    mixer: str
    forward: float | None = None
    gradient: float | None = None
    memory: int | None = None
    parameters: int | None = None
    error: float | None = None
    reason: str = ""
    failed: bool = False

    def tokens_per_second(self, mode: str) -> float | None:
        """B·N over the time of `mode`, "forward" or "gradient"."""
        seconds = getattr(self, mode)
        return self.problem.batch * self.problem.tokens / seconds if seconds else None


def check(mixers: Sequence[str], options: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuses names that are of no mixer, and options of mixers that are not among them.

    Raises:
      KeyError: for an unknown name, with the nearest ones.
      ValueError: for anything else.
    """
    if not mixers:
        raise ValueError("--mixers is missing: name at least one registered mixer (`attnlab list --kind mixer`)")
    for name in mixers:
        if (kind := registry.get(name).kind) is not registry.Kind.MIXER:
            raise ValueError(f"--mixers: {name} is a {kind}, not a {registry.Kind.MIXER}")
    if unused := set(options) - set(mixers):
        raise ValueError(f"--options: {', '.join(sorted(unused))} is not among the mixers {', '.join(mixers)}")


def causal_forms(mixers: Sequence[str]) -> bool:
    """Whether all of the mixers have a causal form of sequences."""
    variants = [registry.get(name) for name in mixers]
    return all(Pattern.CAUSAL_SELF in v.patterns and Layout.SEQUENCE in v.layouts for v in variants)


def build(problem: MixerProblem, mixer: str, options: Mapping[str, Any]) -> nnx.Module:
    """The mixer for a problem, with the defaults of its constructor; what has none is as small as it was registered.

    Raises:
      TypeError: for an option that it does not have.
      ValueError: if it has no form for the problem, or its sizes do not fit.
    """
    variant = registry.get(mixer)
    told = {field.name for field in dataclasses.fields(Site)} | {"rngs"}
    needed = {
        name: variant.options[name]
        for name, parameter in constructor_parameters(variant.cls).items()
        if parameter.default is parameter.empty and name not in told and name in variant.options
    }
    return variant.create(problem.site(variant.site_class), rngs=nnx.Rngs(0), **(needed | dict(options)))


def run(
    problems: Sequence[MixerProblem],
    mixers: Sequence[str],
    options: Mapping[str, Mapping[str, Any]],
    budget: float,
    note: Callable[[str], None] = lambda _: None,
) -> Iterator[list[MixerResult]]:
    """Results of every mixer, a problem at a time.

    Args:
      problems: what to compute.
      mixers: registered names.
      options: of their constructors, by name.
      budget: seconds of timing for each mixer, problem and mode.
      note: told what is being done, for a progress bar.
    """
    for problem in problems:
        results = []
        for mixer in mixers:
            note(f"{mixer}: {problem}")
            results.append(solve(problem, mixer, options.get(mixer, {}), budget))
        yield results


def solve(problem: MixerProblem, mixer: str, options: Mapping[str, Any], budget: float) -> MixerResult:
    """Gates a mixer, then times it."""
    try:
        module = build(problem, mixer, options)
    except ValueError as error:
        return MixerResult(problem, mixer, reason=str(error))
    count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(module, nnx.Param)))
    result = MixerResult(problem, mixer, parameters=count)
    small = problem if problem.tokens <= GATE_TOKENS else problem.with_tokens(GATE_TOKENS, 1)
    try:
        error = gate(dataclasses.replace(small, batch=1), mixer, options)
        result = dataclasses.replace(result, error=error)
        if not error <= 1.0:
            reason = f"its error is {error:.1f} times what {problem.dtype} allows: a wrong result is not timed"
            return dataclasses.replace(result, reason=reason, failed=True)
        return timed(result, module, budget)
    except Exception as error:  # a line of the table: the other lines are worth having
        return dataclasses.replace(result, reason=f"{type(error).__name__}: {str(error)[:200]}", failed=True)


def gate(problem: MixerProblem, mixer: str, options: Mapping[str, Any]) -> float:
    """The mixer's error against itself in float64, over what its dtype allows: above 1 is wrong.

    Where a number is not finite it is infinite.
    """
    module = build(problem, mixer, options)
    graph, state = nnx.split(module)
    x, dy = (np.asarray(array.astype(jnp.float32)) for array in _draw(problem, module))
    got = jax.jit(_pull(graph))(state, *(jnp.asarray(array, problem.dtype) for array in (x, dy)))
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        wide = jax.tree.map(_widened, state)
        want = jax.jit(_pull(graph))(wide, jnp.asarray(x, jnp.float64), jnp.asarray(dy, jnp.float64))
        want = jax.tree.map(lambda a: np.asarray(a, np.float64), want)
    allowed = TOLERANCE[problem.dtype]
    y, parts = _error(got[0], want[0]), [_error(*pair) for pair in zip(got[1:], want[1:], strict=True)]
    return max(y / allowed, *(part / (5 * allowed) for part in parts))


def timed(result: MixerResult, module: nnx.Module, budget: float) -> MixerResult:
    """The result with its times; without them where a call would take more memory than there is."""
    graph, state = nnx.split(module)
    x, dy = _draw(result.problem, module)
    forward = jax.jit(lambda state, x: nnx.merge(graph, state, copy=True)(x)).lower(state, x).compile()
    gradient = jax.jit(_pull(graph)).lower(state, x, dy).compile()
    analysis, limit = gradient.memory_analysis(), _limit()
    memory = None if analysis is None else analysis.temp_size_in_bytes
    if memory is not None and memory > limit:
        reason = f"a call and its gradient would take {memory / 2**30:.1f} GiB of {limit / 2**30:.1f}"
        return dataclasses.replace(result, memory=memory, reason=reason)
    jax.block_until_ready(gradient(state, x, dy))
    return dataclasses.replace(
        result,
        forward=median_seconds(functools.partial(forward, state, x), budget),
        gradient=median_seconds(functools.partial(gradient, state, x, dy), budget),
        memory=memory,
    )


def _pull(graph: nnx.GraphDef) -> Callable[..., tuple[jax.Array, jax.Array, list[jax.Array]]]:
    """From state, tokens and cotangents to the result, the gradient of the tokens, and those of the parameters."""

    def pull(state: nnx.State, x: jax.Array, dy: jax.Array) -> tuple[jax.Array, jax.Array, list[jax.Array]]:
        params, rest = nnx.split_state(state, nnx.Param, ...)
        y, back = jax.vjp(lambda params, x: nnx.merge(graph, params, rest, copy=True)(x), params, x)
        of_params, of_x = back(dy.astype(y.dtype))
        return y, of_x, jax.tree.leaves(of_params)

    return pull


def _draw(problem: MixerProblem, module: nnx.Module) -> tuple[jax.Array, jax.Array]:
    """Tokens in the layout that the mixer takes, and cotangents of its result."""
    in_a_row = getattr(module, "layout", problem.layout) is not problem.layout
    grid = (problem.tokens,) if in_a_row else problem.grid
    shape = (problem.batch, *grid, problem.features)
    of_x, of_dy = jax.random.split(jax.random.key(0))
    return jax.random.normal(of_x, shape, problem.dtype), jax.random.normal(of_dy, shape, problem.dtype)


def _widened(array: jax.Array) -> Any:
    return np.asarray(array, np.float64) if jnp.issubdtype(array.dtype, jnp.floating) else array


def _error(got: Any, want: Any) -> float:
    """Relative RMS error over all arrays of a tree together; infinite where a number is not finite."""
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    off = total = 0.0
    for a, b in pairs:
        off += float(np.sum((np.asarray(a.astype(jnp.float32), np.float64) - b) ** 2))
        total += float(np.sum(b**2))
    return math.sqrt(off / total) if total and math.isfinite(off) else (0.0 if off == total == 0 else math.inf)


def _limit() -> int:
    """Bytes that a call may take."""
    statistics = jax.devices()[0].memory_stats() if dispatch.current_platform() != "cpu" else None
    return (statistics or {}).get("bytes_limit", HOST_BYTES)
