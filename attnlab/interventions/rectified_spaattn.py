"""Rectified sparse attention of video diffusion, Rectified SpaAttn (Liu et al., 2025, arXiv:2511.19835).

Code at BienLuky/Rectified-SpaAttn. Tokens of a video are put in an order in which blocks are compact, along a
generalised Hilbert curve. Blocks of n queries attend to blocks of m keys that their means call critical; what is left
out is estimated from the means, in which padding counts as zeros:

    Q_I, K_J, V_J = means of q, k, v over blocks,   P = softmax_J(Q_I·K_J / √D)
    critical: of P_I in descending order the first #(Σ P ≤ p) + 1 blocks, `top_k` at least; those beside I in the
              video; and for blocks of the first frame each other
    o_i = softmax attention of query i over the tokens of critical blocks
    gain: |Q_I·K_J| > |mean_i|q_i - Q_I| · K_J| + |Q_I · mean_j|k_j - K_J||       the means say more than they hide
    y_i = R_I o_i + Σ_{J ∉ C} P_IJ V_J,   R_I = Σ_{J ∈ C} P_IJ,   C: critical, or without gain

so that blocks that are neither critical nor well estimated leave their share to the sparse part.

With text behind the video (HunyuanVideo), the tokens of text that exist are keys one by one beside the means of blocks.
Their probabilities are brought to scale, p m / (v m + t) for a block and t / (v m + t) for all text, v and t the sums
of both. Text is critical for all; its own queries attend to everything, unrectified. Padding of text is seen by none,
and its rows are zeros.

It is for inference, without causal order. The authors keep the first two layers dense, `layers=range(2, L)`, and in
Wan the first ten calls.

    model = with_core(model, lambda core: RectifiedCore.of(core, grid=(8, 30, 52)), layers=range(2, 30))
"""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from attnlab.contract import Layout, View
from attnlab.nn.dense_mixer import Core, Heads, HeadSizes
from attnlab.nn.plain_core import plain_softmax
from attnlab.nn.rotary import Rotary
from attnlab.nn.scans import inverse_order, permute, scan_order
from attnlab.points import Edits
from attnlab.registry import Cost, Example, Kind, Paper, Source, register
from pallas_kernels.block_sparse_attention import Blocks, block_sparse_attention
from pallas_kernels.dtypes import at_least_float32


class Rectified(NamedTuple):
    """A result and what blocks decided.

    Attributes:
      y: `(B, N, H, E)`.
      critical: which blocks of keys are visited, `(B, H, I, J)` boolean; with text the last blocks of J are its.
      probabilities: P, `(B, H, I, J)` in float32; with text brought to scale, and the text's share as the last entry.
      gain: `(B, H, I, J)` boolean, of blocks of the video alone.
    """

    y: jax.Array
    critical: jax.Array
    probabilities: jax.Array
    gain: jax.Array


def block_neighbours(order: np.ndarray, grid: Sequence[int], block_q: int, block_k: int | None = None) -> np.ndarray:
    """Which blocks of consecutive tokens of an order have tokens beside each other, diagonally too, or in common.

    Args:
      order: `(N,)` flat places, as of `scan_order`.
      grid: lengths of the axes.
      block_q: tokens of a block of queries.
      block_k: of one of keys; the same when None.

    Returns:
      `(I, J)` boolean.
    """
    place = inverse_order(order).reshape(grid)
    block_k = block_q if block_k is None else block_k
    rows, columns = place // block_q, np.pad(place // block_k, 1, constant_values=-1)
    beside = np.zeros((-(-len(order) // block_q), -(-len(order) // block_k)), bool)
    for shift in itertools.product(range(3), repeat=len(grid)):
        there = columns[tuple(slice(s, s + length) for s, length in zip(shift, grid, strict=True))]
        beside[rows[there >= 0], there[there >= 0]] = True
    return beside


def _means(x: jax.Array, block: int) -> tuple[jax.Array, jax.Array]:
    """Means of blocks `(B, H, I, D)` in float32 (or wider), and of distances from them; padding counts as zeros."""
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % block), (0, 0), (0, 0))).astype(at_least_float32(x.dtype))
    blocks = jnp.moveaxis(x.reshape(x.shape[0], -1, block, *x.shape[2:]), 3, 1)
    means = blocks.mean(3)
    return means, jnp.abs(blocks - means[:, :, :, None]).mean(3)


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum("bhid,bhjd->bhij", a, b, precision=jax.lax.Precision.HIGHEST)


