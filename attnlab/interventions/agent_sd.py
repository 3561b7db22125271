"""AgentSD: agent attention in a trained diffusion model, without training (Han et al., arXiv:2312.08874).

Two edits of the self-attention of Stable Diffusion. First, similar tokens are merged (as in ToMe for Stable Diffusion,
Bolya and Hoffman, arXiv:2303.17604), at two rates: the attention runs on the tokens that remain at the lower rate, the
few that remain at the higher rate are its agents (`nn.token_merging.match_cells`). Second, with the trained
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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from attnlab.attention.linear.agent_attention import PAPER, agent_attention
from attnlab.nn.dense_mixer import Heads
from attnlab.nn.grids import to_tokens
from attnlab.nn.softmax import softmax_attention
from attnlab.nn.token_merging import Merging, match_cells
from attnlab.points import At, Intervention, Setting
from attnlab.registry import Cost, Example, Kind, Source, register


class AgentMerging(NamedTuple):
    """Which tokens are merged into which, at two rates.

    Attributes:
      tokens: the merging at the lower rate.
      agents: that at the higher rate; None if there are no agents.
    """

    tokens: Merging
    agents: Merging | None

    def merge(self, x: ArrayLike) -> tuple[jax.Array, jax.Array | None]:
        """Tokens `(B, N, ...)` to the merged ones and to the agents, None if there are none."""
        return self.tokens.merge(x), None if self.agents is None else self.agents.merge(x)

    def unmerge(self, y: ArrayLike) -> jax.Array:
        """Merged tokens to all of them `(B, N, ...)`, sources as their destinations."""
        return self.tokens.unmerge(y)


def match_tokens(
    metric: ArrayLike,
    grid: tuple[int, int],
    *,
    merged: int,
    agent_merged: int,
    cell: tuple[int, int] = (2, 2),
    key: jax.Array | None = None,
) -> AgentMerging:
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
    if agent_merged < 0:
        raise ValueError(f"agent_merged must be at least 0, got {agent_merged}")
    tokens = match_cells(metric, grid, merged, cell=cell, key=key)
    agent_merged, count = min(agent_merged, tokens.sources.shape[1]), jnp.shape(metric)[1]
    has_agents = tokens.merged > 0 and 2 * (count - agent_merged) < count - tokens.merged
    return AgentMerging(tokens, dataclasses.replace(tokens, merged=agent_merged) if has_agents else None)


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

    def qkv(self, heads: Heads, at: At, merging: AgentMerging | None) -> tuple[Heads, Any]:
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

    def _match(self, x: ArrayLike, layer: ArrayLike) -> AgentMerging | None:
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
