"""Calls of the Mosaic GPU kernels: what the sweeps of one call of linear attention share."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.linear_attention.mosaic_gpu import sweep
from pallas_kernels.linear_attention.mosaic_gpu.decay import FLOOR, LOG2_E
from pallas_kernels.linear_attention.mosaic_gpu.plan import Plan, with_blocks
from pallas_kernels.linear_attention.mosaic_gpu.sweep import ROWS
from pallas_kernels.linear_attention.mosaic_gpu.tiles import TILE

PROCESSORS = 132  # multiprocessors of most GPUs of the generation


@dataclasses.dataclass(frozen=True)
class Config:
    """What is static in a call.

    Attributes:
      return_state: whether the last state is asked for.
      decay_gradient: whether the backward pass computes the gradient of the decay.
      scale_gradient: likewise for the scale.
      splits: parts into which the sequence is cut.
      processors: multiprocessors of the GPU.
      interpret: parameters of Pallas' interpreter, None on a GPU.
    """

    return_state: bool = False
    decay_gradient: bool = False
    scale_gradient: bool = False
    splits: int = 1
    processors: int = PROCESSORS
    interpret: Any = None


def filled(plans: Sequence[Plan], batch: int, heads: int, processors: int) -> list[Plan]:
    """The plans of a launch, with blocks that fill the multiprocessors."""
    chosen = [with_blocks(plan) for plan in plans]
    # With fewer CTAs, one head each for more multiprocessors is better than two for some.
    if heads % 2 == 0 and batch * heads * sum(plan.groups for plan in chosen) > processors:
        return [with_blocks(plan, pairs=True) for plan in plans]
    return chosen


@dataclasses.dataclass(frozen=True)
class Common:
    """What the sweeps of one call share.

    Attributes:
      config: what is static.
      heads: H.
      decay: (H,), (B, N, H) or None.
      scale: scalar or None.
      length: N.
    """

    config: Config
    heads: int
    decay: jax.Array | None
    scale: jax.Array | None
    length: int

    @property
    def chunks(self) -> int:
        """Chunks of a split."""
        return -(-self.length // self.config.splits // TILE)

    @property
    def kind(self) -> str | None:
        """Kind of the decay, as in `Plan`."""
        return None if self.decay is None else "head" if self.decay.ndim == 1 else "token"

    @functools.cached_property
    def cumulated(self) -> jax.Array | None:
        """Base-2 log decays from the start of each chunk, (B·S, H, chunks·64), of a decay per token."""
        if self.kind != "token":
            return None
        g = jnp.swapaxes(self.fold(jnp.maximum(self.decay, FLOOR)), 1, 2)
        g = jnp.pad(g, ((0, 0), (0, 0), (0, -g.shape[2] % TILE)))
        total = jnp.cumsum(g.reshape(*g.shape[:2], -1, TILE), axis=-1)
        return total.reshape(g.shape) * LOG2_E

    def fold(self, x: jax.Array) -> jax.Array:
        """Splits of the sequence join the batch: (B, N, ...) to (B·S, N / S, ...)."""
        splits = self.config.splits
        return x if splits == 1 else x.reshape(x.shape[0] * splits, x.shape[1] // splits, *x.shape[2:])

    def of_batch(self, x: jax.Array) -> jax.Array:
        """(B·S, H, ...) summed over splits."""
        return x if self.config.splits == 1 else jnp.sum(x.reshape(-1, self.config.splits, *x.shape[1:]), axis=1)

    def launch(
        self, arrays: dict[str, jax.Array], initial: dict[str, jax.Array | None], *plans: Plan
    ) -> dict[str, jax.Array]:
        """The sweep of folded arrays; with splits, states have an axis S after B.

        Args:
          arrays: token arrays by name.
          initial: states before the first chunk visited, by the names of outputs; None for zeros.
          *plans: the sweeps, without what all of this call have in common, and without blocks.
        """
        states = {name: x for name, x in initial.items() if x is not None}
        plans = [
            dataclasses.replace(
                plan,
                decay=self.kind,
                scaled=self.scale is not None and (plan.outputs or plan.reverse),
                initial=any(job.out in states for job in plan.jobs),
                interpret=self.config.interpret,
            )
            for plan in plans
        ]
        missing = -self.length % ROWS
        given = {name: self.fold(arrays[name]) for plan in plans for name in plan.arrays}
        if missing:
            given = {name: jnp.pad(x, ((0, 0), (0, missing), (0, 0), (0, 0))) for name, x in given.items()}
        batch = next(iter(given.values())).shape[0]
        if self.decay is not None:
            given["decay"] = self.decay.astype(jnp.float32) if self.kind == "head" else self.cumulated
        if self.scale is not None:
            given["scale"] = self.scale.astype(jnp.float32).reshape(1)
        splits = self.config.splits
        for name, x in states.items():
            given[f"initial {name}"] = x if splits == 1 else x.reshape(-1, *x.shape[2:])
        chosen = filled(plans, batch, self.heads, self.config.processors)
        outputs = sweep.sweep(chosen, self.length // splits, self.heads, given)
        if splits > 1:
            for name, x in outputs.items():
                if name.startswith(("final", "kept")):
                    outputs[name] = x.reshape(-1, splits, *x.shape[1:])
                elif not name.startswith("sums"):
                    outputs[name] = x.reshape(-1, self.length, *x.shape[2:])
        return outputs

    def states_before(self, own: jax.Array, first: jax.Array | None, reverse: bool = False) -> jax.Array:
        """States before each split, (B, S, H, D, E), from those of their own tokens and the one before all."""
        splits = self.config.splits
        if self.kind is None:
            kept = jnp.ones((1, splits, self.heads), jnp.float32)
        elif self.kind == "head":
            kept = jnp.exp(jnp.maximum(self.decay, FLOOR) * (self.length // splits))[None, None]
            kept = jnp.broadcast_to(kept, (1, splits, self.heads))
        else:
            kept = jnp.exp(jnp.sum(self.fold(jnp.maximum(self.decay, FLOOR)), axis=1)).reshape(-1, splits, self.heads)
        state = jnp.zeros_like(own[:, 0]) if first is None else first
        before = []
        for split in reversed(range(splits)) if reverse else range(splits):
            before.append(state)
            state = kept[:, split, :, None, None] * state + own[:, split]
        return jnp.stack(before[::-1] if reverse else before, axis=1)
