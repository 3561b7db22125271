"""A transformer of the nodes of a graph that scores pairs of them by their distance.

Every node has an embedding; blocks mix all nodes as a set; two nodes are linked with the log-odds

    s(u, v) = margin - exp(log_scale) |x_u - x_v|²

The links themselves are not shown to it: it learns them. For `attnlab.tasks.link_prediction`.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from attnlab.attention.dense.cat_curvature import PAPER
from attnlab.contract import Site
from attnlab.models.block import MixerNames, blocks_for
from attnlab.nn.norms import LayerNorm
from attnlab.registry import Cost, Example, Kind, Source, register


@register(
    "cat_curvature.link_predictor",
    kind=Kind.MODULE,
    paper=PAPER,
    source=Source.ABSTRACT_ONLY,
    cost=Cost(time="O(V²·C)", memory="O(V²·H)"),
    summary="embeddings of the nodes of a graph through blocks of any mixer; links by distance",
    small=lambda: Example(
        LinkPredictor(5, features=8, depth=1, num_heads=2, rngs=nnx.Rngs(0)),
        (jnp.asarray([[0, 1], [3, 2], [4, 4]]),),
        differentiable=(),
    ),
)
class LinkPredictor(nnx.Module):
    """Pairs of nodes to the log-odds of a link.

    Args:
      num_nodes: V.
      features: channels C.
      depth: blocks.
      num_heads: heads of each mixer.
      mixer: name of a registered mixer, or a pattern repeated over the depth.
      mixer_options: constructor options by mixer name.
      mlp_ratio: hidden channels of feed-forwards over channels.
      dtype: of the computation; that of the parameters when None.
      param_dtype: of the parameters.
      rngs: stream `params`, and `dropout` if there is any.
    """

    def __init__(
        self,
        num_nodes: int,
        *,
        features: int = 16,
        depth: int = 2,
        num_heads: int = 2,
        mixer: MixerNames = "cat_curvature",
        mixer_options: Mapping[str, Mapping[str, Any]] | None = None,
        mlp_ratio: float = 4.0,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.dtype = dtype
        table = jax.random.normal(rngs.params(), (num_nodes, features), param_dtype)
        self.nodes = nnx.Param(table, logical_axes=("vocab", "embed"))
        common = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        site = Site(features, num_heads, num_layers=depth)
        options = {"mixer": mixer, "mixer_options": mixer_options, "mlp_ratio": mlp_ratio}
        self.blocks = nnx.List(blocks_for(site, depth, **options, **common))
        self.norm = LayerNorm(features, param_dtype=param_dtype, rngs=rngs)
        self.margin, self.log_scale = (nnx.Param(jnp.asarray(start, param_dtype)) for start in (2.0, -2.0))

    def states(self, *, deterministic: bool = True) -> jax.Array:
        """What the blocks make of all nodes, `(V, C)`."""
        x = jnp.asarray(self.nodes[...], self.dtype)[None]
        for block in self.blocks:
            x = block(x, deterministic=deterministic)
        return self.norm(x)[0]

    def scores(self, *, deterministic: bool = True) -> jax.Array:
        """The log-odds of all pairs, `(V, V)` float32."""
        x = self.states(deterministic=deterministic).astype(jnp.float32)
        squares = jnp.square(x).sum(-1)
        apart = squares[:, None] + squares - 2 * jnp.matmul(x, x.T, precision="highest")
        return self.margin[...].astype(jnp.float32) - jnp.exp(self.log_scale[...].astype(jnp.float32)) * apart

    def __call__(self, pairs: ArrayLike, *, deterministic: bool = True) -> jax.Array:
        """Pairs `(B, 2)` of nodes to their log-odds `(B,)` float32."""
        pairs = jnp.asarray(pairs)
        return self.scores(deterministic=deterministic)[pairs[:, 0], pairs[:, 1]]
