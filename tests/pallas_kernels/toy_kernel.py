"""A small differentiable kernel with batch, heads and key heads: y = q · w · Σ_n k."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from pallas_kernels import dispatch, partition


def _forward_kernel(q, k, w, y):
    y[...] = q[...] * jnp.sum(k[...], axis=2, keepdims=True) * w[:, :, :1, :1]


def _backward_kernel(q, k, w, dy, dq, dk, dw):
    total = jnp.sum(k[...], axis=2, keepdims=True)
    dq[...] = dy[...] * total * w[:, :, :1, :1]
    summed = jnp.sum(dy[...] * q[...], axis=2, keepdims=True)
    dk[...] = jnp.broadcast_to(summed * w[:, :, :1, :1], dk.shape)
    dw[...] = jnp.broadcast_to(summed * total, dw.shape)


def _call(kernel, outputs, q, k, w, *rest):
    """Runs `kernel` for each batch element and head, on arrays of (B, H, N, D) and with `outputs` of them."""
    group = q.shape[2] // k.shape[2]
    q, k, *rest = (jnp.swapaxes(x, 1, 2) for x in (q, k, *rest))
    w = jnp.broadcast_to(w[None, :, None, None], (1, w.size, 8, 128))
    each = pl.BlockSpec((1, 1, *q.shape[2:]), lambda b, h: (b, h, 0, 0))
    of_group = pl.BlockSpec((1, 1, *k.shape[2:]), lambda b, h: (b, h // group, 0, 0))
    of_head = pl.BlockSpec((1, 1, 8, 128), lambda b, h: (0, h, 0, 0))
    return pl.pallas_call(
        kernel,
        grid=q.shape[:2],
        in_specs=[each, of_group, of_head, *[each] * len(rest)],
        out_specs=[each] * outputs,
        out_shape=[partition.struct(q.shape, jnp.float32, q, k, w, *rest)] * outputs,
        interpret=dispatch.current_platform() != "tpu",
    )(q, k, w, *rest)


def _forward(q, k, w):
    return (jnp.swapaxes(_call(_forward_kernel, 1, q, k, w)[0], 1, 2),)


def _backward(q, k, w, dy):
    dq, dk, dw = _call(_backward_kernel, 3, q, k, w, dy)
    dk = jnp.sum(dk.reshape(q.shape[0], k.shape[2], -1, *dk.shape[2:]), axis=2)
    return jnp.swapaxes(dq, 1, 2), jnp.swapaxes(dk, 1, 2), jnp.sum(dw[:, :, 0], axis=-1)


forward = partition.batched_and_partitioned(_forward, ("BNHD", "BNGD", "H"), ("BNHD",))
backward = partition.batched_and_partitioned(_backward, ("BNHD", "BNGD", "H", "BNHD"), ("BNHD", "BNGD", "BH"))


def toy(q: jax.Array, k: jax.Array, w: jax.Array) -> jax.Array:
    """y (B, N, H, D) of q (B, N, H, D), k (B, N, G, D) and w (H,)."""
    return _toy(*partition.same_manual_axes((q, k, w)))


@jax.custom_vjp
def _toy(q, k, w):
    return forward(q, k, w)[0]


def _toy_backward(residuals, dy):
    dq, dk, dw = backward(*residuals, dy)
    return dq, dk, jnp.sum(dw, axis=0)


_toy.defvjp(lambda q, k, w: (_toy(q, k, w), (q, k, w)), _toy_backward)


def loss(q: jax.Array, k: jax.Array, w: jax.Array) -> jax.Array:
    """A number that depends on every output."""
    return jnp.sum(jnp.sin(toy(q, k, w)))


def arguments(heads: int = 4, groups: int = 2) -> tuple[jax.Array, ...]:
    """q (8, 16, heads, 8), k with `groups` heads, and w."""
    rng = np.random.default_rng(0)
    shapes = ((8, 16, heads, 8), (8, 16, groups, 8), (heads,))
    return tuple(jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes)
