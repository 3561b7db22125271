"""Points: the named places of a model where values are recorded and replaced.

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
    logits     (B, N, V)

A module visits its points with `visit`, which hands the value to the interventions of the call, if there are any, and
to `nnx.capture`, if it is on; without both it is the identity at no cost.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab.contract import record

POINTS = ("stream", "normed", "qkv", "scores", "attention", "heads", "mixed", "middle", "mlp", "logits")


class Intervention(nnx.Module):
    """Base of interventions: one method for each point where it acts.

        value, memory = self.<point>(value, at, memory)

    `memory` is what the intervention remembers of this layer in this sequence: a tree of arrays whose structure does
    not change between `init_memory`, prefill and steps.
    """

    def init_memory(self, batch_size: int, max_length: int) -> Any:
        """Memory of one layer before the first token; nothing by default."""
        return ()


@dataclasses.dataclass(frozen=True)
class At:
    """Where an intervention stands.

    Attributes:
      layer: index of the block, int32.
      phase: `"call"`, `"prefill"` or `"step"`.
      q_idx: order of the queries, `(B|1, N)`, at the points inside attention.
      k_idx: order of the keys, `(B|1, M)`.
      allowed: which key each query may see, broadcastable to `(B, H, N, M)`; None where all may.
      q: queries as attended with.
      k: keys as attended to.
      v: values as attended to.
    """

    layer: jax.Array
    phase: str
    q_idx: jax.Array | None = None
    k_idx: jax.Array | None = None
    allowed: jax.Array | None = None
    q: jax.Array | None = None
    k: jax.Array | None = None
    v: jax.Array | None = None

    def keys(self, mask: jax.Array) -> jax.Array:
        """A mask of tokens `(B, L)` as one of keys, `(B, 1, 1, M)`: cut or filled up with False."""
        keys = self.k.shape[1]
        mask = jnp.asarray(mask)[:, :keys]
        return jnp.pad(mask, ((0, 0), (0, keys - mask.shape[1])))[:, None, None, :]


class Edits:
    """The interventions on one layer of one call, with their memories; it lives while that layer is traced."""

    def __init__(self, interventions: Sequence[Intervention], memories: Sequence[Any], layer: Any, phase: str):
        self.interventions, self.memories = tuple(interventions), list(memories)
        self.layer, self.phase = jnp.asarray(layer, jnp.int32), phase

    def acts(self, *points: str) -> bool:
        """Whether any intervention acts at one of the points."""
        return any(hasattr(intervention, point) for intervention in self.interventions for point in points)

    def __call__(self, point: str, value: Any, **about: Any) -> Any:
        for index, intervention in enumerate(self.interventions):
            if (method := getattr(intervention, point, None)) is not None:
                at = At(self.layer, self.phase, **about)
                value, self.memories[index] = method(value, at, self.memories[index])
        return value


def acts(edits: Edits | None, *points: str) -> bool:
    """Whether the call is edited at one of the points."""
    return edits is not None and edits.acts(*points)


def visit(module: nnx.Module, edits: Edits | None, point: str, value: Any, **about: Any) -> Any:
    """The value of a point after the interventions of the call; recorded on `module` under `nnx.capture`."""
    if edits is not None:
        value = edits(point, value, **about)
    record(module, point, lambda: value)
    return value
