"""Calls of the Triton kernels of linear attention: sizes and constants of each, and what it gives back."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import partition
from pallas_kernels.gpus import Gpu
from pallas_kernels.linear_attention.triton import kernels
from pallas_kernels.linear_attention.triton.plan import (
    LEAST_ABLE,
    Blocks,
    Config,
    padded,
    sweep_blocks,
    wide,
)
from pallas_kernels.triton_launch import launch as _launch


@dataclasses.dataclass(frozen=True)
class Common:
    """What the calls of one pass share.

    Attributes:
      config: what is static in the op.
      blocks: of the kernel.
      heads: H.
      block: tokens between kept states.
      split: tokens of a split.
      decay: (H,), (B, N, H) or None.
      scale: scalar or None.
    """

    config: Config
    blocks: Blocks
    heads: int
    block: int
    split: int
    decay: jax.Array | None
    scale: jax.Array | None

    @property
    def decay_kind(self) -> int:
        """0 for no decay, 1 for one per head, 2 for one per token."""
        return 0 if self.decay is None else 1 if self.decay.ndim == 1 else 2

    def statics(self, dtype: jnp.dtype) -> dict[str, Any]:
        """Constants of every kernel: chunk, and precision of products."""
        return {"CHUNK": self.blocks.chunk, **_precision(dtype)}

    def decay_statics(self, dtype: jnp.dtype) -> dict[str, Any]:
        """Constants of the weights; the step is that of xla.py, for float32."""
        two_parts = self.decay_kind == 2 and wide(dtype)
        step = 2.0 ** (math.ceil(math.log2(self.blocks.chunk * -kernels.LEAST)) - 24) if two_parts else 0.0
        return {"DECAY": self.decay_kind, "STEP": step}


def run_sweep(
    common: Common,
    a: jax.Array | None,
    b: jax.Array,
    c: jax.Array,
    first: jax.Array | None,
    first_sums: jax.Array | None,
    *,
    keep: bool = False,
    last: bool = False,
    inverse: jax.Array | None = None,
    dden: jax.Array | None = None,
    reverse: bool = False,
    dtype: jnp.dtype | None = None,
) -> tuple[jax.Array | None, ...]:
    """The kernel `sweep`: y, den, kept, kept_z, last, last_z, None for those not asked for; no y without `a`."""
    batch, tokens, _, inner = b.shape
    heads, outer, blocks, norm = common.heads, c.shape[3], common.blocks, common.config.normalize
    tiles, splits, kept = (
        math.ceil(x / y) for x, y in ((outer, blocks.tile), (tokens, common.split), (tokens, common.block))
    )
    f32 = jnp.float32
    outputs = [
        None if a is None else _Out((batch, tokens, heads, outer), dtype or b.dtype),
        _Out((batch, tokens, heads), f32) if keep and norm else None,
        _Out((batch, heads, kept, inner, outer), _operand(b.dtype)) if keep else None,
        _Out((batch, heads, kept, inner), f32) if keep and norm else None,
        _Out((batch, heads, splits, inner, outer), f32) if last else None,
        _Out((batch, heads, splits, inner), f32) if last and norm else None,
    ]
    return _call(
        kernels.sweep,
        [a, b, c, common.decay, common.scale, inverse, dden, first, first_sums if norm else None],
        tokens,
        outputs,
        gpu=common.config.gpu,
        grid=batch * heads * splits * tiles,
        blocks=blocks,
        HEADS=heads,
        A_HEADS=(b if a is None else a).shape[2],
        B_HEADS=b.shape[2],
        C_HEADS=c.shape[2],
        IN=inner,
        OUT=outer,
        BLOCK_IN=padded(inner),
        TILE=blocks.tile,
        SPLIT=common.split // blocks.chunk,
        EVERY=common.block // blocks.chunk,
        REVERSE=reverse,
        SCALE=common.scale is not None,
        NORMALIZE=norm,
        FIRST=first is not None,
        OUTPUT=a is not None,
        KEEP=keep,
        LAST=last,
        **common.decay_statics(b.dtype),
        **common.statics(b.dtype),
    )


def run_backward(common: Common, q, k, v, dy, inverse, dden, kept, kept_sums, after, after_sums):
    """The kernel `backward`: dq, dk, dv (None for a sweep of its own), ddecay, dscale, dstate, dsums."""
    (batch, tokens, heads, key), groups, value = q.shape, k.shape[2], v.shape[3]
    blocks, norm, kind = common.blocks, common.config.normalize, common.decay_kind
    chunks, tiles = math.ceil(tokens / blocks.chunk), math.ceil(key / blocks.tile)
    splits, span = math.ceil(tokens / common.split), common.block // blocks.chunk
    programs = batch * heads * splits * tiles
    f32 = jnp.float32
    whole = tiles == 1 and padded(value) <= 128  # a wider dv does not fit into registers beside the rest
    dtype = q.dtype if groups == heads else f32
    gradient = common.config.decay_gradient and kind > 0
    shape = (tiles, batch, heads, chunks) if kind == 1 else (tiles, batch, tokens, heads)
    outputs = [
        _Out(q.shape, q.dtype),
        _Out(q.shape, dtype),
        _Out((*q.shape[:3], value), dtype) if whole else None,
        _Out(shape, f32) if gradient else None,
        _Out((programs,), f32) if common.scale is not None else None,
        _Out((batch, heads, splits, key, value), f32),
        _Out((batch, heads, splits, key), f32) if norm else None,
        _Out((programs, span, blocks.tile, padded(value)), _operand(q.dtype)),
        _Out((programs, span, blocks.tile), f32) if norm else None,
    ]
    dq, dk, dv, ddecay, dscale, dstate, dsums, *_ = _call(
        kernels.backward,
        [q, k, v, dy, common.decay, common.scale, inverse, dden, kept, kept_sums, after, after_sums if norm else None],
        tokens,
        outputs,
        gpu=common.config.gpu,
        grid=programs,
        blocks=blocks,
        HEADS=heads,
        KV_HEADS=groups,
        D=key,
        E=value,
        TILE=blocks.tile,
        BLOCK_E=padded(value),
        SPLIT=common.split // blocks.chunk,
        EVERY=common.block // blocks.chunk,
        SCALE=common.scale is not None,
        NORMALIZE=norm,
        FIRST=after is not None,
        LAST=True,
        VALUES=whole,
        DECAY_GRADIENT=gradient,
        **common.decay_statics(q.dtype),
        **common.statics(q.dtype),
    )
    if ddecay is not None:
        ddecay = jnp.sum(ddecay, axis=(0, 3) if kind == 1 else 0)
    if dscale is not None:
        dscale = jnp.sum(dscale.reshape(batch, heads, -1), axis=2)
    return dq, dk, dv, ddecay, dscale, *(None if x is None else x[:, :, 0] for x in (dstate, dsums))


def run_read(
    common: Common,
    a: jax.Array,
    state: jax.Array,
    z: jax.Array | None,
    *,
    dtype: jnp.dtype,
    scale: jax.Array | None = None,
    divide: bool = False,
    weight: jax.Array | None = None,
    extra: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """The kernel `read`: y, and den when `divide`. A `z` that is not the divisor's is added to each row."""
    (batch, tokens, a_heads, inner), outer, heads = a.shape, state.shape[3], common.heads
    config = common.config
    blocks = config.sweep or sweep_blocks(config.gpu, a.dtype, inner, outer, config.chunk)
    chunks, tiles = math.ceil(tokens / blocks.chunk), math.ceil(outer / blocks.tile)
    return _call(
        kernels.read,
        [a, state, z, scale, weight, extra],
        tokens,
        [
            _Out((batch, tokens, heads, outer), dtype),
            _Out((batch, tokens, heads), jnp.float32) if divide else None,
        ],
        gpu=config.gpu,
        grid=batch * heads * chunks * tiles,
        blocks=blocks,
        HEADS=heads,
        A_HEADS=a_heads,
        STATE_HEADS=state.shape[1],
        IN=inner,
        OUT=outer,
        BLOCK_IN=padded(inner),
        TILE=blocks.tile,
        CHUNK=blocks.chunk,
        SCALE=scale is not None,
        DIVIDE=divide,
        WEIGHT=weight is not None,
        EXTRA=0 if z is None or divide else 1 if extra is None else 2,
        **_precision(a.dtype),
    )


