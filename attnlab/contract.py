"""What every token mixer promises.

A *token mixer* maps tokens to tokens of the same shape. Layouts put channels last: a sequence is `(B, N, C)`, an image
`(B, H, W, C)`, a video `(B, T, H, W, C)`. The promise, checked by `tests/conformance` for every registered variant:

- `y = mixer(x, context=None, *, mask=None, segment_ids=None, positions=None, deterministic=True, edits=None)`; `y` has
  the shape of `x`, and the dtype `dtype` given at construction, or else that of `x`. Parameters are stored in
  `param_dtype`.
- An argument is never ignored: what a mixer does not support it refuses (`UnsupportedArgument`).
- A row that may attend to nothing gives zeros, and zero gradients; no finite input gives a NaN.
- A causal mixer of sequences also decodes: `init_state`, `prefill` and `step` agree with the call over the whole.
- Softmax, gates, norms and recurrent states are computed in float32 (or wider), whatever the dtype of the tokens.

`TokenMixer.__call__` is final: it checks and casts, and a mechanism writes `mix(x, given)`. Arguments of the call,
where a mixer accepts them:

- `context` `(B, M, C')`: makes it cross-attention; without it, self-attention.
- `mask`: boolean, True where attention is allowed. `(B, M)`: which keys exist (`"key_mask"` in `accepts`), or
  `(B|1, H|1, N, M)`: which key each query may see (`"mask"` in `accepts`). Or a `View`, which may also say by what rule
  tokens see each other in place of the causal one (`"rule"` in `accepts`).
- `segment_ids`: integers `(B, N)`: packed sequences; each run of equal ids is one, and tokens attend inside it, also
  where its id comes back later. Padding gets an id of its own. Or a pair `((B, N), (B, M))` with `context`: tokens
  attend to the context's tokens of their id, wherever those stand.
- `positions`: integers `(B, N)`, or `(B, N, axes)`: where tokens are, if not at 0..N-1. What precedes what is decided
  by their order, never by their positions.
- `edits`: the interventions on this layer of this call, see `attnlab.points`.

Standard constructor arguments, in this order: `features`, then keyword-only `num_heads`, options of the mechanism,
`dtype=None`, `param_dtype=jnp.float32`, `rngs`. A constructor that needs to know where it stands takes any of `causal`,
`layout`, `grid`, `prefix`, `layer`, `num_layers`, `context_features`, `rotary`, with the meanings of `Site`. One that
takes `**options` passes them on to its base's constructor, whose arguments are then its own too. What
depends on the layer and is not learned (decays, scales) is a `Constant`, so that the states of several layers can be
stacked.
"""

import dataclasses
import enum
import inspect
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Self, final

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from attnlab.suggest import suggestion
from pallas_kernels.integers import integers, runs, segments
from pallas_kernels.masks import Mask
from pallas_kernels.promotion import numpy_ranks


class Pattern(enum.StrEnum):
    """Which queries see which keys."""

    SELF = "self"
    CAUSAL_SELF = "causal self"
    CROSS = "cross"
    CAUSAL_CROSS = "causal cross"


class Layout(enum.StrEnum):
    """How tokens are laid out; channels are always the last axis."""

    SEQUENCE = "sequence"
    IMAGE = "image"
    VIDEO = "video"

    @property
    def axes(self) -> int:
        """Number of token axes: 1, 2 or 3."""
        return {"sequence": 1, "image": 2, "video": 3}[self.value]


class UnsupportedArgument(ValueError):
    """A mixer was given an argument, a pattern or a layout that its mechanism does not define."""


