"""Pallas for TPU: one sweep over the tokens forward and one backward, the state held on chip.

The derivation stands in `kernels`, the sizes in `plan`. Here: what is refused, and the
layouts. `derivative` has the rest.
"""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch, partition
from pallas_kernels.selective_scan import derivative
from pallas_kernels.selective_scan.arguments import Arguments
from pallas_kernels.selective_scan.tpu.kernels import call
from pallas_kernels.selective_scan.tpu.plan import LARGEST, Config, Plan, plan_for
from pallas_kernels.tpu.chips import LANES, MIB, chip_of

DTYPES = ("bfloat16", "float32")


def supports(args: Arguments) -> str | None:
    """Why the kernels cannot take `args`; None when they can."""
    if args.x.dtype.name not in DTYPES:
        return f"it takes {' and '.join(DTYPES)}, got {args.x.dtype.name}"
    if args.a.shape[1] > LARGEST:
        return f"S may be at most {LARGEST}, got {args.a.shape[1]}"
    if args.chunk_size is not None:
        return f"it has no chunks, so chunk_size must be None, got {args.chunk_size}"
    config = _config(args)
    if _plan(config, args.x, args.b) is None:
        return f"no block fits {config.chip.vmem_limit // MIB} MiB of on-chip memory"
    return partition.refusal()


def run(args: Arguments) -> tuple[jax.Array, jax.Array | None]:
    """y (B, N, C) and, if asked for, the state."""
    return derivative.run(derivative.Kernels(_run_forward, _run_backward, _config(args)), args)


def _config(args: Arguments) -> Config:
    return Config(
        chip=chip_of(dispatch.current_device_kind()),
        initial=args.initial_state is not None,
        final=args.return_state,
        gated=args.gate is not None,
        skipped=args.skip is not None,
        biased=args.delta_bias is not None,
        softplus=args.softplus,
        packed=args.starts is not None,
    )


def _run_forward(config: Config, keep: bool, *arrays):
    """y (B, N, C); the last state (B, C, S); the states before the blocks (B, blocks, S, C)."""
    *rest, initial = arrays
    lanes, operands = _operands(config, *rest)
    if initial is not None:
        operands["initial"] = lanes.states(initial)
    results = call(lanes.plan, "keep" if keep else "forward", operands)
    final, kept = results.get("final"), results.get("kept")
    return (
        lanes.undo(results["y"]),
        None if final is None else lanes.undo_states(final),
        None if kept is None else lanes.undo(kept)[:, :, : lanes.size],
    )


def _run_backward(config: Config, *arrays):
    """Gradients of x, delta, gate, a (B, C, S), b, c, skip (B, C), bias (B, C) and the initial state."""
    *rest, kept, dy, dfinal = arrays
    lanes, operands = _operands(config, *rest)
    operands["kept"] = lanes.states(jnp.swapaxes(kept, 2, 3))
    operands["dy"] = lanes(dy)
    if dfinal is not None:
        operands["dfinal"] = lanes.states(dfinal)
    results = call(lanes.plan, "backward", operands)
    tokens = (lanes.undo(results[name]) if name in results else None for name in ("dx", "ddelta", "dgate"))
    shared = (lanes.undo_tokens(results[name], rest[4].dtype) for name in ("db", "dc"))
    sums = (lanes.undo(results[name])[:, 0] if name in results else None for name in ("dskip", "dbias"))
    dinitial = lanes.undo_states(results["dinitial"]) if config.initial else None
    return *tokens, lanes.undo_states(results["da"]), *shared, *sums, dinitial


# ---- layouts


