"""What sparse attention costs: pairs of queries and keys in the tiles that the op visits, and temporary memory."""

import math
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp

from pallas_kernels.block_sparse_attention import api, paged, xla
from pallas_kernels.block_sparse_attention.tiles import tiles_of


def visited_pairs(call: Callable[..., Any], *arguments: Any) -> int:
    """Pairs of queries and keys, over all heads, in tiles that a call makes the op or the paged one visit.

    Lists that are made at run time are counted as they are made for these arguments. The op itself gives zeros.
    """

    def counting(*arguments: Any) -> Any:
        total = jnp.zeros((), jnp.int32)

        def count(layout: Any, tiles: Any) -> None:
            nonlocal total
            total += tiles.offsets[-1] * (layout.block_q * layout.block_k * math.prod(layout.inner))

        def run(args: Any) -> tuple[jax.Array, jax.Array]:
            count(*tiles_of(args, *xla._chosen_sizes(args)[:2]))
            return jnp.zeros((*args.q.shape[:3], args.v.shape[-1]), args.q.dtype), jnp.zeros(args.q.shape[:3])

        def paged_tiles(*args: Any) -> Any:
            layout, tiles = tiles_of(*args)
            count(layout, tiles)
            return layout, tiles

        chosen = mock.Mock(**{"load.return_value.run": run})
        with (
            mock.patch.object(api.dispatch, "choose", lambda *_: chosen),
            mock.patch.object(paged, "tiles_of", paged_tiles),
        ):
            call(*arguments)
        return total

    return int(jax.jit(counting)(*arguments))


def temporaries(call: Callable[..., Any], *arguments: Any) -> int:
    """Bytes of temporary memory of the compiled call and its gradient; the arguments may be shapes alone."""

    def loss(*arguments: Any) -> jax.Array:
        return call(*arguments).sum()

    compiled = jax.jit(jax.grad(loss, tuple(range(len(arguments))))).lower(*arguments).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def check_growth(measured: tuple[float, float], declared: tuple[float, float], slack: float = 1.3) -> None:
    """Of two sizes, what was measured grows no faster than what was declared, but for the slack."""
    assert measured[0] > 0, "nothing was measured"
    growth, allowed = measured[1] / measured[0], declared[1] / declared[0]
    assert growth <= slack * allowed, f"grows by {growth:.2f}, declared {allowed:.2f}"


def operations(call: Callable[..., Any], *arguments: Any) -> float:
    """Floating-point operations of the compiled call, by the compiler's count; of a loop it counts one pass."""
    return jax.jit(call).lower(*arguments).compile().cost_analysis()["flops"]
