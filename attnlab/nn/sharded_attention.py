"""Exact attention of one long sequence over many devices, by heads, by tokens, or by both.

After the abstract of "A Unified View of Long-Sequence Models towards Modeling Million-Scale Dependencies" (2023,
arXiv:2302.06218), whose distributed attention is read as the two ways in which softmax attention falls apart (no code
is public). Over the axes of a mesh:

    heads     each device has some heads, and sends nothing
    tokens    each has a run of queries, and keys and values go around in a ring; results of parts are joined by the log
              of their sums of exponentials: y = Σ_r exp(lse_r - lse) y_r, where a part without keys counts nothing

Both give what one device gives, up to rounding, gradients too. Per device: time O(N²·H·D / R) and memory O(N·H·D / R)
over R devices. The ring is `pallas_kernels.block_sparse_attention.context_parallel_attention`, as is the exchange of
heads for tokens (`method="all_to_all"`).
"""

from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike

from attnlab.registry import Cost, Example, Kind, Paper, Source, register
from pallas_kernels.block_sparse_attention import block_sparse_attention, context_parallel_attention, zigzag
from pallas_kernels.masks import Causal, Mask

PAPER = Paper(
    "A Unified View of Long-Sequence Models towards Modeling Million-Scale Dependencies",
    "Hè and Kabić",
    2023,
    arxiv="2302.06218",
    number=65,
)


def _example() -> Example:
    q, k, v = (jax.random.normal(key, (2, 16, 2, 4)) for key in jax.random.split(jax.random.key(0), 3))
    return Example(sharded_attention, (q, k, v), {"token_axis": "tokens", "causal": True}, (0, 1, 2), (0, 1, 2))


@register(
    "unified_long_sequence.sharded",
    kind=Kind.FUNCTION,
    paper=PAPER,
    source=Source.ABSTRACT_ONLY,
    cost=Cost(time="O(N·M·H·D / R)", memory="O((N + M)·H·D / R)"),
    kernel="block_sparse_attention",
    summary="exact softmax attention over the devices of a mesh, cut by heads, by tokens in a ring, or by both",
    small=_example,
)
def sharded_attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    mesh: Mesh | None = None,
    head_axis: str | None = None,
    token_axis: str | None = None,
    batch_axis: str | None = None,
    causal: bool = False,
    method: Literal["ring", "all_to_all"] = "ring",
    order: Literal["contiguous", "zigzag"] = "contiguous",
    scale: float | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Softmax attention.

    Args:
      q: queries `(B, N, H, D)`.
      k: keys `(B, M, G, D)`, H a multiple of G.
      v: values `(B, M, G, E)`.
      mesh: of the devices; when None all of them, along the one axis that is named.
      head_axis: its axis over which heads are cut; None for none.
      token_axis: its axis over which tokens are cut, those of queries and those of keys.
      batch_axis: its axis over which examples are cut.
      causal: query i sees keys j ≤ i, both counted from the start.
      method: how tokens that are cut meet: keys in a "ring", or heads exchanged for tokens.
      order: "zigzag" gives each device early and late tokens, so that all have the same work under a causal mask;
        tokens are sent there, and the results back. With a ring, and as many queries as keys.
      scale: of the scores; D^-1/2 when None.
      implementation: of `block_sparse_attention`.

    Returns:
      `(B, N, H, E)`, cut as q is.

    Raises:
      ValueError: for an axis that the mesh does not have, or sizes that it does not divide.
    """
    q, k, v = (jnp.asarray(x) for x in (q, k, v))
    if mesh is None:
        named = [axis for axis in (batch_axis, token_axis, head_axis) if axis is not None]
        if len(named) != 1:
            raise ValueError(f"mesh is needed unless one axis is named, got {named}")
        mesh = jax.make_mesh((jax.device_count(),), tuple(named), axis_types=(jax.sharding.AxisType.Auto,))
    for name, axis, place in (("examples", batch_axis, 0), ("tokens", token_axis, 1), ("heads", head_axis, 2)):
        sizes = q.shape[place], k.shape[place]
        if axis is None:
            continue
        if axis not in mesh.shape:
            raise ValueError(f"mesh has the axes {tuple(mesh.shape)}, and no {axis!r} to cut {name} over")
        if any(size % mesh.shape[axis] for size in sizes):
            raise ValueError(f"the {mesh.shape[axis]} devices of {axis!r} must divide the {name}, got {sizes}")
    rule: Mask | None = Causal() if causal else None
    if order == "zigzag":
        if token_axis is None or q.shape[1] != k.shape[1]:
            raise ValueError("order='zigzag' is for tokens that are cut, as many queries as keys")
        zigzag(q.shape[1], mesh.shape[token_axis])  # raises where the tokens do not fall into parts

    def local(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        options: dict[str, Any] = {"mask": rule, "scale": scale, "implementation": implementation}
        if token_axis is None:
            return cast(jax.Array, block_sparse_attention(q, k, v, **options))
        options |= {"method": method, "order": order}
        if order == "zigzag":
            q, k, v = (_to_zigzag(x, token_axis) for x in (q, k, v))
        y = cast(jax.Array, context_parallel_attention(q, k, v, token_axis, **options))
        return _from_zigzag(y, token_axis) if order == "zigzag" else y

    spec = P(batch_axis, token_axis, head_axis)
    return jax.shard_map(local, mesh=mesh, in_specs=(spec, spec, spec), out_specs=spec)(q, k, v)


def _routes(axis_name: str) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Where the first half of each device's tokens goes, and where the second does: part p of 2 n to p or 2 n - 1 - p.

    Device d has the parts 2 d and 2 d + 1 in the order of the tokens, and d and 2 n - 1 - d in that of `zigzag`.
    """
    count = jax.lax.axis_size(axis_name)
    first, second = (
        [(d, part if part < count else 2 * count - 1 - part) for d, part in enumerate(range(start, 2 * count, 2))]
        for start in (0, 1)
    )
    return first, second


def _to_zigzag(x: jax.Array, axis_name: str) -> jax.Array:
    """A device's tokens `(B, N / n, …)` in the order of the sequence to those in the order of `zigzag`."""
    first, second = jnp.split(x, 2, axis=1)
    there, elsewhere = _routes(axis_name)
    sent = jax.lax.ppermute(first, axis_name, there), jax.lax.ppermute(second, axis_name, elsewhere)
    return _swapped(*sent, axis_name)


def _from_zigzag(x: jax.Array, axis_name: str) -> jax.Array:
    """The inverse of `_to_zigzag`."""
    first, second = jnp.split(x, 2, axis=1)
    halves = jnp.split(_swapped(first, second, axis_name), 2, axis=1)
    home = ([(there, here) for here, there in route] for route in _routes(axis_name))
    sent = [jax.lax.ppermute(half, axis_name, route) for half, route in zip(halves, home, strict=True)]
    return jnp.concatenate(sent, axis=1)


def _swapped(first: jax.Array, second: jax.Array, axis_name: str) -> jax.Array:
    """Both halves, in the other order on devices of odd number: these get their late tokens from first halves."""
    odd = jax.lax.axis_index(axis_name) % 2 == 1
    return jnp.concatenate([jnp.where(odd, second, first), jnp.where(odd, first, second)], axis=1)
