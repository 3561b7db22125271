"""The convolutional block attention module, CBAM (Woo et al., 2018, arXiv:1807.06521), as a pooling.

u = x ⊙ σ(MLP(mean_n x) + MLP(max_n x))                     a gate per channel; MLP: C → C/16 → C with ReLU
z = u ⊙ σ(BatchNorm(conv([mean_c u; max_c u])))             a gate per location
y = mean_n relu(z + x)
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab.contract import Pooling, record
from attnlab.nn.linear import Conv, Linear, uniform_init
from attnlab.nn.norms import BatchNorm
from attnlab.pooling.grid import to_map, two_axes
from attnlab.pooling.parts import mean, wide
from attnlab.registry import Cost, Paper, Source, register


@register(
    "efficient_probing.cbam",
    paper=Paper("CBAM: Convolutional Block Attention Module", "Woo et al.", 2018, arxiv="1807.06521"),
    source=Source.AUTHORS_CODE,
    repository="billpsomas/efficient-probing",
    cost=Cost(time="O(N·C + N·k² + C²/16)", memory="O(N·C)"),
    summary="a gate per channel, then a gate per location from a k×k convolution; then the mean",
)
class CBAMPooling(Pooling):
    """Tokens (B, N, C) of a map to one vector (B, C). See the module docstring for the equations.

    Args:
      features: channels C of the tokens.
      hidden_features: hidden channels of the channel gate; C / 16, rounded, when None.
      kernel_size: k of the location gate, odd.
      use_bias: whether the two maps of the channel gate have a bias.
      grid: lengths of the token axes; a square map when None.
      dtype: of the computation and the result; that of the tokens when None.
      param_dtype: of the parameters.
      rngs: stream `params`.

    Raises:
      ValueError: if `kernel_size` is even, or the grid has more than two axes.
    """

    accepts = frozenset()

    def __init__(
        self,
        features: int,
        *,
        hidden_features: int | None = None,
        kernel_size: int = 7,
        use_bias: bool = False,
        grid: tuple[int, ...] | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        hidden = max(1, int(features / 16 + 0.5)) if hidden_features is None else hidden_features
        self.features = self.out_features = features
        self.grid = None if grid is None else two_axes(grid)
        self.dtype = dtype
        options = {"param_dtype": param_dtype, "rngs": rngs}

        def linear(inputs: int, outputs: int, axes: tuple[str, str]) -> Linear:
            init = uniform_init(inputs)
            return Linear(inputs, outputs, use_bias=use_bias, axes=axes, kernel_init=init, bias_init=init, **options)

        self.channel_in = linear(features, hidden, ("embed", "mlp"))
        self.channel_out = linear(hidden, features, ("mlp", "embed"))
        self.location = Conv(2, 1, (kernel_size, kernel_size), use_bias=False, axes=(None, None), **options)
        self.norm = BatchNorm(1, eps=1e-5, **options)

    def pool(self, x: jax.Array, queries: jax.Array | None, mask: jax.Array | None, deterministic: bool) -> jax.Array:
        x = to_map(x, self.grid)
        summaries = jnp.stack([mean(x, (1, 2)), x.max((1, 2))])
        channel = jax.nn.sigmoid(wide(self.channel_out(jax.nn.relu(self.channel_in(summaries)))).sum(0))
        u = x * channel[:, None, None].astype(x.dtype)
        summaries = jnp.concatenate([mean(u, -1, keepdims=True), u.max(-1, keepdims=True)], -1)
        location = jax.nn.sigmoid(wide(self.norm(self.location(summaries), deterministic=deterministic)))
        record(self, "gate", lambda: {"channel": channel, "location": location.reshape(x.shape[0], -1)})
        z = jax.nn.relu(u * location.astype(x.dtype) + x)
        return mean(z, (1, 2))
