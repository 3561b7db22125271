"""What a mechanism on `block_sparse_attention` costs: the pairs in the tiles that it visits, and compiled memory."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.block_sparse_attention import xla
from pallas_kernels.block_sparse_attention.api import normal_form
from pallas_kernels.block_sparse_attention.tiles import tiles_of


def visited_pairs(modules: Any, call: Callable[[], Any]) -> int:
    """Pairs of queries and keys, for each batch element and head, in all tiles that the modules' calls visit.

    Nothing is attended: the op is replaced by one that counts and returns zeros.
    """
    total = 0

    def counted(q: Any, k: Any, v: Any, *, return_lse: bool = False, implementation: Any = None, **options: Any) -> Any:
        nonlocal total
        args = normal_form(q, k, v, **options)
        block_q, block_k, _ = xla._chosen_sizes(args)
        layout, tiles = tiles_of(args, block_q, block_k)
        (b, n, h, _), size = args.q.shape, args.v.shape[-1]
        shared = b * h // (layout.lanes_b * layout.lanes_h)
        total += int(np.asarray(tiles.offsets)[-1]) * min(block_q, n) * min(block_k, args.k.shape[1]) * shared
        y, lse = jnp.zeros((b, n, h, size), args.q.dtype), jnp.zeros((b, n, h), args.accumulator)
        return (y, lse) if return_lse else y

    with pytest.MonkeyPatch.context() as patch:
        for module in modules if isinstance(modules, tuple) else (modules,):
            patch.setattr(module, "block_sparse_attention", counted)
        call()
    return total


def temporary_bytes(call: Callable[..., Any], *arguments: Any, gradient: bool = True) -> int:
    """Memory that a compiled call, or the gradient of its sum, takes beside its arguments and results."""

    def loss(*arguments: Any) -> jax.Array:
        return jnp.sum(call(*arguments))

    step = jax.jit(jax.grad(loss, tuple(range(len(arguments)))) if gradient else call)
    return step.lower(*arguments).compile().memory_analysis().temp_size_in_bytes


def shapes(*sizes: tuple[int, ...]) -> tuple[jax.ShapeDtypeStruct, ...]:
    """float32 arrays of these shapes, for `temporary_bytes`."""
    return tuple(jax.ShapeDtypeStruct(size, jnp.float32) for size in sizes)
