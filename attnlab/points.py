"""Points: the named places of a model where values are read and edited, without touching the model's code.

In the order of the pass:

    stream     (B, N, C)     before a block
    normed     (B, N, C)     what the mixer is given
    qkv        Heads         queries, keys and values as projected, before rotary positions and the cache
    scores     (B, H, N, M)  float32, after scale, softcap and bias, before masks, so that an edit cannot unmask
    attention  (B, H, N, M)  after the softmax
    heads      (B, N, H, E)  before the map out of the heads
    mixed      (B, N, C)     what the mixer returns
    middle     (B, N, C)     the stream between mixer and feed-forward
    mlp        (B, N, C)     what the feed-forward returns
    tokens     Tokens        what the next block is handed, with positions and masks; there may be fewer of them
    logits     (B, N, V)     of a language model, (B, V) of a classifier: once, after the last block

Tokens of images have two axes in place of N where the model hands them over so. In a step N is 1. What `tokens` leaves
out (`value.take(index)`) no later block sees, in later passes neither: the cache of each layer holds its own tokens,
and order is counted among those. Logits are those of the tokens that are left.

An intervention has a method for each point where it acts, named as the point:

    class Quieter(Intervention):
        def __init__(self, factor):
            self.factor = Setting(jnp.asarray(factor))

        def attention(self, weights, at, memory):
            return weights * self.factor[...], memory

    quieter = attach(model, Quieter(0.5), layers=(0, 1))
    logits = quieter(tokens)                       # and so in prefill, steps, generate
    restored = detach(quieter)

`attach` makes a new structure around the same arrays. What an intervention holds in variables (`Setting`) is part of
the model's state: another value compiles nothing anew, `vmap` sweeps it, and an optimizer can train it alone. A model
that is not edited pays nothing: `visit` is the identity then, and the program the same as if there were no points.

Edits of `scores` and `attention` force the dense form of attention in the layers where they act; other edits keep the
fast one. What is drawn under the name `attention` by mixers without that point (windows, routing, linear attention) can
be read, but no edit reaches it, and `attach` refuses to try.
"""

import dataclasses
import inspect
import math
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Self, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from attnlab.contract import record
from attnlab.suggest import suggestion
from attnlab.tokens import Tokens

LAYER_POINTS = ("stream", "normed", "qkv", "scores", "attention", "heads", "mixed", "middle", "mlp", "tokens")
MODEL_POINTS = ("logits",)
POINTS = LAYER_POINTS + MODEL_POINTS
ROW_POINTS = ("scores", "attention")
HEAD_AXIS = {"scores": 1, "attention": 1, "heads": 2}

PHASES = ("call", "prefill", "step")

ModelT = TypeVar("ModelT", bound="Editable")


class Setting(nnx.Variable):
    """An array that an intervention is given: which tokens are an image, a factor per head. It is not a parameter."""


@dataclasses.dataclass(frozen=True)
class At:
    """Where an intervention stands.

    Attributes:
      layer: index of the block, int32; at `logits` the number of blocks.
      phase: `"call"`, `"prefill"` or `"step"`.
      order: places of this pass's tokens among those that came to this layer, `(B, N)` int32 from 0, -1 at padding;
        None in a call, where tokens stand in order, and at `logits` where some were left out.
      q_idx: order of the queries, `(B|1, N)`; this and what follows at `scores` and `attention` only.
      k_idx: order of the keys, `(B|1, M)`.
      allowed: which key each query may see, broadcastable to `(B, H, N, M)`; None where all may.
      q: queries as attended with, `(B, N, H, D)`.
      k: keys as attended to, `(B, M, G, D)`.
      v: values as attended to, `(B, M, G, E)`, at `attention` only.
    """

    layer: jax.Array
    phase: str
    order: jax.Array | None = None
    q_idx: jax.Array | None = None
    k_idx: jax.Array | None = None
    allowed: jax.Array | None = None
    q: jax.Array | None = None
    k: jax.Array | None = None
    v: jax.Array | None = None

    def keys(self, flags: ArrayLike) -> jax.Array:
        """Flags `(B, L)` of a sequence's first L tokens as flags of the keys, `(B, M)`, False at the rest.

        In decoding tokens count without padding, as they stand in the cache; in a call as they were handed over.

        Raises:
          ValueError: at a point other than `scores` and `attention`.
        """
        if self.k_idx is None:
            raise ValueError("keys are known at the points scores and attention alone")
        keys = self.k_idx.shape[-1]
        flags = jnp.asarray(flags)[:, :keys]
        return jnp.pad(flags, ((0, 0), (0, keys - flags.shape[1])))

    def store(self, kept: ArrayLike, values: ArrayLike) -> jax.Array:
        """What is kept of every token of a sequence, `(B, L, ...)`, with this pass's `values` `(B, N, ...)` in it.

        Padding is left out, so that the result is in the order of `keys`; tokens beyond L are not kept.
        """
        kept, values = jnp.asarray(kept), jnp.asarray(values)
        places = jnp.arange(values.shape[1])[None] if self.order is None else self.order
        places = jnp.where(places < 0, kept.shape[1], jnp.broadcast_to(places, values.shape[:2]))
        return kept.at[jnp.arange(kept.shape[0])[:, None], places].set(values.astype(kept.dtype), mode="drop")

    def last_row(self) -> Self:
        """Where the last query of a pass stands."""
        return dataclasses.replace(
            self,
            q_idx=None if self.q_idx is None else self.q_idx[:, -1:],
            allowed=None if self.allowed is None else self.allowed[:, :, -1:],
            q=None if self.q is None else self.q[:, -1:],
        )


