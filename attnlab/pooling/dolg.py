"""The local branch of DOLG (Yang et al., 2021, arXiv:2108.02927), as a pooling.

    h = BatchNorm(x W_1 + b_1)
    g = softplus(relu(h) · w_2 + b_2)                a gate per token, any positive number
    y = mean_n g_n h_n / ‖h_n‖                       h/‖h‖: channels of a token on the unit sphere

With `context`, x first passes through an atrous spatial pyramid: a 1×1 and three dilated 3×3 convolutions beside the
mean of the map, concatenated, mixed and rectified.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab.contract import Pooling, record
from attnlab.nn.linear import Conv, Linear, uniform_init
from attnlab.nn.norms import BatchNorm
from attnlab.pooling.grid import to_map, two_axes
from attnlab.pooling.parts import mean, token_mean, wide
from attnlab.registry import Cost, Paper, Source, register

_ACTIVATIONS = {"relu": jax.nn.relu, "leaky_relu": jax.nn.leaky_relu}
_DILATIONS = (6, 12, 18)


def fan_out_init(outputs: int) -> nnx.Initializer:
    """Normal of variance 2 / fan_out, that of residual networks."""
    return nnx.initializers.normal((2 / outputs) ** 0.5)


class SpatialPyramid(nnx.Module):
    """Atrous spatial pyramid: maps (B, Hh, Ww, C) to maps of the same shape.

    Args:
      features: channels C.
      branch_features: channels of each of the five branches.
      param_dtype: of the parameters.
      rngs: stream `params`.
    """

    def __init__(self, features: int, *, branch_features: int, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        options = {"param_dtype": param_dtype, "rngs": rngs}
        near = {"kernel_init": fan_out_init(branch_features), "bias_init": uniform_init(features)} | options
        self.mean = Linear(features, branch_features, **near)
        self.point = Linear(features, branch_features, **near)
        self.dilated = nnx.List(
            Conv(
                features,
                branch_features,
                (3, 3),
                kernel_dilation=dilation,
                padding=[(dilation, dilation)] * 2,
                kernel_init=fan_out_init(9 * branch_features),
                bias_init=uniform_init(9 * features),
                **options,
            )
            for dilation in _DILATIONS
        )
        wide = branch_features * (2 + len(_DILATIONS))
        self.mix = Linear(wide, features, kernel_init=fan_out_init(features), bias_init=uniform_init(wide), **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        pooled = jax.nn.relu(self.mean(mean(x, (1, 2), keepdims=True)))
        branches = [self.point(x), *(conv(x) for conv in self.dilated)]
        branches = [jnp.broadcast_to(pooled, branches[0].shape), *branches]
        return jax.nn.relu(self.mix(jnp.concatenate(branches, -1)))


@register(
    "efficient_probing.dolg",
    paper=Paper(
        "DOLG: Single-Stage Image Retrieval with Deep Orthogonal Fusion of Local and Global Features",
        "Yang et al.",
        2021,
        arxiv="2108.02927",
    ),
    source=Source.AUTHORS_CODE,
    repository="billpsomas/efficient-probing",
    cost=Cost(time="O(N·C²)", memory="O(N·C)"),
    summary="mean of the tokens' directions, each gated by a softplus of its own features",
)
class DOLGPooling(Pooling):
    """Tokens (B, N, C) to one vector (B, C). See the module docstring for the equations.

    Args:
      features: channels C of the tokens.
      activation: before the gate, "relu" or "leaky_relu" (slope 0.01).
      context: whether an atrous spatial pyramid comes first.
      context_features: channels of each of its branches.
      grid: lengths of the token axes, for the pyramid; a square map when None.
      eps: of the batch normalisation.
      dtype: of the computation and the result; that of the tokens when None.
      param_dtype: of the parameters.
      rngs: stream `params`.

    Raises:
      ValueError: for an activation that is none of those named, or a grid of more than two axes.
    """

    def __init__(
        self,
        features: int,
        *,
        activation: Literal["relu", "leaky_relu"] = "relu",
        context: bool = False,
        context_features: int = 512,
        grid: tuple[int, ...] | None = None,
        eps: float = 1e-5,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if activation not in _ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(_ACTIVATIONS)}, got {activation!r}")
        self.features = self.out_features = features
        self.activation, self.dtype = activation, dtype
        self.grid = None if grid is None else two_axes(grid)
        options = {"param_dtype": param_dtype, "rngs": rngs}
        self.context = nnx.data(None)
        self.accepts = frozenset() if context else self.accepts  # its convolutions see a whole map
        if context:
            self.context = SpatialPyramid(features, branch_features=context_features, **options)
        bias = {"bias_init": uniform_init(features)} | options
        self.map = Linear(features, features, kernel_init=fan_out_init(features), **bias)
        self.norm = BatchNorm(features, eps=eps, **options)
        self.gate = Linear(features, 1, axes=("embed", None), kernel_init=fan_out_init(1), **bias)

    def pool(self, x: jax.Array, queries: jax.Array | None, mask: jax.Array | None, deterministic: bool) -> jax.Array:
        if self.context is not None:
            x = self.context(to_map(x, self.grid)).reshape(x.shape)
        h = self.norm(self.map(x), deterministic=deterministic, mask=mask)
        gate = jax.nn.softplus(wide(self.gate(_ACTIVATIONS[self.activation](h))))
        record(self, "gate", lambda: gate[..., 0])
        # max inside the root: at zero the norm itself has no gradient.
        direction = wide(h) * jax.lax.rsqrt(jnp.maximum(jnp.square(wide(h)).sum(-1, keepdims=True), 1e-24))
        return token_mean(gate * direction, mask).astype(x.dtype)
