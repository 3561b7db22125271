"""A run of blocks: in a call, recomputed in the backward pass if asked for, and in decoding.

Between two blocks stands the point `tokens`, where an intervention may leave some out.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab.contract import View
from attnlab.models.block import Block
from attnlab.nn.masking import segment_positions
from attnlab.points import Edits, acts, visit
from attnlab.tokens import Tokens
from pallas_kernels.integers import integers


def order_after(state: Any, tokens: int, mask: jax.Array | View | None = None) -> jax.Array:
    """Places `(B, N)` of the next N tokens among all that a mixer's decode state has seen; -1 at padding."""
    mask = mask.mask if isinstance(mask, View) else mask
    real = jnp.ones((*state.length.shape, tokens), bool) if mask is None else jnp.asarray(mask)
    return jnp.where(real, state.length[:, None] + jnp.cumsum(real, axis=1, dtype=jnp.int32) - 1, -1)


def hand_over(
    block: Block, edits: Edits | None, x: jax.Array, given: dict[str, Any]
) -> tuple[jax.Array, dict[str, Any]]:
    """Visits the point `tokens` behind a block.

    Args:
      block: it.
      edits: of the block.
      x: what it returned, `(B, *S, C)`.
      given: what was handed to its mixer: `mask`, `positions`, `segment_ids`, and anything else.

    Returns:
      What the next block is given: the same, or with fewer tokens `(B, N, C)` and arguments for these.

    Raises:
      ValueError: if tokens are edited under a mask of pairs of tokens.
    """
    if "tokens" not in block.points:
        return x, given
    flat = x.reshape(x.shape[0], -1, x.shape[-1])
    mask, view = given.get("mask"), None
    if isinstance(mask, View):
        mask, view = mask.mask, mask
    ids, positions = given.get("segment_ids"), given.get("positions")
    if not acts(edits, "tokens"):
        mask = None if mask is None or jnp.ndim(mask) == 4 else mask
        visit(block, edits, "tokens", Tokens(flat, positions, mask, ids, None if view is None else view.q_labels))
        return x, given
    if mask is not None and jnp.ndim(mask) == 4:
        raise ValueError("tokens are edited: the mask must be one of tokens, (B, N), not of pairs of them")
    if positions is None:
        positions = jnp.arange(flat.shape[1]) if ids is None else segment_positions(ids)
    positions = jnp.broadcast_to(positions, flat.shape[:2])
    labels = None if view is None else view.q_labels
    value = visit(block, edits, "tokens", Tokens(flat, positions, mask, ids, labels, edits.order))
    x = value.x.reshape(x.shape) if value.x.shape == flat.shape else value.x
    mask = value.mask if view is None else dataclasses.replace(view, mask=value.mask, q_labels=value.labels)
    new = {"mask": mask, "positions": value.positions, "segment_ids": value.segment_ids}
    return x, given | {name: array for name, array in new.items() if array is not None}


def _recomputed(block: Block, x: jax.Array, arguments: dict[str, Any]) -> jax.Array:
    """What the block returns, computed again in the backward pass."""
    return nnx.remat(lambda block, x: block(x, **arguments))(block, x)


class Blocks(nnx.Module):
    """A run of given blocks.

    Args:
      blocks: in the order of the pass.
      remat: recompute each block in the backward pass instead of keeping what is inside.
    """

    def __init__(self, blocks: Sequence[Block], *, remat: bool = False):
        self.blocks, self.remat = nnx.List(blocks), remat

    def __call__(
        self,
        x: jax.Array,
        *,
        edits: Sequence[Edits | None] | None = None,
        behind: list[jax.Array] | None = None,
        **arguments: Any,
    ) -> jax.Array:
        """Tokens through all blocks; `edits` one for each, `arguments` as `Block`.

        What each block leaves is appended to `behind`.
        """
        for block, edit in zip(self.blocks, self._each(edits), strict=True):
            # What is recorded or remembered inside a rematerialised block cannot leave it.
            if self.remat and edit is None and not hasattr(self, "__captures__"):
                x = _recomputed(block, x, arguments)
            else:
                x, arguments = hand_over(block, edit, block(x, edits=edit, **arguments), arguments)
            if behind is not None:
                behind.append(x)
        return x

    def init_state(self, batch_size: int, max_length: int | None = None, *, dtype: Any = None) -> tuple[Any, ...]:
        """Decode states of all blocks."""
        return tuple(block.init_state(batch_size, max_length, dtype=dtype) for block in self.blocks)

    def prefill(
        self,
        x: jax.Array,
        state: tuple[Any, ...],
        *,
        mask: jax.Array | View | None = None,
        positions: jax.Array | None = None,
        edits: Sequence[Edits | None] | None = None,
    ) -> tuple[jax.Array, tuple[Any, ...]]:
        """Decodes a run of tokens `(B, N, C)`."""
        new: list[Any] = []
        given = {"mask": mask, "positions": positions}
        for block, old, edit in zip(self.blocks, state, self._each(edits), strict=True):
            if edit is not None:
                edit.order = order_after(old, x.shape[1], given["mask"])
            x, after = block.prefill(x, old, **given, edits=edit)
            x, given = hand_over(block, edit, x, given)
            new.append(after)
        return x, tuple(new)

    def step(
        self,
        x_t: jax.Array,
        state: tuple[Any, ...],
        *,
        positions: jax.Array | None = None,
        edits: Sequence[Edits | None] | None = None,
    ) -> tuple[jax.Array, tuple[Any, ...]]:
        """Decodes one token `(B, C)`."""
        new = []
        for block, old, edit in zip(self.blocks, state, self._each(edits), strict=True):
            if edit is not None:
                edit.order = order_after(old, 1)
            x_t, after = block.step(x_t, old, positions=positions, edits=edit)
            at = None if positions is None else integers("positions", positions)[:, None]
            x_t = hand_over(block, edit, x_t[:, None], {"positions": at})[0][:, 0]
            new.append(after)
        return x_t, tuple(new)

    def _each(self, edits: Sequence[Edits | None] | None) -> Sequence[Edits | None]:
        return (None,) * len(self.blocks) if edits is None else edits