class Intervention(nnx.Module):
    """Base of interventions: one method for each point where it acts.

        value, memory = self.<point>(value, at, memory)

    The value keeps its shape, and is cast to its dtype. `memory` is what the intervention remembers of this layer (for
    `logits`: of the model) in this sequence; each attached intervention has its own. In decoding it lives in the decode
    state, as a tree of arrays whose structure, shapes and dtypes are those of `init_memory` before prefill, after it
    and in every step. A call starts from `init_memory` of its tokens and forgets, so there its structure is free.

    Class attribute `last_row`: whether `scores` and `attention` are edited in the last row of a pass only. The methods
    are then given that row alone, N = 1; if no other intervention wants more, all other rows keep the fast form of
    attention.

    Raises, where a class is defined:
      TypeError: for a public method whose name is no point, or a method that does not take `(value, at, memory)`.
    """

    last_row: ClassVar[bool] = False

    def __init_subclass__(cls, **options: Any):
        super().__init_subclass__(**options)
        for name, method in list(vars(cls).items()):
            if name.startswith("_") or not (callable(method) or isinstance(method, staticmethod | classmethod)):
                continue
            if name not in (*POINTS, "init_memory"):
                raise TypeError(
                    f"{cls.__name__}.{name} is no point: {suggestion(name, POINTS)}; what is not a point is private, "
                    f"or init_memory"
                )
            wanted = ("batch_size", "max_length") if name == "init_memory" else ("value", "at", "memory")
            try:
                inspect.signature(method).bind("self", *wanted)
            except TypeError as error:
                raise TypeError(f"{cls.__name__}.{name} must take (self, {', '.join(wanted)}): {error}") from error

    def init_memory(self, batch_size: int, max_length: int | None) -> Any:
        """Memory of one layer before the first token; nothing by default.

        Args:
          batch_size: number of sequences.
          max_length: most tokens that a sequence will have, as the decode state was told; in a call their number.
        """
        return ()


def points_of(intervention: Intervention | type[Intervention]) -> frozenset[str]:
    """The points at which an intervention acts."""
    cls = intervention if isinstance(intervention, type) else type(intervention)
    return frozenset(point for point in POINTS if hasattr(cls, point))


class Attachment(nnx.Module):
    """An intervention in the slot of a model, with the layers and heads in which it acts.

    Attributes:
      intervention: it.
      layers: indices of the layers in which it is called; all when None.
      layer_mask: `(L,)` boolean, where its results are taken; None for everywhere.
      head_mask: `(H,)` or `(L, H)` boolean, in which heads they are taken; None for all.
    """

    def __init__(
        self,
        intervention: Intervention,
        layers: tuple[int, ...] | None = None,
        layer_mask: ArrayLike | None = None,
        head_mask: ArrayLike | None = None,
    ):
        self.intervention, self.layers = intervention, layers
        self.layer_mask = nnx.data(None) if layer_mask is None else Setting(jnp.asarray(layer_mask))
        self.head_mask = nnx.data(None) if head_mask is None else Setting(jnp.asarray(head_mask))

    def acts_on(self, layer: int | None) -> bool:
        """Whether it has something to do in a layer; None stands for what follows the last one."""
        points = points_of(self.intervention)
        if layer is None:
            return not points.isdisjoint(MODEL_POINTS)
        return not points.isdisjoint(LAYER_POINTS) and (self.layers is None or layer in self.layers)

    def choose(self, point: str, old: Any, new: Any, layer: jax.Array) -> Any:
        """The new value in the chosen layers and heads, the old one elsewhere."""
        if point in MODEL_POINTS:
            return new
        chosen = None if self.layer_mask is None else self.layer_mask[...][layer]
        if self.head_mask is not None and point in HEAD_AXIS:
            heads = self.head_mask[...]
            heads = heads[layer] if heads.ndim == 2 else heads
            shape = [1] * old.ndim
            shape[HEAD_AXIS[point]] = -1
            heads = heads.reshape(shape)
            chosen = heads if chosen is None else chosen & heads
        return new if chosen is None else jax.tree.map(lambda n, o: jnp.where(chosen, n, o), new, old)