@dataclasses.dataclass(frozen=True)
class Site:
    """Where a mixer stands in a model: all that a model tells it.

    Attributes:
      features: channels C of the tokens.
      num_heads: attention heads H.
      layout: of the tokens the model will pass.
      causal: whether token i may see tokens up to i only.
      grid: lengths of the token axes, `(N,)`, `(H, W)` or `(T, H, W)`, where the model fixes them; else None.
      prefix: class tokens and registers in front of the grid's tokens, which have no place on it. With a prefix the
        tokens are a sequence `(B, prefix + N, C)`, and a mixer of images is built with its grid all the same.
      layer: index of the layer from 0, among `num_layers`; some decays and scales depend on it.
      num_layers: number of layers of the model.
      context_features: channels of the context for cross-attention, None for self-attention.
      rotary: base of the rotary positions that the model leaves to those mixers that have them, or None.
    """

    features: int
    num_heads: int
    layout: Layout = Layout.SEQUENCE
    causal: bool = False
    grid: tuple[int, ...] | None = None
    prefix: int = 0
    layer: int = 0
    num_layers: int = 1
    context_features: int | None = None
    rotary: float | None = None

    @property
    def pattern(self) -> Pattern:
        if self.context_features is None:
            return Pattern.CAUSAL_SELF if self.causal else Pattern.SELF
        return Pattern.CAUSAL_CROSS if self.causal else Pattern.CROSS


class Constant(nnx.Variable):
    """An array that is not learned and may differ from layer to layer, such as the decays of linear attention.

    It is part of a module's state, unlike a number kept in an attribute: layers whose states are stacked and scanned
    each keep their own.
    """


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class View:
    """Who sees whom; what is None has its usual value. As an argument it stands in the place of `mask`.

    Attributes:
      rule: a static rule of `pallas_kernels.masks` on the order of the tokens, or one of `attnlab.nn.visibility` on
        their labels. It takes the place of the causal rule: `Causal() | SameLabel()` opens spans of equal label to be
        seen both ways.
      q_at: positions of the queries, `(B|1, N)` or `(B|1, N, axes)`, for rotary positions and ALiBi.
      k_at: positions of the keys, those of the queries in self-attention.
      q_idx: order of the queries, `(B|1, N)`, which `rule` looks at; 0..N-1, counted in each segment.
      k_idx: order of the keys, `(B|1, M)`.
      q_labels: `(B, N)` integers; a negative label equals none.
      k_labels: `(B, M)`; those of the queries in self-attention.
      segment_ids: `(B, N)`, or a pair `(B, N)`, `(B, M)`.
      mask: `(B, M)` or `(B|1, H|1, N, M)` boolean.
    """

    rule: Mask | None = dataclasses.field(default=None, metadata={"static": True})
    q_at: Any = None
    k_at: Any = None
    q_idx: Any = None
    k_idx: Any = None
    q_labels: Any = None
    k_labels: Any = None
    segment_ids: Any = None
    mask: Any = None


class Given(NamedTuple):
    """The arguments of a call beside the tokens, checked; what was not given is None.

    Attributes:
      context: `(B, M, C')` in the dtype of the tokens.
      mask: `(B, M)` or `(B|1, H|1, N, M)` boolean.
      segment_ids: `(B, N)`, one for each run of equal ids, or a pair `(B, N)`, `(B, M)`.
      positions: `(B, N)` or `(B, N, axes)`.
      view: the `View` that stood in the place of the mask.
      deterministic: False in training.
      edits: interventions on this layer of this call, see `attnlab.points`.
    """

    context: jax.Array | None = None
    mask: jax.Array | None = None
    segment_ids: Any = None
    positions: jax.Array | None = None
    view: View | None = None
    deterministic: bool = True
    edits: Any = None


def constructor_parameters(cls: type) -> dict[str, inspect.Parameter]:
    """The arguments of a class's constructor by name; of one that passes `**options` on, those of its base's too."""
    found: dict[str, inspect.Parameter] = {}
    for base in cls.__mro__:
        if "__init__" in vars(base):
            parameters = inspect.signature(vars(base)["__init__"]).parameters
            more = {n: p for n, p in parameters.items() if p.kind in _NAMED and n not in ("self", *found)}
            # What is passed on is passed on by name.
            found |= {n: p.replace(kind=p.KEYWORD_ONLY) for n, p in more.items()} if found else more
            if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
                break
    return found


_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


