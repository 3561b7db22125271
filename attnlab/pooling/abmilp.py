"""Attention-based multiple-instance pooling (Ilse et al., 2018, arXiv:1802.04712), as the probe ABMILP.

    a = softmax_n(MLP(x_n))          a score per token: Linear, tanh or ReLU, …, Linear to 1
    y = Σ_n a_n x_n

Przewięźlikowski et al. (2024, arXiv:2412.03215) let the tokens exchange words first: with `self_attention="map"` the
scores, with "both" also the averaged tokens, are read from a one-head self-attention of x (then O(N²)).
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attnlab.contract import Pooling, record
from attnlab.nn.cross_attention import CrossAttention
from attnlab.nn.linear import Linear, uniform_init
from attnlab.nn.masking import masked_softmax
from attnlab.pooling.grid import two_axes
from attnlab.pooling.parts import wide
from attnlab.registry import Cost, Paper, Source, register

_ACTIVATIONS = {"tanh": jnp.tanh, "relu": jax.nn.relu}


@register(
    "efficient_probing.abmilp",
    paper=Paper("Attention-based Deep Multiple Instance Learning", "Ilse et al.", 2018, arxiv="1802.04712"),
    source=Source.AUTHORS_CODE,
    repository="billpsomas/efficient-probing",
    cost=Cost(time="O(N·C²)", memory="O(N)"),
    summary="a small network scores each token; the scores' softmax weighs the raw tokens",
)
class ABMILPPooling(Pooling):
    """Tokens (B, N, C) to one vector (B, C). See the module docstring for the equations.

    Args:
      features: channels C of the tokens.
      depth: linear layers of the scoring network.
      activation: between them, "tanh" or "relu".
      self_attention: what reads a self-attention of the tokens: "none", "map" (the scores) or "both" (also the sum).
      drop_first: whether the first token, a class token, is left out of everything.
      positions: whether sine-cosine positions are added to what the scoring network reads.
      grid: lengths (Hh, Ww) of the token axes, needed with `positions`.
      dtype: of the computation and the result; that of the tokens when None.
      param_dtype: of the parameters.
      rngs: stream `params`.

    Raises:
      ValueError: if an option is none of those named, or `positions` comes without a grid, or with channels that four
        does not divide.
    """

    def __init__(
        self,
        features: int,
        *,
        depth: int = 2,
        activation: Literal["tanh", "relu"] = "tanh",
        self_attention: Literal["none", "map", "both"] = "none",
        drop_first: bool = False,
        positions: bool = False,
        grid: tuple[int, ...] | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if activation not in _ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(_ACTIVATIONS)}, got {activation!r}")
        if self_attention not in ("none", "map", "both"):
            raise ValueError(f"self_attention must be 'none', 'map' or 'both', got {self_attention!r}")
        if depth < 1:
            raise ValueError(f"depth must be at least 1, got {depth}")
        if positions and grid is None:
            raise ValueError("positions need the grid of the tokens")
        if positions and features % 4:
            raise ValueError(f"positions need features that 4 divides, got {features}")
        self.features = self.out_features = features
        self.activation, self.self_attention, self.drop_first = activation, self_attention, drop_first
        self.grid = two_axes(grid) if positions else None
        self.dtype = dtype
        init = uniform_init(features)
        options = {"param_dtype": param_dtype, "rngs": rngs}
        self.attention = nnx.data(None)
        if self_attention != "none":
            self.attention = CrossAttention(features, num_heads=1, use_bias=False, kernel_init=init, **options)
        self.layers = nnx.List(
            Linear(
                features,
                features if i + 1 < depth else 1,
                axes=("embed", "mlp" if i + 1 < depth else None),
                kernel_init=init,
                bias_init=init,
                **options,
            )
            for i in range(depth)
        )

    def pool(self, x: jax.Array, queries: jax.Array | None, mask: jax.Array | None, deterministic: bool) -> jax.Array:
        if self.drop_first:
            if x.shape[1] == 1:
                raise ValueError(f"drop_first leaves no token of x of shape {x.shape}")
            x, mask = x[:, 1:], None if mask is None else mask[:, 1:]
        mixed = x if self.attention is None else self.attention.with_weights(x, x, mask=mask)[0]
        read = mixed if self.grid is None else mixed + self._positions(x)
        for layer in self.layers[:-1]:
            read = _ACTIVATIONS[self.activation](layer(read))
        scores = wide(self.layers[-1](read))
        weights = masked_softmax(scores, None if mask is None else mask[..., None], axis=1)
        record(self, "attention", lambda: weights.swapaxes(1, 2)[:, None])
        summed = mixed if self.self_attention == "both" else x
        return jnp.einsum(
            "bn,bnc->bc", weights[..., 0].astype(x.dtype), summed, preferred_element_type=jnp.float32
        ).astype(x.dtype)

    def _positions(self, x: jax.Array) -> jax.Array:
        """The table for the tokens of `x`, (N, C); a class token before the grid has zeros."""
        table = sine_cosine_table(self.grid, self.features)
        if not self.drop_first:
            table = np.concatenate([np.zeros_like(table[:1]), table])
        if x.shape[1] != len(table):
            raise ValueError(
                f"positions are those of {len(table)} tokens ({self.grid[0]}×{self.grid[1]}"
                f"{'' if self.drop_first else ' and a class token'}), got {x.shape[1]}"
            )
        return jnp.asarray(table, x.dtype)


def sine_cosine_table(grid: tuple[int, int], features: int) -> np.ndarray:
    """(Hh·Ww, C): [sin(w ω), cos(w ω), sin(h ω), cos(h ω)], ω = 10000^(-4i/C), the column's half first."""
    rows, columns = np.meshgrid(np.arange(grid[0]), np.arange(grid[1]), indexing="ij")
    frequency = 10000.0 ** (-np.arange(features // 4) / (features / 4))
    angles = [position.reshape(-1, 1) * frequency for position in (columns, rows)]
    return np.concatenate([f(a) for a in angles for f in (np.sin, np.cos)], axis=1)