class Edits:
    """The interventions on one layer of one pass, with their memories; it lives while that layer is traced.

    Args:
      attachments: those that act here, in the order of attachment.
      layer: index of the layer, a number or a traced one.
      phase: `"call"`, `"prefill"` or `"step"`.
      memories: one for each attachment, from the decode state; None in a call.
      order: see `At`.
    """

    def __init__(
        self,
        attachments: Sequence[Attachment],
        layer: ArrayLike,
        phase: str = "call",
        memories: Sequence[Any] | None = None,
        order: jax.Array | None = None,
    ):
        if phase not in PHASES:
            raise ValueError(f"phase must be one of {', '.join(PHASES)}, got {phase!r}")
        self.attachments, self.phase, self.order = tuple(attachments), phase, order
        self.layer = jnp.asarray(layer, jnp.int32)
        self.memories = None if memories is None else list(memories)

    def acts(self, *points: str) -> bool:
        """Whether any intervention acts at one of the points."""
        return any(not points_of(a.intervention).isdisjoint(points) for a in self.attachments)

    @property
    def last_row_only(self) -> bool:
        """Whether no intervention edits other rows of scores and attention than the last."""
        acting = (a.intervention for a in self.attachments)
        return all(i.last_row for i in acting if not points_of(i).isdisjoint(ROW_POINTS))

    def __call__(self, point: str, value: Any, **about: Any) -> Any:
        if self.memories is None:
            batch, *tokens = jax.tree.leaves(value)[0].shape[:-1]
            self.memories = [a.intervention.init_memory(batch, math.prod(tokens)) for a in self.attachments]
        at = At(self.layer, self.phase, self.order, **about)
        for index, attachment in enumerate(self.attachments):
            method = getattr(type(attachment.intervention), point, None)
            if method is None:
                continue
            name, old = f"{type(attachment.intervention).__name__}.{point}", self.memories[index]
            last = attachment.intervention.last_row and point in ROW_POINTS
            shown, here = (value[:, :, -1:], at.last_row()) if last else (value, at)
            pair = method(attachment.intervention, shown, here, old)
            if not isinstance(pair, tuple) or len(pair) != 2:
                raise TypeError(f"{name} must return a pair (value, memory), got {type(pair).__name__}")
            new, memory = pair
            _check_form(name, new, shown, fewer=point == "tokens" and self.phase != "step")
            if self.phase != "call" and _form(memory, dtypes=True) != _form(old, dtypes=True):
                raise ValueError(
                    f"{name} must keep the structure of its memory in decoding, that of init_memory: "
                    f"got {_words(memory)} for {_words(old)}"
                )
            new = jax.tree.map(lambda n, v: jnp.asarray(n, v.dtype), new, value)
            new = value.at[:, :, -1:].set(new) if last else new
            value = attachment.choose(point, value, new, self.layer)
            self.memories[index] = memory
        return value


def _check_form(name: str, new: Any, old: Any, *, fewer: bool) -> None:
    """Raises `ValueError` unless a value keeps its form; where it may have `fewer` tokens, but for their number."""
    tokens = new.x.shape[1] if fewer and isinstance(new, Tokens) else 0
    if tokens and tokens <= old.x.shape[1]:
        old = jax.tree.map(lambda a: jax.ShapeDtypeStruct((a.shape[0], tokens, *a.shape[2:]), a.dtype), old)
    if _form(new) != _form(old):
        raise ValueError(f"{name} must keep the shape of its value: got {_words(new)} for {_words(old)}")


def _form(tree: Any, *, dtypes: bool = False) -> Any:
    leaves, structure = jax.tree.flatten(tree)
    return structure, [(jnp.shape(leaf), jnp.result_type(leaf) if dtypes else None) for leaf in leaves]


def _words(tree: Any) -> str:
    return str(jax.tree.map(lambda leaf: f"{jnp.result_type(leaf)}{list(jnp.shape(leaf))}", tree))