def before_splits(
    common: Common,
    b: jax.Array,
    c: jax.Array,
    state: jax.Array | None,
    sums: jax.Array | None,
    *,
    reverse: bool = False,
    **cotangents: jax.Array | None,
) -> tuple[jax.Array | None, jax.Array | None]:
    """The state with which each split begins, (B, H, splits, D, E) and its sums, walking forward or in reverse.

    It is the sum over the splits before it of their own states and the initial one, each times the decay of the whole
    splits that lie between: the exponents are plain sums of log decays.
    """
    splits = math.ceil(b.shape[1] / common.split)
    if splits == 1:
        return tuple(None if x is None else x[:, :, None] for x in (state, sums))
    *_, own, own_sums = run_sweep(common, None, b, c, None, None, last=True, reverse=reverse, **cotangents)
    place = np.arange(splits)
    origin = place if state is None else np.append(place, splits if reverse else -1)
    here, there, between = place[:, None, None], origin[None, :, None], place[None, None, :]
    if reverse:
        comes, lies = there > here, (here < between) & (between < there)
    else:
        comes, lies = there < here, (there < between) & (between < here)
    exponents = jnp.sum(_split_decays(common, b.shape[1], splits)[:, :, None, None] * lies, axis=-1)
    weights = jnp.where(comes[..., 0], jnp.exp(exponents), 0)  # (B or 1, H or 1, splits, origins)
    weights = jnp.broadcast_to(weights, (*own.shape[:2], *weights.shape[2:]))

    def arrive(own: jax.Array | None, initial: jax.Array | None) -> jax.Array | None:
        if own is None:
            return None
        own = own if initial is None else jnp.concatenate([own, initial[:, :, None]], axis=2)
        return jnp.einsum("bhsu,bhu...->bhs...", weights, own, precision="highest")

    return arrive(own, state), arrive(own_sums, sums)