class SiteModule(nnx.Module):
    """A module that can be built from the place where it stands, see `for_site`."""

    @classmethod
    def check_site(cls, site: Site) -> None:
        """Raises `UnsupportedArgument` if the mechanism has no form for this site."""

    @classmethod
    def site_defaults(cls, site: Site) -> dict[str, Any]:
        """Options that fit this mechanism to a site where its usual defaults would not (a window for a small grid)."""
        return {}

    @classmethod
    def for_site(cls, site: Site, *, rngs: nnx.Rngs, **options: Any) -> Self:
        """Builds the module for a place in a model.

        The constructor is given those fields of the site that it takes, then `site_defaults`, then `options`.

        Args:
          site: what the model tells its parts.
          rngs: streams for parameters and dropout.
          **options: constructor arguments that override those that follow from the site.

        Raises:
          UnsupportedArgument: if the mechanism has no form with the site's pattern or layout.
          TypeError: if an option is not an argument of the constructor.
        """
        cls.check_site(site)
        arguments = [name for name in constructor_parameters(cls) if name != "rngs"]
        for option in options:
            if option not in arguments:
                raise TypeError(f"{cls.__name__} has no option {option!r}: {suggestion(option, arguments)}")
        told = {f.name: getattr(site, f.name) for f in dataclasses.fields(site) if f.name in arguments}
        return cls(**(told | cls.site_defaults(site) | options), rngs=rngs)