def acts(edits: Edits | None, *points: str) -> bool:
    """Whether the pass is edited at one of the points."""
    return edits is not None and edits.acts(*points)


def visit(module: nnx.Module, edits: Edits | None, point: str, value: Any, **about: Any) -> Any:
    """The value of a point after the interventions of the pass; recorded on `module` under `nnx.capture`."""
    if edits is not None:
        value = edits(point, value, **about)
    record(module, point, lambda: value)
    return value


@dataclasses.dataclass(frozen=True)
class Pass:
    """The edits of one pass through a model.

    Attributes:
      blocks: for each block its edits, or None where nothing acts; None for a model that is not edited.
      model: edits of what follows the blocks, or None.
    """

    blocks: tuple[Edits | None, ...] | None = None
    model: Edits | None = None

    def of(self, start: int, stop: int) -> tuple[Edits | None, ...] | None:
        """Those of the blocks from `start` to below `stop`, for a model that has them in several runs."""
        return None if self.blocks is None else self.blocks[start:stop]

    def acts(self, *points: str) -> bool:
        """Whether any block is edited at one of the points."""
        return self.blocks is not None and any(acts(edits, *points) for edits in self.blocks)

    @property
    def memories(self) -> tuple[Any, ...]:
        """What is remembered after the pass, for the decode state; () for a model that is not edited."""
        if self.blocks is None:
            return ()
        return tuple(() if edits is None else tuple(edits.memories or ()) for edits in (*self.blocks, self.model))


class Layer(nnx.Module):
    """Base of the layers that an `Editable` model counts; `points` are those of the layer and of its mixer."""

    @property
    def points(self) -> frozenset[str]:
        raise NotImplementedError


class Editable(nnx.Module):
    """Base of models that interventions can be attached to.

    Each pass asks for its edits once, hands them to its blocks, and visits the points that are the model's own:

        edits = self.edits()
        x = self.blocks(x, edits=edits.blocks)          # or edits.of(start, stop), run by run
        return visit(self, edits.model, "logits", self.head(x))

    A model that decodes keeps memories in its state: `init_memories`, then `self.edits("prefill", memories, order)`,
    and `edits.memories` after the blocks and logits are through. Class attribute `model_points`: which of
    `MODEL_POINTS` it visits.
    """

    interventions: Sequence[Attachment] = ()
    model_points: ClassVar[frozenset[str]] = frozenset()

    def edited_layers(self) -> tuple[Layer, ...]:
        """The layers in the order of the pass, which is that of their paths in the model."""
        return tuple(layer for _, layer in layer_paths(self))

    def edits(self, phase: str = "call", memories: Sequence[Any] | None = None, order: jax.Array | None = None) -> Pass:
        """The edits of one pass; of all points nothing is edited unless something is attached.

        Args:
          phase: `"call"`, `"prefill"` or `"step"`.
          memories: of the decode state, None in a call.
          order: `(B, N)` places of the tokens in their sequences, see `At`; None in a call.
        """
        if not self.interventions:
            return Pass()
        count = len(self.edited_layers())
        found = []
        for layer in (*range(count), None):
            acting = [a for a in self.interventions if a.acts_on(layer)]
            memory = None if memories is None else memories[count if layer is None else layer]
            found.append(Edits(acting, count if layer is None else layer, phase, memory, order) if acting else None)
        return Pass(tuple(found[:-1]), found[-1])

    def init_memories(self, batch_size: int, max_length: int | None) -> tuple[Any, ...]:
        """Memories before the first token, for the decode state; () for a model that is not edited."""
        if not self.interventions:
            return ()
        layers = (*range(len(self.edited_layers())), None)
        return tuple(
            tuple(a.intervention.init_memory(batch_size, max_length) for a in self.interventions if a.acts_on(layer))
            for layer in layers
        )


def layer_paths(model: nnx.Module) -> list[tuple[tuple[Any, ...], Layer]]:
    """The layers of a model with their paths, in the order of the pass; a layer inside of another does not count."""
    found = [(path, part) for path, part in nnx.iter_modules(model) if isinstance(part, Layer)]
    found.sort(key=lambda item: [(isinstance(step, str), step) for step in item[0]])
    outer: list[tuple[tuple[Any, ...], Layer]] = []
    for path, layer in found:
        if not outer or path[: len(outer[-1][0])] != outer[-1][0]:
            outer.append((path, layer))
    return outer