def _split_decays(common: Common, tokens: int, splits: int) -> jax.Array:
    """Log decay over each whole split, (B or 1, H or 1, splits)."""
    if common.decay is None:
        return jnp.zeros((1, 1, splits), jnp.float32)
    size = common.split
    decay = jnp.maximum(common.decay, kernels.LEAST)
    if decay.ndim == 1:
        lengths = np.minimum(size, tokens - size * np.arange(splits))
        return (decay[:, None] * lengths)[None]
    decay = jnp.pad(decay, ((0, 0), (0, splits * size - tokens), (0, 0)))
    return jnp.swapaxes(jnp.sum(decay.reshape(decay.shape[0], splits, size, -1), axis=2), 1, 2)


# ---- small things


class _Out(NamedTuple):
    """Shape and dtype of an output of a kernel."""

    shape: tuple[int, ...]
    dtype: jnp.dtype


def _precision(dtype: jnp.dtype) -> dict[str, Any]:
    """How products are computed, as constants of a kernel."""
    if wide(dtype):
        return {"DOT": kernels.tl.float32, "PRECISION": "ieee"}
    return {"DOT": kernels.tl.bfloat16, "PRECISION": "tf32"}  # the second concerns float32 operands alone


def _operand(dtype: jnp.dtype) -> jnp.dtype:
    """Dtype of operands of products, of kept states and of scratch."""
    return jnp.float32 if wide(dtype) else jnp.bfloat16


def _call(
    kernel: Any,
    inputs: Sequence[jax.Array | None],
    tokens: int,
    outputs: Sequence[_Out | None],
    *,
    gpu: Gpu,
    grid: int,
    blocks: Blocks,
    **constants: Any,
) -> list[jax.Array | None]:
    """A kernel with absent inputs and outputs: the first input stands in for those, one number for these."""
    stand_in = next(x for x in inputs if x is not None)
    arrays = [stand_in if x is None else x.reshape(1) if x.ndim == 0 else x for x in inputs]
    shapes = [jax.ShapeDtypeStruct(*(out or ((1,), jnp.float32))) for out in outputs]
    capability = None if gpu == LEAST_ABLE else gpu.capability
    results = _launch(kernel, arrays, tokens, shapes, capability, grid, blocks.warps, blocks.stages, constants)
    # A call that JAX knows nothing of gives arrays that are typed as equal on all shards of a `jax.shard_map`.
    results, _ = partition.same_manual_axes((list(results), arrays))
    return [x if out is not None else None for x, out in zip(results, outputs, strict=True)]
