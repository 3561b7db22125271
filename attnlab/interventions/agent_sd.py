"""AgentSD: agent attention in a trained diffusion model, without training (Han et al., arXiv:2312.08874).

Two edits of the self-attention of Stable Diffusion. First, similar tokens are merged (as in ToMe for Stable Diffusion,
Bolya and Hoffman, arXiv:2303.17604), at two rates: the attention runs on the tokens that remain at the lower rate, the
few that remain at the higher rate are its agents. Of each cell of the grid one token is a destination and the others
are sources; the sources most similar (by cosine) to any destination are averaged into it. Second, with the trained
projections, D the head size, and agents A projected like queries,

    Y = softmax(D^{-γ/2} Q Aᵀ) softmax(D^{-1/2} A Kᵀ) V + k V,    γ = 0.3, k = 0.075

if there are fewer than half as many agents as tokens; else plain softmax attention. Afterwards each merged source gets
the value of its destination. As projections are affine and merging takes means, merged queries, keys and values are the
projections of merged tokens: the whole is an edit of `heads`, given what `stream` and `qkv` saw.

    fast = attach(model, AgentSD(image_grid))

Reference for names and defaults: LeapLabTHU/Agent-Attention, agentsd.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from attnlab.attention.linear.agent_attention import PAPER, agent_attention
from attnlab.nn.dense_mixer import Heads
from attnlab.nn.grids import to_tokens
from attnlab.nn.softmax import softmax_attention
from attnlab.points import At, Intervention, Setting
from attnlab.registry import Cost, Example, Kind, Source, register


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Merging:
    """Which tokens are merged into which; what `match_tokens` finds.

    Attributes:
      sources: places of the source tokens of each example, the most similar first, `(B, S)`.
      destinations: places of the destination tokens, `(T,)`.
      nearest: for each source the destination that is most similar, `(B, S)` below T.
      merged: how many sources are merged for the tokens.
      agent_merged: how many are merged for the agents; None if there are no agents.
    """

    sources: jax.Array
    destinations: jax.Array
    nearest: jax.Array
    merged: int = dataclasses.field(metadata={"static": True})
    agent_merged: int | None = dataclasses.field(metadata={"static": True})

    def merge(self, x: ArrayLike) -> tuple[jax.Array, jax.Array | None]:
        """Tokens `(B, N, ...)` to the merged ones `(B, N - merged, ...)` and to the agents, None if there are none.

        The sources that remain come first, then the destinations.
        """
        x = jnp.asarray(x)
        agents = None if self.agent_merged is None else self._merge(x, self.agent_merged)
        return self._merge(x, self.merged), agents

    def unmerge(self, y: ArrayLike) -> jax.Array:
        """Merged tokens `(B, N - merged, ...)` to all of them `(B, N, ...)`, sources as their destinations."""
        y = jnp.asarray(y)
        kept = self.sources.shape[1] - self.merged
        destinations = y[:, kept:]
        copies = _rows(destinations, self.nearest[:, : self.merged])
        whole = jnp.concatenate([copies, y[:, :kept], destinations], 1)
        places = jnp.broadcast_to(self.destinations, (y.shape[0], self.destinations.shape[0]))
        places = jnp.concatenate([self.sources, places], 1)
        return jnp.zeros_like(whole).at[jnp.arange(y.shape[0])[:, None], places].set(whole)

    def _merge(self, x: jax.Array, count: int) -> jax.Array:
        sources = _rows(x, self.sources)
        wide = jnp.promote_types(x.dtype, jnp.float32)
        batch, into = jnp.arange(x.shape[0])[:, None], self.nearest[:, :count]
        total = x[:, self.destinations].astype(wide).at[batch, into].add(sources[:, :count].astype(wide))
        members = jnp.ones(total.shape[:2], wide).at[batch, into].add(1)
        members = members.reshape(members.shape + (1,) * (x.ndim - 2))
        return jnp.concatenate([sources[:, count:], (total / members).astype(x.dtype)], 1)


def _rows(x: jax.Array, places: jax.Array) -> jax.Array:
    return x[jnp.arange(x.shape[0])[:, None], places]


def match_tokens(
    metric: ArrayLike,
    grid: tuple[int, int],
    *,
    merged: int,
    agent_merged: int,
    cell: tuple[int, int] = (2, 2),
    key: jax.Array | None = None,
) -> Merging:
    """Finds the tokens to merge; no gradient flows through the choice.

    Args:
      metric: features whose cosine similarity is compared, `(B, N, C)`.
      grid: rows and columns of the tokens; what does not fill a cell at the end is a source.
      merged: how many sources to merge for the tokens; at most all are.
      agent_merged: how many to merge for the agents; there are agents only if they are fewer than half the tokens.
      cell: rows and columns of a cell.
      key: chooses the destination of each cell at random; without it, it is the upper left token.

    Raises:
      ValueError: if the grid does not hold N tokens, or a count is negative.
    """
    metric = jax.lax.stop_gradient(jnp.asarray(metric))
    metric = metric.astype(jnp.promote_types(metric.dtype, jnp.float32))
    tokens = metric.shape[1]
    if grid[0] * grid[1] != tokens:
        raise ValueError(f"grid {grid} holds {grid[0] * grid[1]} tokens, got {tokens}")
    if merged < 0 or agent_merged < 0:
        raise ValueError(f"merged and agent_merged must be at least 0, got {merged} and {agent_merged}")
    counts = (grid[0] // cell[0], grid[1] // cell[1])
    corners = (np.arange(counts[0])[:, None] * cell[0] * grid[1] + np.arange(counts[1]) * cell[1]).ravel()
    destinations = jnp.asarray(corners)
    if key is not None:
        inside = jax.random.randint(key, corners.shape, 0, cell[0] * cell[1])
        destinations = destinations + inside // cell[1] * grid[1] + inside % cell[1]
    is_source = jnp.ones(tokens, bool).at[destinations].set(False)
    places = jnp.nonzero(is_source, size=tokens - len(corners))[0]

    length = jnp.linalg.norm(metric, axis=-1, keepdims=True)
    unit = metric / jnp.maximum(length, jnp.finfo(metric.dtype).tiny)
    similarity = jnp.einsum("bsc,btc->bst", unit[:, places], unit[:, destinations], precision=jax.lax.Precision.HIGHEST)
    order = jnp.argsort(-similarity.max(-1), axis=-1)
    nearest = jnp.take_along_axis(similarity.argmax(-1), order, 1)
    merged, agent_merged = min(merged, len(places)), min(agent_merged, len(places))
    has_agents = merged > 0 and 2 * (tokens - agent_merged) < tokens - merged
    return Merging(places[order], destinations, nearest, merged, agent_merged if has_agents else None)


def agent_sd_attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    agents: ArrayLike | None,
    *,
    mask: ArrayLike | None = None,
    broadcast_power: float = 0.3,
    shortcut: float = 0.075,
) -> jax.Array:
    """Attention through agents if there are few enough of them, else plain softmax attention.

    Args:
      q: queries `(B, N, H, D)`.
      k: keys `(B, M, H, D)`.
      v: values `(B, M, H, D)`.
      agents: `(B, n, H, D)`, projected like queries; they are used if 2 n < N.
      mask: `(B, M)`, which keys exist; not through agents.
      broadcast_power: γ.
      shortcut: k; 0 leaves the term out, as it must be if M differs from N.

    Returns:
      `(B, N, H, D)`.

    Raises:
      ValueError: for a mask together with agents that are used, or a shortcut where M differs from N.
    """
    q, k, v = jnp.asarray(q), jnp.asarray(k), jnp.asarray(v)
    if agents is None or 2 * jnp.shape(agents)[1] >= q.shape[1]:
        return softmax_attention(q, k, v, mask=mask)
    if mask is not None:
        raise ValueError(f"mask is not supported through agents, got {jnp.shape(mask)}")
    if shortcut and k.shape[1] != q.shape[1]:
        raise ValueError(
            f"shortcut {shortcut} adds values to queries: it needs as many keys as queries, "
            f"got {k.shape[1]} and {q.shape[1]}"
        )
    scale = q.shape[-1] ** -0.5
    y = agent_attention(q, k, v, jnp.asarray(agents), scale=scale, broadcast_scale=scale**broadcast_power)
    return y + jnp.asarray(shortcut, y.dtype) * v if shortcut else y


def _example() -> Example:
    from attnlab.interventions.examples import small_vit
    from attnlab.points import attach

    images, model = small_vit()
    return Example(attach(model, AgentSD((4, 4), ratio=0.25, agent_ratio=0.75)), (images,))


@register(
    "agent_attention.sd",
    kind=Kind.INTERVENTION,
    paper=PAPER,
    source=Source.AUTHORS_CODE,
    repository="LeapLabTHU/Agent-Attention",
    cost=Cost("O(N·n·C)", "O(N·C)"),
    summary="merges similar tokens of a trained model, and attends through a few of them as agents",
    small=_example,
)
class AgentSD(Intervention):
    """The edit of self-attention in a model of images: not causal, without rotary positions and normed queries.

    Args:
      image_grid: rows and columns of the latent image that the model denoises.
      ratio: part of the tokens that is merged away; at most 1 - 1/(cell area) has an effect.
      agent_ratio: part that is merged away for the agents.
      cell: rows and columns in which one token is a destination.
      max_downsample: layers whose grid is smaller than the image by more than this factor are left alone.
      broadcast_power: γ.
      shortcut: k.
      key: for random destinations, other ones in each layer; the upper left token of a cell when None. It has no effect
        on an odd batch, since the two halves of a batch, with and without prompt, would be merged differently.
    """

    def __init__(
        self,
        image_grid: tuple[int, int],
        *,
        ratio: float = 0.5,
        agent_ratio: float = 0.8,
        cell: tuple[int, int] = (2, 2),
        max_downsample: int = 1,
        broadcast_power: float = 0.3,
        shortcut: float = 0.075,
        key: jax.Array | None = None,
    ):
        self.image_grid, self.cell, self.max_downsample = image_grid, cell, max_downsample
        self.ratio, self.agent_ratio = ratio, agent_ratio
        self.broadcast_power, self.shortcut = broadcast_power, shortcut
        self.key = nnx.data(None) if key is None else Setting(key)

    def stream(self, x: jax.Array, at: At, memory: Any) -> tuple[jax.Array, Any]:
        if at.phase != "call":
            raise ValueError(f"AgentSD merges the tokens of an image all at once: there is no {at.phase}")
        return x, self._match(to_tokens(x), at.layer)

    def qkv(self, heads: Heads, at: At, merging: Merging | None) -> tuple[Heads, Any]:
        if merging is not None and heads.k.shape[1] != heads.q.shape[1]:
            raise ValueError(
                f"AgentSD edits self-attention; here {heads.q.shape[1]} queries have {heads.k.shape[1]} keys"
            )
        return heads, (merging, heads)

    def heads(self, y: jax.Array, at: At, memory: Any) -> tuple[jax.Array, Any]:
        merging, projected = memory
        if merging is None:
            return y, memory
        q, agents = merging.merge(projected.q)
        k, v = (merging.merge(part)[0] for part in projected[1:3])
        options = {"broadcast_power": self.broadcast_power, "shortcut": self.shortcut}
        return merging.unmerge(agent_sd_attention(q, k, v, agents, **options)), memory

    def _match(self, x: ArrayLike, layer: ArrayLike) -> Merging | None:
        """The merging for the tokens `(B, N, C)` of a layer, before the norm; None if the layer is left alone."""
        batch, tokens, _ = jnp.shape(x)
        downsample = math.ceil(math.sqrt(self.image_grid[0] * self.image_grid[1] // tokens))
        if downsample > self.max_downsample:
            return None
        return match_tokens(
            x,
            (math.ceil(self.image_grid[0] / downsample), math.ceil(self.image_grid[1] / downsample)),
            merged=int(tokens * self.ratio),
            agent_merged=int(tokens * self.agent_ratio),
            cell=self.cell,
            key=None if self.key is None or batch % 2 else jax.random.fold_in(self.key[...], layer),
        )
