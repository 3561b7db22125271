"""Path patching (Merullo et al., ICLR 2024, arXiv:2310.08744): which heads act through which others.

A model is run on clean tokens and on corrupted ones of the same length; logits of the last token give the mean logit
difference LD between a right answer and a wrong one. For each head (l, h) as sender, and receivers R, at position p:

    1. run on clean tokens, the sender's output at p as in the corrupted run, that of all other heads at p as in the
       clean run (with `freeze_mlps` feed-forwards at p too); take what the receivers have there before it is replaced
    2. run on clean tokens with these values of the receivers at p:  LD'
    effect = (LD' - LD_clean) / (LD_corrupt - LD_clean)         1: as if all were corrupted,  0: no effect

Other positions run freely. A receiver is a head's query, key, value or output, or the stream in front of or behind a
block. Senders that are receivers give 0, and so do those behind the first receiver's layer. Circuits are found from the
end: what acts on the last stream, then what acts on these heads' queries, then on those heads' values.

    effect = path_patching(model, clean, corrupted, answers, [("stream", 12)]).effect         # GPT-2: the last stream
    effect = path_patching(model, clean, corrupted, answers, [(9, 9)], component="q").effect  # its movers' queries

Reference: jmerullo/circuit_reuse, `path_patching`, `logits_to_ave_logit_diff`.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from attnlab.contract import record
from attnlab.measure import watch
from attnlab.nn.dense_mixer import Heads
from attnlab.points import At, Editable, Intervention, attach
from attnlab.registry import Cost, Example, Kind, Paper, Source, register
from attnlab.tokens import Tokens

Receiver = tuple[int | Literal["stream"], int]
"""A head (layer, head), or ("stream", l): the stream in front of block l, behind all blocks for l = L."""


class PathEffects(NamedTuple):
    """What path patching finds, float32.

    Attributes:
      effect: `(L, H)`.
      clean: LD of the clean run.
      corrupt: LD of the corrupted run.
    """

    effect: jax.Array
    clean: jax.Array
    corrupt: jax.Array


def logit_difference(logits: ArrayLike, answers: ArrayLike) -> jax.Array:
    """Mean over examples of the last token's logit of the right answer minus that of the wrong one.

    Args:
      logits: `(B, N, V)`.
      answers: `(B, 2)` token ids, the right one first.
    """
    last = jnp.take_along_axis(jnp.asarray(logits)[:, -1], jnp.asarray(answers), axis=-1)
    return jnp.mean(last[:, 0] - last[:, 1])


class _Frozen(Intervention):
    """Base: values `(L, B, ...)` at one position, in all layers."""

    def __init__(self, values: jax.Array, position: int):
        self.values, self.position = nnx.Variable(values), position

    def _put(self, x: jax.Array, at: At) -> jax.Array:
        return x.at[:, self.position].set(self.values[...][at.layer].astype(x.dtype))


class _FrozenHeads(_Frozen):
    """What heads give; what was there is recorded."""

    def heads(self, y: jax.Array, at: At, memory: Any) -> tuple[jax.Array, Any]:
        record(self, "heads_before", lambda: y)
        return self._put(y, at), memory


class _FrozenFeedForwards(_Frozen):
    def mlp(self, y: jax.Array, at: At, memory: Any) -> tuple[jax.Array, Any]:
        return self._put(y, at), memory


class _Received(Intervention):
    """Base: new values `(L, B, ...)` at one position, in the layers where it is attached."""

    def __init__(self, values: jax.Array, chosen: jax.Array, position: int, part: str = ""):
        self.values, self.chosen = nnx.Variable(values), nnx.Variable(chosen)
        self.position, self._part = position, part

    def _put(self, x: jax.Array, at: At) -> jax.Array:
        """Replaces a head's row, `(B, N, H, D)`, or a stream's, `(B, N, C)`."""
        new, old = self.values[...][at.layer].astype(x.dtype), x[:, self.position]
        chosen = self.chosen[...][at.layer]
        chosen = chosen[:, None] if x.ndim == 4 else chosen
        return x.at[:, self.position].set(jnp.where(chosen, new, old))


class _InHeads(_Received):
    def heads(self, y: jax.Array, at: At, memory: Any) -> tuple[jax.Array, Any]:
        return self._put(y, at), memory


class _InProjections(_Received):
    def qkv(self, heads: Heads, at: At, memory: Any) -> tuple[Heads, Any]:
        return heads._replace(**{self._part: self._put(getattr(heads, self._part), at)}), memory


class _InStream(_Received):
    def stream(self, x: jax.Array, at: At, memory: Any) -> tuple[jax.Array, Any]:
        return self._put(x, at), memory


class _BehindBlocks(_Received):
    def tokens(self, value: Tokens, at: At, memory: Any) -> tuple[Tokens, Any]:
        return dataclasses.replace(value, x=self._put(value.x, dataclasses.replace(at, layer=0))), memory


def _example() -> Example:
    from attnlab.interventions.examples import small_language_model

    tokens, model = small_language_model()
    other = (tokens + 3) % 11
    given = {"clean": tokens, "corrupted": other, "answers": tokens[:, :2], "receivers": (("stream", 2),)}
    return Example(_PathPatching(model), (), given, batched=(), differentiable=())


class _PathPatching(nnx.Module):
    """The function as a module that holds its model, for the example."""

    def __init__(self, model: Editable):
        self.model = model

    def __call__(self, **given: Any) -> PathEffects:
        return path_patching(self.model, **given)


@register(
    "circuit_reuse",
    kind=Kind.ANALYSIS,
    paper=Paper(
        "Circuit Component Reuse Across Tasks in Transformer Language Models",
        "Merullo et al.",
        2024,
        "2310.08744",
        number=86,
    ),
    source=Source.AUTHORS_CODE,
    repository="jmerullo/circuit_reuse",
    cost=Cost("O(L·H) passes", "O(L·N·C)"),
    summary="path patching: the effect of each head on an answer through chosen receivers",
    small=_example,
)
def path_patching(
    model: Editable,
    clean: ArrayLike,
    corrupted: ArrayLike,
    answers: ArrayLike,
    receivers: Sequence[Receiver],
    *,
    component: Literal["q", "k", "v", "z"] = "z",
    position: int = -1,
    freeze_mlps: bool = False,
    truncate: bool = True,
    double: bool = False,
) -> PathEffects:
    """Effects of all heads through receivers.

    Args:
      model: a language model whose mixers have the points `qkv` and `heads`, all with the same heads.
      clean: token ids `(B, N)`.
      corrupted: token ids `(B, N)`.
      answers: `(B, 2)` token ids, the right one first.
      receivers: heads `(layer, head)`, of `component`, or streams `("stream", layer)`; not both.
      component: what of the receivers is patched: queries, keys and values as projected (of key heads in grouped
        attention), or the head's output.
      position: where; negative ones count from the end.
      freeze_mlps: whether feed-forwards at the position are as in the clean run in step 1.
      truncate: whether senders behind the first receiver's layer are left out; they have no effect.
      double: whether it is computed in float64, which CPUs and GPUs have, and not in compiled functions around it: an
        effect is the difference of two numbers that are nearly equal, and below 1e-3 float32 has few digits of it.

    Raises:
      ValueError: for arguments that do not fit.
    """
    if double:
        with jax.enable_x64(True):
            return _in_double(model, clean, corrupted, answers, receivers, component, position, freeze_mlps, truncate)
    clean, corrupted, answers = (jnp.asarray(array) for array in (clean, corrupted, answers))
    depth = len(model.edited_layers())
    _check(clean, corrupted, answers, receivers, component, position, depth)
    position %= clean.shape[1]
    clean_logits, seen = watch(model, clean)
    corrupt_logits, other = watch(model, corrupted)
    was, becomes = (jnp.stack([y[:, position] for y in run["heads"]]) for run in (seen, other))
    fixed: list[Intervention] = []
    if freeze_mlps:
        fixed.append(_FrozenFeedForwards(jnp.stack([y[:, position] for y in seen["mlp"]]), position))
    num_heads = was.shape[2]
    of_stream = receivers[0][0] == "stream"
    last = depth - 1 if of_stream or not truncate else min(int(layer) for layer, _ in receivers)
    base, worst = logit_difference(clean_logits, answers), logit_difference(corrupt_logits, answers)

    def effect(sender: jax.Array) -> jax.Array:
        layer, head = sender // num_heads, sender % num_heads
        is_sender = (jnp.arange(depth)[:, None] == layer) & (jnp.arange(num_heads) == head)
        frozen = jnp.where(is_sender[:, None, :, None], becomes, was)
        _, run = watch(attach(model, _FrozenHeads(frozen, position), *fixed), clean)
        patched = logit_difference(_received(model, run, receivers, component, position)(clean), answers)
        return (patched - base) / (worst - base)

    count = (last + 1) * num_heads
    effects = jnp.zeros(depth * num_heads).at[:count].set(jax.lax.map(effect, jnp.arange(count)))
    if not of_stream and component == "z":
        places = jnp.asarray([int(layer) * num_heads + head for layer, head in receivers])
        effects = effects.at[places].set(0)
    return PathEffects(effects.reshape(depth, num_heads), base, worst)


def _in_double(model: Editable, clean: ArrayLike, corrupted: ArrayLike, answers: ArrayLike, *options: Any) -> Any:
    """The same in float64; the result is float32."""
    graph, state = nnx.split(model)
    wide = nnx.merge(graph, jax.tree.map(_double, state))
    for _, part in nnx.iter_modules(wide):
        if getattr(part, "dtype", None) is not None:
            part.dtype = jnp.float64
    receivers, component, position, freeze_mlps, truncate = options
    found = path_patching(
        wide,
        *(np.asarray(ids) for ids in (clean, corrupted, answers)),
        receivers,
        component=component,
        position=position,
        freeze_mlps=freeze_mlps,
        truncate=truncate,
    )
    return PathEffects(*(jnp.asarray(field, jnp.float32) for field in found))


def _double(leaf: Any) -> Any:
    array = np.asarray(leaf)
    return jnp.asarray(array, jnp.float64) if np.issubdtype(array.dtype, np.floating) else leaf


def _received(model: Editable, run: Any, receivers: Sequence[Receiver], component: str, position: int) -> Editable:
    """The model with what the receivers had in a run."""
    depth = len(model.edited_layers())
    if receivers[0][0] == "stream":
        for _, layer in receivers:
            x = run["stream"][layer] if layer < depth else run["tokens"][-1].x
            values, chosen = jnp.stack([x[:, position]] * depth), jnp.ones(depth, bool)
            edit = (_InStream if layer < depth else _BehindBlocks)(values, chosen, position)
            model = attach(model, edit, layers=(min(layer, depth - 1),))
        return model
    if component == "z":
        before = run["heads_before"]
        found = before if isinstance(before, tuple) else (before,)
    else:
        found = tuple(getattr(heads, component) for heads in run["qkv"])
    values = jnp.stack([array[:, position] for array in found])
    chosen = jnp.zeros((depth, values.shape[2]), bool)
    for layer, head in receivers:
        chosen = chosen.at[int(layer), head].set(True)
    kind = _InHeads if component == "z" else _InProjections
    layers = sorted({int(layer) for layer, _ in receivers})
    return attach(model, kind(values, chosen, position, component), layers=layers)


def _check(
    clean: jax.Array,
    corrupted: jax.Array,
    answers: jax.Array,
    receivers: Sequence[Receiver],
    component: str,
    position: int,
    depth: int,
) -> None:
    if clean.ndim != 2 or clean.shape != corrupted.shape:
        raise ValueError(f"clean and corrupted must be (B, N) alike, got {clean.shape} and {corrupted.shape}")
    if answers.shape != (clean.shape[0], 2):
        raise ValueError(f"answers must be (B, 2) = {(clean.shape[0], 2)}, got {answers.shape}")
    if component not in ("q", "k", "v", "z"):
        raise ValueError(f"component must be q, k, v or z, got {component!r}")
    if not -clean.shape[1] <= position < clean.shape[1]:
        raise ValueError(f"position must be one of {clean.shape[1]} tokens, got {position}")
    streams = [receiver for receiver in receivers if receiver[0] == "stream"]
    if not receivers or len(streams) not in (0, len(receivers)):
        raise ValueError(f"receivers must be heads or streams, and not both, got {list(receivers)}")
    for where, index in receivers:
        if (not 0 <= index <= depth) if where == "stream" else (not 0 <= int(where) < depth or index < 0):
            raise ValueError(f"receivers must be among {depth} layers, got {(where, index)}")
