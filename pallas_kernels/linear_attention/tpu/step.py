"""Decoding steps of linear attention in Pallas for TPU: a few tokens in one pass over a state that changes in place.

A step is bound by the state, D·E float32 numbers per head against some 2D + 2E of a token. The kernel reads each once
and writes it once, where it stood (`input_output_aliases`): give the state away with `jax.jit(step, donate_argnums=…)`,
or XLA copies it first. Between, the tokens t = 1 … T update it on chip, in float32 on the vector units:

    S ← exp(g_t) S + k_t v_tᵀ,    y_t = q_t S        normalised:  z ← exp(g_t) z + k_t,   y_t = q_t S / (q_t · z)

One grid point holds a block of heads of a batch element. XLA lays out an array with its last two axes exchanged where
that needs fewer tiles of 8 x 128, and the kernel then holds Sᵀ, or the state would be transposed around it; sizes that
8 does not divide are copied all the same. The gradient is that of `xla_step`, from the same inputs.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import partition
from pallas_kernels.linear_attention import xla_step
from pallas_kernels.recurrence import EPSILON, Arguments, NormalizedState, State

MAX_TOKENS = 32  # beyond, arithmetic on the vector units outweighs the state's bytes: that is a prefill
SUBLANES, LANES = 8, 128
VMEM_LIMIT = 48 * 2**20  # of 64 MiB on TPU7x and 128 MiB on v5e, v5p and v6e


@dataclasses.dataclass(frozen=True)
class _Config:
    """What is static: which of the optional operands there are."""

    decay: bool
    normalize: bool


def supports(args: Arguments) -> str | None:
    """Why this implementation cannot take `args`; None when it can."""
    _, tokens, heads, d = args.q.shape
    e = args.v.shape[-1]
    if args.q.dtype.name == "float64":
        return "q_t, k_t and v_t must be bfloat16, float16 or float32: the TPU has no float64"
    if tokens > MAX_TOKENS:
        return f"it takes at most {MAX_TOKENS} tokens at once, got {tokens}: linear_attention is for more"
    needed = vmem_bytes(tokens, block_heads(heads), d, e, args.q.dtype)
    if needed > VMEM_LIMIT:
        return f"{block_heads(heads)} states of {d} x {e} need {needed} bytes on chip, more than {VMEM_LIMIT}"
    return partition.refusal()


def block_heads(heads: int) -> int:
    """Heads per grid point: 8, or all of them where 8 does not divide them, as a block must be whole in its tiles."""
    return SUBLANES if heads % SUBLANES == 0 else heads


def held_transposed(d: int, e: int) -> bool:
    """Whether XLA lays out states (B, H, D, E) as (B, H, E, D)."""
    return _padded(e, d) < _padded(d, e)


def vmem_bytes(tokens: int, heads: int, d: int, e: int, dtype: jnp.dtype) -> int:
    """On-chip memory of one grid point: two buffers of each block, and the products that stand between.

    Args:
      tokens: T.
      heads: heads of a block.
      d: D.
      e: E.
      dtype: of the tokens.
    """
    state = 4 * heads * (_padded(e, d) if held_transposed(d, e) else _padded(d, e))
    itemsize = max(jnp.dtype(dtype).itemsize, 4)
    token = itemsize * (4 * _padded(heads, d) + 2 * _padded(heads, e))
    columns = 3 * 4 * heads * _padded(max(d, e), 1)
    return 2 * (2 * state + tokens * token + 2 * 4 * _padded(heads, d)) + 3 * state + columns


def _padded(rows: int, columns: int) -> int:
    """Numbers in the tiles of a matrix."""
    return pl.cdiv(rows, SUBLANES) * SUBLANES * pl.cdiv(columns, LANES) * LANES


def bytes_moved(args: Arguments) -> int:
    """Bytes between device memory and chip of one call: the state twice, the tokens once."""
    batch, tokens, heads, d = args.q.shape
    e = args.v.shape[-1]
    state = 2 * 4 * batch * heads * d * (e + args.normalize)
    each = args.q.dtype.itemsize * (2 * d + 2 * e) + (4 * d if args.log_decay is not None else 0)
    return state + batch * tokens * heads * each


def run(args: Arguments) -> tuple[jax.Array, State]:
    """y (B, T, H, E) and the state after the last token."""
    config = _Config(args.log_decay is not None, args.normalize)
    state = tuple(args.initial_state) if args.normalize else (args.initial_state,)
    arrays = args.q, args.k, args.v, args.log_decay, args.scale, state
    y, state = _step(config, *partition.same_manual_axes(arrays))
    return y, NormalizedState(*state) if args.normalize else state[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _step(config: _Config, q, k, v, decay, scale, state):
    group, dtype = q.shape[2] // k.shape[2], q.dtype
    if dtype == jnp.float16:  # which the TPU lacks
        q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    out_dtype = v.dtype
    if scale is not None:
        q = q.astype(jnp.float32) * scale
    k, v = (jnp.repeat(x, group, axis=2) for x in (k, v))  # small beside the state, which is of query heads
    decay_axes = "BTHD"
    if decay is not None:
        weight = jnp.exp(decay.astype(jnp.float32))
        if weight.ndim == 1:
            weight, decay_axes = weight[None, None], "boHD"
        weight = weight if weight.ndim == 4 else weight[..., None]
        decay = jnp.broadcast_to(weight, (*weight.shape[:3], q.shape[-1]))
    states = ("BHDE", "BHD")[: len(state)]
    call = partition.batched_and_partitioned(
        functools.partial(_forward, config, out_dtype), ("BTHD", "BTHD", "BTHE", decay_axes, *states), ("BTHE", *states)
    )
    y, *state = call(q, k, v, decay, *state)
    return y.astype(dtype), tuple(state)


def _step_backward(config: _Config, residuals, cotangents):
    def step(q, k, v, decay, scale, state):
        args = Arguments(
            q, k, v, log_decay=decay, scale=scale, normalize=config.normalize, return_state=True,
            initial_state=NormalizedState(*state) if config.normalize else state[0],
        )  # fmt: skip
        y, state = xla_step.run(args)
        return y, tuple(state) if config.normalize else (state,)

    return jax.vjp(step, *residuals)[1](cotangents)


_step.defvjp(lambda config, *arrays: (_step(config, *arrays), arrays), _step_backward)


def _forward(config: _Config, out_dtype, q, k, v, decay, *state):
    """The kernel on whole arrays.

    Args:
      config: static.
      out_dtype: dtype of y.
      q: scaled queries (B, T, H, D).
      k: (B, T, H, D).
      v: (B, T, H, E).
      decay: None, or factors (B, T, H, D) or (1, 1, H, D), float32.
      *state: (B, H, D, E) and, when normalising, (B, H, D), float32.

    Returns:
      y (B, T, H, E) and the new state.
    """
    (batch, tokens, heads, d), e = q.shape, v.shape[-1]
    block = block_heads(heads)

    def of_tokens(x):
        own = x.shape[:2] == (batch, tokens)
        return pl.BlockSpec((1, x.shape[1], block, x.shape[3]), lambda b, h: (b if own else 0, 0, h, 0))

    def of_state(x):
        return pl.BlockSpec((1, block, *x.shape[2:]), lambda b, h: (b, h, *(0,) * (x.ndim - 2)))

    transposed = held_transposed(d, e)
    if transposed:
        state = (state[0].mT, *state[1:])
    inputs = [q, k, v, *([decay] if config.decay else [])]
    count = batch * tokens * heads * d * e
    y, *state = pl.pallas_call(
        functools.partial(_kernel, config, transposed),
        grid=(batch, heads // block),
        in_specs=[*map(of_tokens, inputs), *map(of_state, state)],
        out_specs=[of_tokens(v), *map(of_state, state)],
        out_shape=[
            partition.struct(v.shape, out_dtype, *inputs, *state),
            *(partition.struct(x.shape, x.dtype, *inputs, *state) for x in state),
        ],
        input_output_aliases={len(inputs) + i: 1 + i for i in range(len(state))},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"),
            vmem_limit_bytes=max(16 * 2**20, vmem_bytes(tokens, block, d, e, q.dtype)),
        ),
        cost_estimate=pl.CostEstimate(
            flops=(5 if config.decay else 4) * count,
            transcendentals=0,
            bytes_accessed=sum(x.nbytes for x in (*inputs, *state, *state)) + v.size * out_dtype.itemsize,
        ),
        name="linear_attention_step",
    )(*inputs, *state)
    return (y, state[0].mT, *state[1:]) if transposed else (y, *state)


def _kernel(config: _Config, transposed: bool, *refs):
    """One block of heads of one batch element: (1, T, h, size) of tokens, (1, h, D, E) or (1, h, E, D) of the state."""
    refs = list(refs)
    q, k, v = (refs.pop(0) for _ in range(3))
    decay = refs.pop(0) if config.decay else None
    count = 2 if config.normalize else 1
    state_in, y, state_out = refs[:count], refs[count], refs[count + 1 :]

    def along_d(x):  # (h, D) against a state
        return x[:, None, :] if transposed else x[:, :, None]

    def token(state, t):
        q_t, k_t, v_t = (x[0, t].astype(jnp.float32) for x in (q, k, v))
        kv = state[0][0]
        if decay is not None:
            factor = decay[0, t if decay.shape[1] > 1 else 0]
            kv = kv * along_d(factor)
        kv = kv + along_d(k_t) * (v_t[:, :, None] if transposed else v_t[:, None, :])
        state_out[0][0] = kv
        y_t = jnp.sum(along_d(q_t) * kv, axis=2 if transposed else 1)
        if config.normalize:
            total = state[1][0]
            total = (total if decay is None else total * factor) + k_t
            state_out[1][0] = total
            below = jnp.sum(q_t * total, axis=-1, keepdims=True)
            empty = below == 0
            safe = jnp.where(empty, 1.0, below + jnp.where(below < 0, -EPSILON, EPSILON))
            y_t = jnp.where(empty, 0.0, y_t / safe)
        y[0, t] = y_t.astype(y.dtype)

    token(state_in, 0)
    pl.loop(1, q.shape[1])(functools.partial(token, state_out))
