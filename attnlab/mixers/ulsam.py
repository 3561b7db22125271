"""ULSAM, ultra-lightweight subspace attention (Saini et al., WACV 2020, arXiv:2006.15102; code: Nandan91/ULSAM).

Channels are cut into g contiguous subspaces of G = C / g channels; each has one map over all N positions:

    a = relu(BN(α ⊙ x + β))             per channel
    b = max of a over 3 tokens on a side, stride 1
    A = softmax over positions of relu(BN(b · w + β'))       one map of the subspace, in float32
    y = A x + x

The authors' code has the batch norms and activations, which the paper does not mention: logits are at least 0, and a
map of zeros attends uniformly. Their norms keep a tenth of the old running statistics in every step. A is of the order
of 1 / N: the module is close to the identity, with small gradients of its own. It keeps its input, and so stands where
a block has a mixer and a residual of its own. Cost O(N·C). The paper's hosts are in `attnlab.models.mobilenet`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab.contract import Given, Layout, TokenMixer, record
from attnlab.nn.linear import uniform_init
from attnlab.nn.mlp import LayerScale
from attnlab.nn.norms import BatchNorm
from attnlab.nn.resampling import max_pool
from attnlab.registry import Cost, Paper, Source, register
from pallas_kernels.dtypes import at_least_float32

PAPER = Paper(
    "ULSAM: Ultra-Lightweight Subspace Attention Module for Compact Convolutional Neural Networks",
    "Saini et al.",
    2020,
    arxiv="2006.15102",
    number=68,
)


@register(
    "ulsam",
    paper=PAPER,
    source=Source.AUTHORS_CODE,
    repository="Nandan91/ULSAM",
    cost=Cost(time="O(N·C)", memory="O(N·C)"),
    summary="groups of channels, each weighed by one softmax map over all positions, beside what came",
)
class SubspaceAttention(TokenMixer):
    """Tokens of any layout to the same shape. See the module docstring for the equations.

    Args:
      features: channels C.
      groups: subspaces g, a divisor of C.
      layout: of the tokens.
      dtype: of the computation and the result; that of the tokens when None.
      param_dtype: of the parameters.
      rngs: stream `params`.

    Raises:
      ValueError: if the subspaces do not divide the channels.
    """

    layouts = frozenset(Layout)

    def __init__(
        self,
        features: int,
        *,
        groups: int = 4,
        layout: Layout = Layout.IMAGE,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if groups < 1 or features % groups:
            raise ValueError(f"groups must divide the {features} channels, got {groups}")
        self.features, self.groups, self.layout, self.dtype = features, groups, Layout(layout), dtype
        stored, size = {"param_dtype": param_dtype, "rngs": rngs}, features // groups
        self.local = LayerScale(features, use_bias=True, **stored)
        self.local_norm = BatchNorm(features, momentum=0.1, **stored)
        self.point = nnx.Param(uniform_init(size)(rngs.params(), (groups, size), param_dtype), weight_decay=True)
        self.point_bias = nnx.Param(uniform_init(size)(rngs.params(), (groups,), param_dtype))
        self.point_norm = BatchNorm(groups, momentum=0.1, **stored)
        for part in (self.local.scale, self.local.bias):
            part[...] = uniform_init(1)(rngs.params(), (features,), param_dtype)

    def mix(self, x: jax.Array, given: Given) -> jax.Array:
        told = {"deterministic": given.deterministic}
        normed = self.local_norm(self.local(x)) if given.deterministic else self._trained(x)
        a = max_pool(jax.nn.relu(normed), 3, stride=1, padding=1)
        point, bias = (part[...].astype(x.dtype) for part in (self.point, self.point_bias))
        logits = jnp.einsum("...gc,gc->...g", a.reshape(*a.shape[:-1], self.groups, -1), point) + bias
        logits = jax.nn.relu(self.point_norm(logits, **told)).astype(at_least_float32(x.dtype))
        weights = jax.nn.softmax(logits, axis=range(1, x.ndim - 1))
        record(self, "gate", lambda: weights)
        return x + x * jnp.repeat(weights.astype(x.dtype), x.shape[-1] // self.groups, axis=-1)

    def _trained(self, x: jax.Array) -> jax.Array:
        """BN(α ⊙ x + β) by the batch's statistics, and these kept.

        But for the norm's ε the batch takes α's size out again: its gradient is the difference of two sums a hundred
        thousand times as large, of which float32 leaves nothing. In α / √(α² var + ε) = ±1 / √(var + ε / α²) it is not.
        """
        norm, axes = self.local_norm, tuple(range(x.ndim - 1))
        wide = x.astype(at_least_float32(x.dtype))
        scale, bias = (part[...].astype(wide.dtype) for part in (self.local.scale, self.local.bias))
        mean = wide.mean(axes)
        centred = wide - mean
        var = jnp.square(centred).mean(axes)
        norm.keep(scale * mean + bias, jnp.square(scale) * var, x.size // x.shape[-1])
        there = jnp.abs(scale) > 1e-12
        safe = jnp.where(there, scale, 1)
        gain = jnp.where(there, jnp.sign(safe) * jax.lax.rsqrt(var + norm.epsilon / jnp.square(safe)), 0)
        return (centred * (gain * norm.scale[...]) + norm.bias[...]).astype(x.dtype)
