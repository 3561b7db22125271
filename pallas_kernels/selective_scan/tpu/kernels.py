"""Bodies of the TPU kernels of the selective scan, and the call that runs one.

A body gets a `Plan` and `Refs`: the blocks that a grid point holds, by the names in `plan.KINDS`. A state (S, lanes)
goes from token to token in registers, `ROWS` tokens a turn; what is per token and channel is worked on for all of them
at once, and what b and c say is spread from a lane over all lanes.

    h_t = α_t h_{t-1} + (δ x)_t b_t        α_t = exp(δ_t a), 0 where a segment starts
    p_t = Σ_s c_t h_t + skip x_t           y_t = p_t silu(z_t)

Backward, the states of a block are first rebuilt on chip from the one kept before it. Then from the last token to the
first, with λ = dL/dh of what comes later at hand, carried as α λ:

    dp = dy silu(z)                        dz = dy p silu'(z)
    λ ← λ + dp c                           dc = Σ_lanes dp h       db = Σ_lanes λ δ x
    w = Σ_s λ b                            dx = w δ + skip dp      dskip = Σ_t dp x
    e = λ α h_{t-1}                        da = Σ_t e δ            dδ = w x + Σ_s e a
    λ ← α λ                                draw = dδ σ(raw),  of which dbias is the sum

Every term of a rate's gradient carries its decay: none is a difference of sums without it.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.selective_scan.arguments import decays, sigmoid, softplus
from pallas_kernels.selective_scan.tpu.plan import OPTIONAL, ROWS, Plan
from pallas_kernels.tpu.calls import WIDE, Refs, run_plan
from pallas_kernels.tpu.chips import LANES


def call(plan: Plan, kind: str, arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Runs a kernel; see `run_plan`."""
    body = _backward if kind == "backward" else _forward
    return run_plan("selective_scan", body, OPTIONAL, plan, kind, arrays)


class _Turn:
    """`ROWS` tokens of a block, from the one numbered `start`: arrays (ROWS, lanes), zeros where there is no token."""

    def __init__(self, plan: Plan, refs: Refs, n: jax.Array, turn: jax.Array):
        self.start = pl.multiple_of(turn * ROWS, ROWS)
        self.rows = pl.ds(self.start, ROWS)
        self.tile, self.lane = self.start >> LANES.bit_length() - 1, self.start & (LANES - 1)
        self._valid = None
        if plan.tail:  # what stands beyond the last token may be anything
            place = lax.broadcasted_iota(jnp.int32, (ROWS, 1), 0)
            self._valid = place < plan.length - (n * plan.tokens + self.start)
        self.x = self.load(refs.x)
        raw = self.load(refs.delta)
        self.raw = raw if refs.bias is None else raw + refs.bias[...]
        delta = softplus(self.raw) if plan.config.softplus else self.raw
        self.delta = self.existing(delta)
        self.b, self.c = self._turned(refs.b), self._turned(refs.c)
        self.keep = None if refs.keep is None else self._turned(refs.keep)
        self.writes = self.delta * self.x

    def load(self, ref) -> jax.Array:
        """Rows of a block in float32."""
        return self.existing(ref[self.rows, :].astype(WIDE))

    def existing(self, x: jax.Array) -> jax.Array:
        """Zeros beyond the last token."""
        return x if self._valid is None else jnp.where(self._valid, x, 0)

    def _turned(self, ref) -> jax.Array:
        """The tile (r, 128) of these tokens, turned such that the first of them is in the first lane."""
        return pltpu.roll(ref[self.tile], (LANES - self.lane) & (LANES - 1), axis=1)

    def decay(self, row: int, a: jax.Array) -> tuple[jax.Array, jax.Array]:
        """δ a (S, lanes) of a token, and its decay."""
        exponent = self.delta[row : row + 1] * a
        decay = decays(exponent)
        return exponent, decay if self.keep is None else decay * self.keep[:, row : row + 1]

    def advance(self, row: int, a: jax.Array, state: jax.Array) -> jax.Array:
        """The state after a token."""
        _, decay = self.decay(row, a)
        return decay * state + self.writes[row : row + 1] * self.b[:, row : row + 1]