def _likeliest(probabilities: jax.Array, share: float, least: int) -> jax.Array:
    """The first entries in descending order: one more than have a sum of at most `share`, and `least` at least."""
    order = jnp.argsort(-probabilities, axis=-1, stable=True)
    sums = jnp.cumsum(jnp.take_along_axis(probabilities, order, axis=-1), axis=-1)
    count = jnp.maximum((sums <= share).sum(-1, keepdims=True) + 1, least)
    return jnp.argsort(order, axis=-1) < count


def rectified_sparse_attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    neighbours: ArrayLike | None = None,
    *,
    block_q: int = 128,
    block_k: int = 128,
    top_k: int = 1,
    share: float = 0.5,
    first_frame_blocks: int = 0,
    text_slots: int = 0,
    num_text: ArrayLike | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> Rectified:
    """Block-sparse attention with the rest estimated; see the module docstring.

    Args:
      q: queries, (B, N, H, D), in an order in which blocks are compact.
      k: keys, (B, N, G, D), G a divisor of H.
      v: values, (B, N, G, E).
      neighbours: boolean (I, J), blocks that are critical beside the likeliest, as of `block_neighbours`.
      block_q: n, queries of a block.
      block_k: m, keys of a block.
      top_k: least number of critical blocks.
      share: p, what the likeliest blocks have together.
      first_frame_blocks: so many first blocks are critical for each other.
      text_slots: the last so many tokens are text; the video before it is whole blocks.
      num_text: how many of them exist, the first ones: a number, or integers (B,); all when None.
      scale: of the token scores and the means' probabilities; D^-1/2 when None.
      implementation: of `block_sparse_attention`.

    Raises:
      ValueError: for sizes that do not fit.
    """
    q, k, v = jnp.asarray(q), jnp.asarray(k), jnp.asarray(v)
    if min(block_q, block_k) < 1 or not 0 <= share <= 1:
        raise ValueError(f"blocks must be at least 1 and share in 0..1, got {block_q}, {block_k} and {share}")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    tokens = q.shape[1] - text_slots
    if text_slots and (tokens < 1 or tokens % block_q or tokens % block_k):
        raise ValueError(f"before {text_slots} of text {tokens} tokens must be whole blocks of {block_q} and {block_k}")
    wide = functools.partial(jnp.repeat, repeats=q.shape[2] // k.shape[2], axis=2)
    (queries, of_q), (keys, of_k) = _means(q[:, :tokens], block_q), _means(wide(k[:, :tokens]), block_k)
    scores = _product(queries, keys)
    gain = jnp.abs(scores) > jnp.abs(_product(of_q, keys)) + jnp.abs(_product(queries, of_k))
    rows, columns = scores.shape[2:]

    batch, text = q.shape[0], jnp.arange(text_slots)
    exists = jnp.ones((1, text_slots), bool)
    if num_text is not None:
        exists = text < jnp.asarray(num_text).reshape(-1, 1)
    if text_slots:
        words = jnp.moveaxis(wide(k[:, tokens:]), 2, 1).astype(scores.dtype)
        to_words = jnp.where(exists[:, None, None], _product(queries, words), -jnp.inf)
        every = jax.nn.softmax(jnp.concatenate([scores, to_words], -1) * scale, axis=-1)
        of_blocks, of_words = every[..., :columns], every[..., columns:].sum(-1, keepdims=True)
        total = of_blocks.sum(-1, keepdims=True) * block_k + of_words
        probabilities = jnp.concatenate([of_blocks * block_k, of_words], -1) / total
    else:
        probabilities = jax.nn.softmax(scores * scale, axis=-1)
    critical = _likeliest(probabilities, share, min(top_k, probabilities.shape[-1]))[..., :columns]
    if neighbours is not None:
        neighbours = jnp.asarray(neighbours)
        if neighbours.shape != (rows, columns) or neighbours.dtype != jnp.bool_:
            raise ValueError(f"neighbours must be boolean {(rows, columns)}, got {neighbours.dtype}{neighbours.shape}")
        critical |= neighbours
    first = jnp.arange(max(rows, columns)) < first_frame_blocks
    critical |= first[:rows, None] & first[:columns]

    counted = critical | ~gain
    shares = probabilities[..., :columns]
    sparse = jnp.where(counted, shares, 0).sum(-1) + probabilities[..., columns:].sum(-1)
    of_v = _means(wide(v[:, :tokens]), block_k)[0]
    rest = jnp.einsum("bhij,bhje->bhie", jnp.where(counted, 0, shares), of_v, precision=jax.lax.Precision.HIGHEST)

    options: dict[str, Any] = {"scale": scale, "implementation": implementation}
    visited = critical
    if text_slots:
        starts = jnp.arange(-(-text_slots // block_k)) * block_k
        some = jnp.broadcast_to(starts < exists.sum(-1, keepdims=True), (batch, starts.size))[:, None, None]
        visited = jnp.concatenate([critical, jnp.broadcast_to(some, (*critical.shape[:3], starts.size))], -1)
        ids = jnp.where(jnp.broadcast_to(exists, (batch, text_slots)), 0, 1)
        key_ids = jnp.concatenate([jnp.zeros((batch, tokens), ids.dtype), ids], 1)
        options["segment_ids"] = (jnp.zeros((batch, tokens), ids.dtype), key_ids)
    blocks = Blocks.from_booleans(visited, block_q, block_k)
    y = jnp.asarray(block_sparse_attention(q[:, :tokens], k, v, blocks=blocks, **options))

    def each(x: jax.Array) -> jax.Array:
        """(B, H, I, …) of blocks as (B, N, H, …) of their tokens."""
        return jnp.repeat(jnp.moveaxis(x, 1, 2), block_q, axis=1)[:, :tokens]

    y = (y.astype(rest.dtype) * each(sparse)[..., None] + each(rest)).astype(y.dtype)
    if text_slots:
        # A segment that no key has: padding sees nothing.
        options["segment_ids"] = (jnp.where(ids == 0, 0, 2), key_ids)
        y = jnp.concatenate([y, jnp.asarray(block_sparse_attention(q[:, tokens:], k, v, **options))], 1)
    return Rectified(y, visited, probabilities, gain)


def _example() -> Example:
    from attnlab.attention.dense.softmax_attention import SoftmaxAttention
    from attnlab.nn.dense_mixer import with_core

    mixer = SoftmaxAttention(8, num_heads=2, layout=Layout.VIDEO, rngs=nnx.Rngs(0))
    core = RectifiedCore(grid=(2, 4, 4), block_size=8, share=0.6)
    return Example(with_core(mixer, core), (jax.random.normal(jax.random.key(1), (2, 2, 4, 4, 8)),))


@register(
    "rectified_spaattn",
    kind=Kind.INTERVENTION,
    paper=Paper(
        "Rectified SpaAttn: Revisiting Attention Sparsity for Efficient Video Generation",
        "Liu et al.",
        2025,
        arxiv="2511.19835",
        number=161,
    ),
    source=Source.AUTHORS_CODE,
    repository="BienLuky/Rectified-SpaAttn",
    cost=Cost("O((N·V·m + (N/n)²)·H·D), V blocks visited of N/m", "O(N·H·D + (N/n)²·H)"),
    kernel="block_sparse_attention",
    summary="blocks of a video attend to critical blocks; means stand in for the others, scaled to their share",
    small=_example,
)
class RectifiedCore(Core):
    """That attention between the projections of a mixer that has no order, for inference; nothing is edited in it.

    Args:
      grid: (T, H, W) of the video or (H, W) of the image in the mixer's tokens, row-major; text stands behind it.
      text_slots: tokens of text behind the grid's; a mask (B, N) says which of them exist, the first ones.
      block_size: n and m, tokens of a block of queries and of keys.
      drop_rate: blocks that may be left out: `top_k` is int((1 - drop_rate)·N/m), as the authors have 0.75 in Wan, 0.8
        in HunyuanVideo and 0.9 in Flux.
      share: p, what the likeliest blocks have together.
      first_frame: whether the blocks of the first frame, the T-th part of all, are critical for each other, as in Wan.
      curve: the order of tokens, a name of `scan_order`; "raster" leaves them as they are.
      with_neighbours: whether blocks that are beside each other on the grid are critical.
      rotary: rotary positions along the axes of the layout, or theta for `Rotary(theta)`; none when None.
      scale: of the scores; D^-1/2 when None.

    Raises:
      ValueError: for options out of range.
    """

    def __init__(
        self,
        *,
        grid: Sequence[int],
        text_slots: int = 0,
        block_size: int = 128,
        drop_rate: float = 0.75,
        share: float = 0.3,
        first_frame: bool = False,
        curve: str = "gilbert",
        with_neighbours: bool = False,
        rotary: Rotary | float | None = None,
        scale: float | None = None,
    ):
        if not 0 <= drop_rate <= 1 or text_slots < 0 or block_size < 1:
            raise ValueError(
                f"drop_rate must be in 0..1, text_slots at least 0 and block_size 1, got {drop_rate}, {text_slots} and "
                f"{block_size}"
            )
        self.grid, self.text_slots = tuple(int(length) for length in grid), text_slots
        self.block_size, self.drop_rate, self.share, self.first_frame = block_size, drop_rate, share, first_frame
        self.curve, self.with_neighbours, self.scale = curve, with_neighbours, scale
        self.rotary = Rotary.of(rotary)
        self.looks_at_positions, self.permutation_equivariant = self.rotary is not None, False

    @classmethod
    def of(cls, core: Core, **options: Any) -> Self:
        """In the place of a plain softmax, with its rotary positions and scale.

        Raises:
          ValueError: for a core that is more than a softmax of products.
        """
        return cls(**(plain_softmax(core) | options))

    def check(self, sizes: HeadSizes, layout: Layout) -> None:
        if self.rotary is not None:
            self.rotary.check(sizes.key_size, layout.axes)

    def __call__(
        self,
        heads: Heads,
        view: View,
        cache: Any = None,
        *,
        edits: Edits | None = None,
        deterministic: bool = True,
        owner: nnx.Module | None = None,
    ) -> tuple[jax.Array, Any]:
        q, k, v = heads[:3]
        tokens = math.prod(self.grid)
        if q.shape[1] != k.shape[1] or q.shape[1] != tokens + self.text_slots:
            raise ValueError(
                f"{type(self).__name__} is for {tokens} tokens of the grid {self.grid} and {self.text_slots} of text, "
                f"got {q.shape[1]} queries and {k.shape[1]} keys"
            )
        num_text = None
        if self.text_slots and view.mask is not None and view.mask.ndim == 2:
            num_text = view.mask[:, tokens:].sum(1, dtype=jnp.int32)
            view = View(rule=view.rule, segment_ids=view.segment_ids, q_at=view.q_at, k_at=view.k_at)
        self.refuse_masks(view)
        if self.rotary is not None:
            q, k = self.rotary(q, view.q_at), self.rotary(k, view.k_at)
        order = scan_order(self.curve, self.grid)
        places = np.concatenate([order, np.arange(tokens, q.shape[1], dtype=np.int32)])
        q, k, v = (permute(one, places) for one in (q, k, v))
        size, blocks = self.block_size, -(-tokens // self.block_size)
        neighbours = block_neighbours(order, self.grid, size) if self.with_neighbours else None
        y = rectified_sparse_attention(
            q,
            k,
            v,
            neighbours,
            block_q=size,
            block_k=size,
            top_k=int((1 - self.drop_rate) * blocks),
            share=self.share,
            first_frame_blocks=blocks // self.grid[0] if self.first_frame else 0,
            text_slots=self.text_slots,
            num_text=num_text,
            scale=self.scale,
        ).y
        return permute(y, inverse_order(places)), None