class _Lanes:
    """Between the arrays of a call and those of a kernel: channels of each group filled up to whole tiles of lanes."""

    def __init__(self, plan: Plan, channels: int, groups: int, size: int):
        self.plan, self.channels, self.groups, self.size = plan, channels, groups, size

    def __call__(self, x: jax.Array) -> jax.Array:
        """(…, C) to (…, C'): itself where groups are whole tiles."""
        share = self.channels // self.groups
        if share == self.plan.repeats:
            return x
        x = x.reshape(*x.shape[:-1], self.groups, share)
        x = jnp.pad(x, (*((0, 0),) * (x.ndim - 1), (0, self.plan.repeats - share)))
        return x.reshape(*x.shape[:-2], -1)

    def undo(self, x: jax.Array) -> jax.Array:
        """(…, C') to (…, C)."""
        share = self.channels // self.groups
        if share == self.plan.repeats:
            return x
        return x.reshape(*x.shape[:-1], self.groups, -1)[..., :share].reshape(*x.shape[:-1], self.channels)

    def states(self, x: jax.Array) -> jax.Array:
        """(…, C, S) to (…, S', C') in float32."""
        x = self(jnp.swapaxes(x, -1, -2).astype(jnp.float32))
        fill = self.plan.key_size - self.size
        return jnp.pad(x, (*((0, 0),) * (x.ndim - 2), (0, fill), (0, 0))) if fill else x

    def undo_states(self, x: jax.Array) -> jax.Array:
        """(B, S', C') to (B, C, S)."""
        return jnp.swapaxes(self.undo(x)[:, : self.size], 1, 2)

    def tokens(self, x: jax.Array) -> jax.Array:
        """(B, N, G, S) to (B, G, N' / 128, S', 128) in float32."""
        plan, (batch, n, groups, size) = self.plan, x.shape
        x = jnp.transpose(x.astype(jnp.float32), (0, 2, 3, 1))
        x = jnp.pad(x, ((0, 0), (0, 0), (0, plan.key_size - size), (0, self._length - n)))
        return jnp.swapaxes(x.reshape(batch, groups, plan.key_size, -1, LANES), 2, 3)

    def undo_tokens(self, x: jax.Array, dtype: Any) -> jax.Array:
        """(B, blocks of lanes, N' / 128, S', 128), summed over the blocks of a group, to (B, N, G, S)."""
        x = jnp.sum(x.reshape(x.shape[0], self.groups, -1, *x.shape[2:]), axis=2)
        x = jnp.swapaxes(x, 2, 3).reshape(x.shape[0], self.groups, self.plan.key_size, -1)
        return jnp.transpose(x[:, :, : self.size, : self.plan.length], (0, 3, 1, 2)).astype(dtype)

    def rows(self, x: jax.Array) -> jax.Array:
        """(B, N) to (B, N' / 128, 1, 128), ones behind the last token: there the state stays."""
        x = jnp.pad(x, ((0, 0), (0, self._length - x.shape[1])), constant_values=1)
        return x.reshape(x.shape[0], -1, 1, LANES)

    @property
    def _length(self) -> int:
        """N', tokens in whole tiles."""
        return self.plan.blocks * self.plan.tiles * LANES


def _plan(config: Config, x: jax.Array, b: jax.Array) -> Plan | None:
    return plan_for(config, *x.shape, *b.shape[2:], x.dtype)


def _operands(config: Config, x, delta, gate, a, b, c, skip, bias, keep) -> tuple[_Lanes, dict[str, jax.Array]]:
    """Operands of a kernel: what is per token and channel in place, if groups are whole tiles."""
    plan = _plan(config, x, b)
    lanes = _Lanes(plan, x.shape[2], *b.shape[2:])
    arrays = {"x": lanes(x), "delta": lanes(delta), "a": lanes.states(a), "b": lanes.tokens(b), "c": lanes.tokens(c)}
    if gate is not None:
        arrays["gate"] = lanes(gate)
    for name, each in (("skip", skip), ("bias", bias)):
        if each is not None:
            arrays[name] = lanes(each)[None]
    if keep is not None:
        arrays["keep"] = lanes.rows(keep)
    return lanes, arrays