class Pooling(SiteModule):
    """Base of poolings: tokens `(B, N, C)` to one vector `(B, out_features)`, or to K vectors.

    `y = pooling(x, queries=None, *, mask=None, deterministic=True)`, and `pooling.branches(...)` with the same
    arguments; the dtype rule is that of token mixers. A pooling never drops the batch axis. With a mask the result is
    that of the tokens that exist alone; it is finite where none does. A mechanism writes `pool`, or `pool_branches` if
    its vector is K vectors side by side.

    `accepts` names the arguments that the mechanism has: `"mask"`, `"queries"`.
    """

    features: int
    out_features: int
    accepts: frozenset[str] = frozenset({"mask"})
    dtype: Any = None

    @final
    @numpy_ranks()
    def __call__(
        self,
        x: ArrayLike,
        queries: ArrayLike | None = None,
        *,
        mask: ArrayLike | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """Pools.

        Args:
          x: tokens `(B, N, C)`.
          queries: `(B, Q, C)` of the caller in place of the learned ones, for example class tokens of an encoder.
          mask: `(B, N)` boolean, True where a token exists.
          deterministic: False in training.

        Returns:
          `(B, out_features)` in the dtype of the computation, `dtype` or the tokens' own.

        Raises:
          UnsupportedArgument: for an argument that the mechanism does not have.
          ValueError: for shapes that do not fit, or a mask that is not boolean.
        """
        return self.pool(*self.check_call(x, queries, mask), deterministic)

    @final
    def branches(
        self,
        x: ArrayLike,
        queries: ArrayLike | None = None,
        *,
        mask: ArrayLike | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """The K vectors `(B, K, E)` of a pooling that makes several, one for all others; arguments as above."""
        return self.pool_branches(*self.check_call(x, queries, mask), deterministic)

    def pool(self, x: jax.Array, queries: jax.Array | None, mask: jax.Array | None, deterministic: bool) -> jax.Array:
        """The mechanism: checked arguments to `(B, out_features)`."""
        y = self.pool_branches(x, queries, mask, deterministic)
        return y.reshape(y.shape[0], -1)

    def pool_branches(
        self, x: jax.Array, queries: jax.Array | None, mask: jax.Array | None, deterministic: bool
    ) -> jax.Array:
        """The mechanism: checked arguments to `(B, K, E)`."""
        return self.pool(x, queries, mask, deterministic)[:, None]

    def check_call(
        self, x: ArrayLike, queries: ArrayLike | None = None, mask: ArrayLike | None = None
    ) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
        """The arguments as arrays, tokens and queries in the dtype of the computation.

        Raises:
          UnsupportedArgument: for an argument that the mechanism does not have.
          ValueError: if `x` is not `(B, N, C)` with the channels that the pooling was built for, N is 0, or the mask is
            not boolean `(B, N)`.
        """
        name, shape = type(self).__name__, jnp.shape(x)
        if len(shape) != 3 or shape[-1] != self.features or shape[1] == 0:
            raise ValueError(f"{name} pools tokens (B, N, {self.features}) with N at least 1, got shape {shape}")
        for argument, value in (("queries", queries), ("mask", mask)):
            if value is not None and argument not in self.accepts:
                allowed = ", ".join(sorted(self.accepts)) or "x only"
                raise UnsupportedArgument(f"{name} does not take {argument} (got {_words(value)}); it takes: {allowed}")
        if mask is not None and (jnp.shape(mask) != shape[:2] or jnp.result_type(mask) != jnp.bool_):
            raise ValueError(f"mask must be boolean (B, N) = {shape[:2]}, got {_words(mask)}")
        x = jnp.asarray(x, self.dtype)
        return (
            x,
            None if queries is None else jnp.asarray(queries, x.dtype),
            None if mask is None else jnp.asarray(mask),
        )


class TokenMixer(SiteModule):
    """Base of all token mixers; see the module docstring for the contract.

    Class attributes declare what the mechanism defines; an instance may narrow `accepts` (an option can make an
    argument meaningful or not). `permutation_equivariant` says that the non-causal form takes tokens as a set: permuted
    tokens give the permuted result, so that order must come from elsewhere. `independent_queries` says that what one
    query reads of a context does not depend on the others; only then it decodes. `collectives` names what the compiled
    program exchanges between devices beside an all-reduce when heads are cut over them, for a mechanism that itself
    mixes heads. `points` are the places where its values can be edited, see `attnlab.points`.
    """

    patterns: ClassVar[frozenset[Pattern]] = frozenset({Pattern.SELF})
    layouts: ClassVar[frozenset[Layout]] = frozenset({Layout.SEQUENCE})
    collectives: ClassVar[frozenset[str]] = frozenset()
    accepts: frozenset[str] = frozenset()
    points: frozenset[str] = frozenset()
    permutation_equivariant: bool = False
    independent_queries: ClassVar[bool] = True
    layout: Layout = Layout.SEQUENCE
    causal: bool = False
    prefix: int = 0
    context_features: int | None = None
    dtype: Any = None

    @final
    @numpy_ranks()
    def __call__(
        self,
        x: ArrayLike,
        context: ArrayLike | None = None,
        *,
        mask: ArrayLike | View | None = None,
        segment_ids: ArrayLike | tuple[ArrayLike, ArrayLike] | None = None,
        positions: ArrayLike | None = None,
        deterministic: bool = True,
        edits: Any = None,
    ) -> jax.Array:
        """Mixes tokens; see the module docstring for the arguments.

        Raises:
          UnsupportedArgument: for an argument that this mixer does not take.
          ValueError: for shapes that do not fit.
        """
        self.check_call(x, context=context, mask=mask, segment_ids=segment_ids, positions=positions)
        x = jnp.asarray(x, self.dtype)
        if x.shape[0] == 0:
            return x  # no examples; below, sizes are divided by one another
        view = mask if isinstance(mask, View) else None
        if view is not None:
            mask = view.mask
            segment_ids = view.segment_ids if segment_ids is None else segment_ids
            positions = view.q_at if positions is None else positions
        given = Given(
            context=None if context is None else jnp.asarray(context, x.dtype),
            mask=None if mask is None else jnp.asarray(mask),
            segment_ids=None if segment_ids is None else _one_id_each(segment_ids),
            positions=None if positions is None else integers("positions", positions),
            view=view,
            deterministic=deterministic,
            edits=edits,
        )
        return self.mix(x, given)

    def mix(self, x: jax.Array, given: Given) -> jax.Array:
        """The mechanism: checked tokens, in the dtype of the computation, to tokens of the same shape."""
        raise NotImplementedError

    def init_state(
        self,
        batch_size: int,
        max_length: int | None = None,
        *,
        context: ArrayLike | None = None,
        context_mask: ArrayLike | None = None,
        dtype: Any = None,
    ) -> Any:
        """Decode state before the first token: a tree of arrays with `length` `(B,)`, the tokens that are in it.

        Args:
          batch_size: number of sequences.
          max_length: most tokens that will be decoded; needed by mixers that cache keys, no limit for the others.
          context: `(B, M, C')` of cross-attention, which is projected here, once.
          context_mask: `(B, M)`, which of the context's tokens exist.
          dtype: of cached keys and values, float32 when None; recurrent states are always float32.
        """
        raise UnsupportedArgument(f"{type(self).__name__} has no decode state: {self._pattern_words()}")

    def prefill(
        self,
        x: ArrayLike,
        state: Any,
        *,
        mask: ArrayLike | View | None = None,
        positions: ArrayLike | None = None,
        edits: Any = None,
    ) -> tuple[jax.Array, Any]:
        """Advances the state by a run of tokens `(B, N, C)`.

        `mask` `(B, N)`, False at padding, lets prompts of unequal length share a batch, padded on the left; a `View`
        may also bring a rule and labels of these tokens. `positions` `(B, N)` go on from the last token's when None.
        """
        raise UnsupportedArgument(f"{type(self).__name__} does not decode: {self._pattern_words()}")

    def step(
        self, x_t: ArrayLike, state: Any, *, positions: ArrayLike | None = None, edits: Any = None
    ) -> tuple[jax.Array, Any]:
        """Advances the state by one token `(B, C)`, at `positions` `(B,)`; returns `(B, C)` and the new state."""
        raise UnsupportedArgument(f"{type(self).__name__} does not decode: {self._pattern_words()}")

    @classmethod
    def check_site(cls, site: Site) -> None:
        if site.pattern not in cls.patterns:
            raise UnsupportedArgument(
                f"{cls.__name__} has no {site.pattern} form; it has: {', '.join(sorted(cls.patterns))}"
            )
        if site.layout not in cls.layouts:
            raise UnsupportedArgument(
                f"{cls.__name__} does not take tokens laid out as {site.layout}; "
                f"it takes: {', '.join(sorted(cls.layouts))}"
            )

    def check_call(
        self,
        x: ArrayLike,
        *,
        context: ArrayLike | None = None,
        mask: ArrayLike | View | None = None,
        segment_ids: ArrayLike | tuple[ArrayLike, ArrayLike] | None = None,
        positions: ArrayLike | None = None,
        decoding: bool = False,
    ) -> None:
        """Refuses what this mixer does not take; `__call__` begins with it, and so does every `prefill`.

        A run that is `decoding` needs no context, which its state holds, and takes a mask of its own tokens, always.

        Raises:
          UnsupportedArgument: naming the argument, what came and what is allowed.
          ValueError: if `x` has the wrong rank or size, `mask` the wrong rank or dtype, the context is missing, or one
            thing is given twice.
        """
        name = type(self).__name__
        shape = jnp.shape(x)
        if len(shape) != self.layout.axes + 2:
            raise ValueError(
                f"{name} takes x of rank {self.layout.axes + 2} (batch, {self.layout.axes} token axes, channels) "
                f"for the layout {self.layout}, got shape {shape}"
            )
        if (features := getattr(self, "features", None)) is not None and shape[-1] != features:
            raise ValueError(f"{name} was built for {features} channels, got x of shape {shape}")
        if context is not None and not self.patterns & {Pattern.CROSS, Pattern.CAUSAL_CROSS}:
            raise UnsupportedArgument(f"{name} does not take context: {self._pattern_words()}")
        if context is None and self.context_features is not None and not decoding:
            raise ValueError(f"context is missing: {name} was built for one of {self.context_features} channels")
        given: dict[str, Any] = {"segment_ids": segment_ids, "positions": positions}
        if isinstance(mask, View):
            for argument, value, twin in (
                ("segment_ids", segment_ids, mask.segment_ids),
                ("positions", positions, mask.q_at),
            ):
                if value is not None and twin is not None:
                    raise ValueError(f"{argument} is given twice: in the call and in its View")
                given[argument] = twin if value is None else value
            given["rule"] = mask.rule
            if mask.rule is None and mask.q_labels is not None:
                raise ValueError("a View with labels needs a rule that looks at them, such as Causal() | SameLabel()")
            for argument in ("k_at", "q_idx", "k_idx", "q_labels", "k_labels"):
                value = getattr(mask, argument)
                _check_integers(argument, value)
                if value is not None and ("rule" not in self.accepts or (decoding and argument != "q_labels")):
                    raise UnsupportedArgument(f"{name} does not take {argument} of a View{' to decode' * decoding}")
            if decoding and mask.segment_ids is not None:
                raise UnsupportedArgument(f"{name} decodes one segment: it does not take segment_ids of a View")
            mask = mask.mask
        if mask is not None:
            rank, dtype = jnp.ndim(mask), jnp.result_type(mask)
            if rank not in ((2,) if decoding else (2, 4)):
                allowed = "(B, N)" if decoding else "(B, M) or (B|1, H|1, N, M)"
                raise ValueError(f"mask must be {allowed}, got rank {rank}")
            if dtype != jnp.bool_:
                raise ValueError(f"mask must be boolean, True where attention is allowed, got {dtype}")
            if not decoding:
                given["key_mask" if rank == 2 else "mask"] = mask
        for argument in ("segment_ids", "positions"):
            for value in given[argument] if isinstance(given[argument], tuple | list) else (given[argument],):
                _check_integers(argument, value)
        for argument, value in given.items():
            if value is not None and argument not in self.accepts:
                came = value if argument == "rule" else jax.tree.map(_words, value)
                allowed = ", ".join(sorted(self.accepts)) or "x only"
                raise UnsupportedArgument(f"{name} does not take {argument} (got {came}); it takes: {allowed}")

    def check_decodes(self, cross: bool) -> None:
        """Refuses to decode what a causal mixer of sequences, or a sequence's attention to a context, is not.

        Args:
          cross: whether there is a context.

        Raises:
          ValueError: if the mixer was built for a context and there is none.
          UnsupportedArgument: if it has no causal form to decode by.
        """
        if self.layout is not Layout.SEQUENCE or not (cross or self.context_features is not None or self.causal):
            raise UnsupportedArgument(
                f"{type(self).__name__} decodes causal self-attention of a sequence, or a sequence's attention to a "
                f"context; {self._pattern_words()}, its layout is {self.layout}"
            )
        if not cross and self.context_features is not None:
            raise ValueError(
                f"{type(self).__name__} was built for a context of {self.context_features} channels: "
                f"give init_state the context"
            )

    def _pattern_words(self) -> str:
        built = "causal" if self.causal else "non-causal"
        return f"it is built {built}; its patterns are {', '.join(sorted(self.patterns))}"


def _one_id_each(segment_ids: ArrayLike | tuple[ArrayLike, ArrayLike]) -> Any:
    """One array: the number of each run of equal ids. A pair: the ids, none of them changed."""
    if isinstance(segment_ids, tuple | list):
        return segments(*segment_ids)
    return runs(segments(segment_ids)[0])


def _check_integers(argument: str, value: ArrayLike | None) -> None:
    if value is None:
        return
    dtype = value.dtype if hasattr(value, "dtype") else np.asarray(value).dtype
    if not jnp.issubdtype(dtype, jnp.integer):
        raise ValueError(f"{argument} must be integers, got {dtype.name}{list(jnp.shape(value))}")
    if argument == "segment_ids" and jnp.ndim(value) != 2:
        raise ValueError(f"segment_ids must be (B, N), or with a context a pair, got shape {jnp.shape(value)}")


def _words(array: ArrayLike) -> str:
    return f"{jnp.result_type(array)}{list(jnp.shape(array))}"


def record(module: nnx.Module, name: str, value: Callable[[], Any]) -> None:
    """Stores an intermediate for `nnx.capture`; costs nothing outside it, since `value` is not even called.

    The names shared by all mixers: `"attention"`, weights `(B, H, N, M)` in float32, tokens of images and videos
    flattened in row-major order; `"gate"`; `"state"`. A block that leaves tokens out records `"kept"`, `(B, N)` int32:
    where each token that it returns stood among those that came in, -1 for one made of several.

    Example:
      y, intermediates = nnx.capture(mixer, nnx.Intermediate)(x)
      weights = intermediates["attention"][0]
    """
    if any(type(variable) is nnx.Intermediate for variable in getattr(module, "__captures__", ())):
        module.sow(nnx.Intermediate, name, value())
