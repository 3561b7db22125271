"""AgentSD: agent attention in a trained diffusion model, without training (Han et al., arXiv:2312.08874).

Two edits of the self-attention of Stable Diffusion. First, similar tokens are merged (as in ToMe for Stable Diffusion,
Bolya and Hoffman, arXiv:2303.17604), at two rates: the attention runs on the tokens that remain at the lower rate, the
few that remain at the higher rate are its agents. Of each cell of the grid one token is a destination and the others
are sources; the sources most similar (by cosine) to any destination are averaged into it. Second, with the trained
projections, D the head size, and agents A projected like queries,

    Y = softmax(D^{-γ/2} Q Aᵀ) softmax(D^{-1/2} A Kᵀ) V + k V,    γ = 0.3, k = 0.075

if there are fewer than half as many agents as tokens; else plain softmax attention. Afterwards each merged source gets
the value of its destination. In use:

    merging = AgentSD().match(x, image_grid, key=key)         # None in layers that are left alone
    tokens, agents = merging.merge(norm(x))
    x = x + merging.unmerge(attention(tokens, agents=agents))

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

from attnlab.attention.linear.agent_attention import agent_attention
from attnlab.nn.linear import Linear
from attnlab.nn.softmax import softmax_attention


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
        """Tokens `(B, N, C)` to the merged ones `(B, N - merged, C)` and to the agents, None if there are none.

        The sources that remain come first, then the destinations.
        """
        x = jnp.asarray(x)
        agents = None if self.agent_merged is None else self._merge(x, self.agent_merged)
        return self._merge(x, self.merged), agents

    def unmerge(self, y: ArrayLike) -> jax.Array:
        """Merged tokens `(B, N - merged, C)` to all of them `(B, N, C)`, sources as their destinations."""
        y = jnp.asarray(y)
        kept = self.sources.shape[1] - self.merged
        destinations = y[:, kept:]
        copies = jnp.take_along_axis(destinations, self.nearest[:, : self.merged, None], 1)
        whole = jnp.concatenate([copies, y[:, :kept], destinations], 1)
        places = jnp.broadcast_to(self.destinations, (y.shape[0], self.destinations.shape[0]))
        places = jnp.concatenate([self.sources, places], 1)
        return jnp.zeros_like(whole).at[jnp.arange(y.shape[0])[:, None], places].set(whole)

    def _merge(self, x: jax.Array, count: int) -> jax.Array:
        sources = jnp.take_along_axis(x, self.sources[..., None], 1)
        wide = jnp.promote_types(x.dtype, jnp.float32)
        batch, into = jnp.arange(x.shape[0])[:, None], self.nearest[:, :count]
        total = x[:, self.destinations].astype(wide).at[batch, into].add(sources[:, :count].astype(wide))
        members = jnp.ones(total.shape[:2], wide).at[batch, into].add(1)
        return jnp.concatenate([sources[:, count:], (total / members[..., None]).astype(x.dtype)], 1)


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


@dataclasses.dataclass(frozen=True)
class AgentSD:
    """The settings of the edit.

    Attributes:
      ratio: part of the tokens that is merged away; at most 1 - 1/(cell area) has an effect.
      agent_ratio: part that is merged away for the agents.
      cell: rows and columns in which one token is a destination.
      max_downsample: layers whose grid is smaller than the image by more than this factor are left alone.
    """

    ratio: float = 0.5
    agent_ratio: float = 0.8
    cell: tuple[int, int] = (2, 2)
    max_downsample: int = 1

    def match(self, x: ArrayLike, image_grid: tuple[int, int], *, key: jax.Array | None = None) -> Merging | None:
        """The merging for the tokens `(B, N, C)` of a layer, None if the layer is left alone.

        Args:
          x: tokens before the norm.
          image_grid: rows and columns of the latent image that the model denoises.
          key: for random destinations. With an odd batch there must be none, since the two halves of a batch, with
            and without prompt, would be merged differently.
        """
        batch, tokens, _ = jnp.shape(x)
        downsample = math.ceil(math.sqrt(image_grid[0] * image_grid[1] // tokens))
        if downsample > self.max_downsample:
            return None
        return match_tokens(
            x,
            (math.ceil(image_grid[0] / downsample), math.ceil(image_grid[1] / downsample)),
            merged=int(tokens * self.ratio),
            agent_merged=int(tokens * self.agent_ratio),
            cell=self.cell,
            key=None if batch % 2 else key,
        )


class AgentSDAttention(nnx.Module):
    """The attention of Stable Diffusion's blocks, that takes agents.

    Args:
      features: channels C.
      num_heads: H.
      head_size: D.
      context_features: channels of the context of cross-attention, C when None.
      broadcast_power: γ.
      shortcut: k; 0 leaves the term out, as it must be with a context of another length.
      dtype: of the computation and the result; that of the input when None.
      param_dtype: of the parameters.
      rngs: stream `params`.
    """

    def __init__(
        self,
        features: int,
        *,
        num_heads: int = 8,
        head_size: int = 64,
        context_features: int | None = None,
        broadcast_power: float = 0.3,
        shortcut: float = 0.075,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        context_features = features if context_features is None else context_features
        inner = num_heads * head_size
        self.num_heads, self.broadcast_power, self.shortcut = num_heads, broadcast_power, shortcut
        common = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        heads = {"use_bias": False, "axes": ("embed", "heads")} | common
        self.query = Linear(features, inner, **heads)
        self.key = Linear(context_features, inner, **heads)
        self.value = Linear(context_features, inner, **heads)
        self.projection = Linear(inner, features, axes=("heads", "embed"), **common)

    def __call__(
        self,
        x: ArrayLike,
        context: ArrayLike | None = None,
        *,
        agents: ArrayLike | None = None,
        mask: ArrayLike | None = None,
    ) -> jax.Array:
        """Attends, through agents if there are few enough of them.

        Args:
          x: tokens `(B, N, C)`.
          context: `(B, M, C')` for cross-attention.
          agents: tokens `(B, n, C)`; they are used if 2 n < N.
          mask: `(B, M)`, which keys exist; not through agents.

        Returns:
          `(B, N, C)`.

        Raises:
          ValueError: for a mask together with agents that are used, or a shortcut where M differs from N.
        """
        x = jnp.asarray(x)
        source = x if context is None else jnp.asarray(context)
        q, k, v = self._heads(self.query(x)), self._heads(self.key(source)), self._heads(self.value(source))
        if agents is not None and 2 * jnp.shape(agents)[1] < x.shape[1]:
            if mask is not None:
                raise ValueError(f"mask is not supported through agents, got {jnp.shape(mask)}")
            y = self._through_agents(q, k, v, self._heads(self.query(agents)))
        else:
            y = softmax_attention(q, k, v, mask=mask)
        return self.projection(y.reshape(*x.shape[:2], -1))

    def _through_agents(self, q: jax.Array, k: jax.Array, v: jax.Array, agents: jax.Array) -> jax.Array:
        if self.shortcut and k.shape[1] != q.shape[1]:
            raise ValueError(
                f"shortcut {self.shortcut} adds values to queries: it needs as many keys as queries, "
                f"got {k.shape[1]} and {q.shape[1]}"
            )
        scale = q.shape[-1] ** -0.5
        y = agent_attention(q, k, v, agents, scale=scale, broadcast_scale=scale**self.broadcast_power)
        return y + jnp.asarray(self.shortcut, y.dtype) * v if self.shortcut else y

    def _heads(self, x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:2], self.num_heads, -1)