def attach(
    model: ModelT,
    *interventions: Intervention,
    layers: Iterable[int] | ArrayLike | None = None,
    heads: ArrayLike | None = None,
) -> ModelT:
    """The model under interventions, after those that it already has.

    Args:
      model: any model that is `Editable`.
      *interventions: in the order in which they act at each point.
      layers: indices of the blocks where they act, all when None; elsewhere nothing is computed for them. Or a boolean
        array `(L,)`: they are computed in all L blocks and take effect where it is True, so that another choice
        compiles nothing anew and `vmap` sweeps it. `logits` are edited in any case.
      heads: boolean `(H,)` or `(L, H)`, in which heads edits of `scores`, `attention` and `heads` take effect.

    Returns:
      A new structure that holds the same arrays; `model` and the interventions are unchanged, and share nothing with it
      that could change.

    Raises:
      TypeError: for a model that is not `Editable`, or what is no `Intervention`.
      ValueError: for an intervention that acts nowhere, or at a point that the model or one of the chosen layers lacks;
        for layers that do not exist, or masks of the wrong shape or dtype.
    """
    if not isinstance(model, Editable):
        raise TypeError(f"model must be Editable, got {type(model).__name__}")
    if not interventions:
        raise ValueError("interventions are missing: attach(model, intervention, ...)")
    for intervention in interventions:
        if not isinstance(intervention, Intervention):
            raise TypeError(f"interventions must be instances of Intervention, got {intervention!r}")
    blocks = model.edited_layers()
    chosen, mask = _chosen_layers(layers, len(blocks))
    _check_heads(heads, len(blocks))
    for intervention in interventions:
        where = range(len(blocks)) if chosen is None else chosen
        _check_points(intervention, model, blocks, where, heads, mask is not None)
    edited = nnx.clone(model)
    more = [Attachment(nnx.clone(intervention), chosen, mask, heads) for intervention in interventions]
    edited.interventions = nnx.List([*edited.interventions, *more])
    return edited


def detach(model: ModelT) -> ModelT:
    """The model without any interventions: the inverse of `attach`, a new structure that holds the same arrays.

    Raises:
      TypeError: for a model that is not `Editable`.
    """
    if not isinstance(model, Editable):
        raise TypeError(f"model must be Editable, got {type(model).__name__}")
    model = nnx.clone(model)
    if "interventions" in vars(model):
        del model.interventions
    return model


def _chosen_layers(layers: Any, count: int) -> tuple[tuple[int, ...] | None, Any]:
    """Indices of layers, or a mask of them."""
    if layers is None:
        return None, None
    if hasattr(layers, "dtype") and jnp.result_type(layers) == jnp.bool_:
        if jnp.shape(layers) != (count,):
            raise ValueError(f"layers must be indices or a boolean array ({count},), got shape {jnp.shape(layers)}")
        return None, layers
    chosen = tuple(layers)
    if any(isinstance(layer, bool) or not 0 <= layer < count for layer in chosen):
        raise ValueError(f"layers must be among the {count} of the model, 0..{count - 1}, got {list(chosen)}")
    return tuple(int(layer) for layer in chosen), None


def _check_heads(heads: ArrayLike | None, count: int) -> None:
    if heads is None:
        return
    shape, dtype = jnp.shape(heads), jnp.result_type(heads)
    if dtype != jnp.bool_ or len(shape) not in (1, 2) or (len(shape) == 2 and shape[0] != count):
        raise ValueError(f"heads must be boolean (H,) or ({count}, H), got {dtype}{list(shape)}")


def _check_points(
    intervention: Intervention,
    model: Editable,
    blocks: Sequence[Layer],
    chosen: Iterable[int],
    heads: Any,
    masked: bool,
) -> None:
    name, points = type(intervention).__name__, points_of(intervention)
    if not points:
        raise ValueError(f"{name} acts at no point: it has none of the methods {', '.join(POINTS)}")
    if masked and "tokens" in points:
        raise ValueError(f"{name} acts at tokens, whose number cannot follow a mask: give layers as indices")
    if heads is not None and points.isdisjoint(HEAD_AXIS):
        raise ValueError(f"heads are given, but {name} acts at {_listed(points)}, where there are none")
    if missing := points.intersection(MODEL_POINTS) - model.model_points:
        raise ValueError(f"{name} acts at {_listed(missing)}, which {type(model).__name__} does not have")
    for layer in chosen:
        if missing := points.intersection(LAYER_POINTS) - blocks[layer].points:
            raise ValueError(
                f"{name} acts at {_listed(missing)}, which layer {layer} does not have; it has "
                f"{_listed(blocks[layer].points)}; choose others by layers"
            )


def _listed(points: Iterable[str]) -> str:
    return ", ".join(point for point in POINTS if point in set(points)) or "none"