def _forward(plan: Plan, refs: Refs) -> None:
    n = pl.program_id(2)

    @pl.when(n == 0)
    def _():
        refs.state[...] = jnp.zeros_like(refs.state) if refs.initial is None else refs.initial[...]

    if refs.kept is not None:
        refs.kept[...] = refs.state[...]
    a = refs.a[...]

    def turn(number, state):
        t, outputs = _Turn(plan, refs, n, number), []
        for row in range(ROWS):
            state = t.advance(row, a, state)
            outputs.append(jnp.sum(t.c[:, row : row + 1] * state, axis=0, keepdims=True))
        y = jnp.concatenate(outputs, axis=0)
        y = y if refs.skip is None else y + refs.skip[...] * t.x
        if refs.gate is not None:
            gate = t.load(refs.gate)
            y = y * gate * sigmoid(gate)
        refs.y[t.rows, :] = y.astype(refs.y.dtype)
        return state

    refs.state[...] = lax.fori_loop(0, plan.tokens // ROWS, turn, refs.state[...])
    if refs.final is not None:

        @pl.when(n == plan.blocks - 1)
        def _():
            refs.final[...] = refs.state[...]


def _backward(plan: Plan, refs: Refs) -> None:
    n, turns = plan.blocks - 1 - pl.program_id(2), plan.tokens // ROWS
    sums = [ref for ref in (refs.da, refs.dskip, refs.dbias) if ref is not None]

    @pl.when(n == plan.blocks - 1)
    def _():
        refs.state[...] = jnp.zeros_like(refs.state) if refs.dfinal is None else refs.dfinal[...]
        for ref in sums:
            ref[...] = jnp.zeros_like(ref)

    a = refs.a[...]
    refs.states[0] = refs.kept[...]

    def rebuild(number, state):
        t = _Turn(plan, refs, n, number)
        for row in range(ROWS):
            state = t.advance(row, a, state)
            refs.states[t.start + row + 1] = state
        return state

    lax.fori_loop(0, turns, rebuild, refs.kept[...])

    def backward(step, carry):
        return _backward_turn(plan, refs, _Turn(plan, refs, n, turns - 1 - step), a, *carry)

    adjoint, da = lax.fori_loop(0, turns, backward, (refs.state[...], jnp.zeros_like(a)))
    refs.state[...] = adjoint
    refs.da[...] += da
    if refs.dinitial is not None:

        @pl.when(n == 0)
        def _():
            refs.dinitial[...] = adjoint


def _backward_turn(plan: Plan, refs: Refs, t: _Turn, a: jax.Array, adjoint: jax.Array, da: jax.Array):
    """Writes the gradients of a turn; λ before it and da with it, from those after it."""
    dmixed = t.load(refs.dy)
    gate = gated = None
    if refs.gate is not None:
        gate = t.load(refs.gate)
        gated, opened = dmixed, sigmoid(gate)
        dmixed = dmixed * gate * opened
    lane = lax.broadcasted_iota(jnp.int32, t.b.shape, 1)
    db, dc = jnp.zeros_like(t.b), jnp.zeros_like(t.c)
    mixed, dwrites, dexponents = ([None] * ROWS for _ in range(3))
    for row in reversed(range(ROWS)):
        one = slice(row, row + 1)
        before, after = refs.states[t.start + row], refs.states[t.start + row + 1]
        exponent, decay = t.decay(row, a)
        adjoint = adjoint + t.c[:, one] * dmixed[one]
        dc = jnp.where(lane == row, jnp.sum(after * dmixed[one], axis=1, keepdims=True), dc)
        db = jnp.where(lane == row, jnp.sum(adjoint * t.writes[one], axis=1, keepdims=True), db)
        if gate is not None:
            mixed[row] = jnp.sum(t.c[:, one] * after, axis=0, keepdims=True)
        dwrites[row] = jnp.sum(adjoint * t.b[:, one], axis=0, keepdims=True)
        adjoint = adjoint * decay
        dexponent = jnp.where(exponent > 0, 0, adjoint * before)
        da = da + dexponent * t.delta[one]
        dexponents[row] = jnp.sum(dexponent * a, axis=0, keepdims=True)
    dwrite = jnp.concatenate(dwrites, axis=0)
    dx, ddelta = dwrite * t.delta, dwrite * t.x + jnp.concatenate(dexponents, axis=0)
    if refs.skip is not None:
        dx = dx + refs.skip[...] * dmixed
        refs.dskip[...] += jnp.sum(dmixed * t.x, axis=0, keepdims=True)
    ddelta = t.existing(ddelta * sigmoid(t.raw) if plan.config.softplus else ddelta)
    if refs.bias is not None:
        refs.dbias[...] += jnp.sum(ddelta, axis=0, keepdims=True)
    refs.dx[t.rows, :] = dx.astype(refs.dx.dtype)
    refs.ddelta[t.rows, :] = ddelta.astype(refs.ddelta.dtype)
    if gate is not None:
        p = jnp.concatenate(mixed, axis=0)
        p = p if refs.skip is None else p + refs.skip[...] * t.x
        dgate = gated * p * opened * (1 + gate * (1 - opened))
        refs.dgate[t.rows, :] = dgate.astype(refs.dgate.dtype)
    inside = (lane >= t.lane) & (lane < t.lane + ROWS)
    for ref, part in ((refs.db, db), (refs.dc, dc)):
        ref[t.tile] = jnp.where(inside, pltpu.roll(part, t.lane, axis=1), ref[t.tile])
    return adjoint, da
