"""SimPool (Psomas et al., 2023, arXiv:2309.06891), and its form without linear maps.

The mean token asks, the tokens answer. With x̂ = LayerNorm(x) and u = mean_n x:

    SimPool     a = softmax((u W_q)(x̂ W_k)ᵀ / √D)     y = a x̂
    ESimPool    a = softmax(x̂(u) x̂ᵀ / √D)              y = a x       the same LayerNorm on u and x; x unnormalised

With `gamma` the sum becomes a generalised mean, between average (1) and maximum (∞):

    y = (a (v - min v + 1e-6)^γ)^(1/γ)  [+ beta]

where, as in the authors' code, the minimum is over the whole batch: an example's vector then depends on the others.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab.contract import Pooling, record
from attnlab.nn.heads import split_heads
from attnlab.nn.linear import Linear, uniform_init
from attnlab.nn.norms import LayerNorm
from attnlab.nn.softmax import softmax_attention
from attnlab.pooling.parts import given_queries, head_size, token_mean, wide
from attnlab.registry import Cost, Paper, Source, register

_PAPER = Paper(
    "Keep It SimPool: Who Said Supervised Transformers Suffer from Attention Deficit?",
    "Psomas et al.",
    2023,
    arxiv="2309.06891",
)


class _SimPool(Pooling):
    """What both forms share: how values are averaged."""

    accepts = frozenset({"mask", "queries"})

    def __init__(
        self,
        features: int,
        *,
        num_heads: int,
        gamma: float | None,
        use_beta: bool,
        scale: float | None,
        dtype: Any,
        param_dtype: Any,
        rngs: nnx.Rngs,
    ):
        if use_beta and gamma is None:
            raise ValueError("use_beta shifts the generalised mean: it needs gamma")
        if gamma is not None and gamma <= 0:
            raise ValueError(f"gamma must be positive, got {gamma}")
        head_dim = head_size(features, num_heads)
        self.features = self.out_features = features
        self.num_heads, self.gamma, self.dtype = num_heads, gamma, dtype
        self.scale = head_dim**-0.5 if scale is None else scale
        self.norm = LayerNorm(features, eps=1e-6, param_dtype=param_dtype, rngs=rngs)
        self.beta = nnx.Param(jnp.zeros((1,), param_dtype), logical_axes=(None,)) if use_beta else nnx.data(None)

    def _query(self, x: jax.Array, queries: jax.Array | None, mask: jax.Array | None) -> jax.Array:
        if queries is None:
            return token_mean(x, mask, keepdims=True)
        return given_queries(queries, x, 1)

    def _average(self, q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None) -> jax.Array:
        q, k, v = (split_heads(a, self.num_heads) for a in (q, k, v))
        if self.gamma is None:
            y, weights = softmax_attention(q, k, v, mask=mask, scale=self.scale, return_weights=True)
        else:
            real = None if mask is None else mask[:, :, None, None]
            least = wide(v).min(initial=jnp.inf, where=real) if mask is not None else wide(v).min()
            lifted = wide(v) - jnp.where(jnp.isfinite(least), least, 0) + 1e-6
            lifted = lifted if real is None else jnp.where(real, lifted, 1)
            y, weights = softmax_attention(
                wide(q), wide(k), lifted**self.gamma, mask=mask, scale=self.scale, return_weights=True
            )
            # Without any token the mean is 0, where a root has no gradient.
            y = y if mask is None else jnp.where(mask.any(1)[:, None, None, None], y, 1)
            y = y ** (1 / self.gamma)
            y = (y if self.beta is None else y + self.beta[...]).astype(v.dtype)
        record(self, "attention", lambda: weights)
        return y.reshape(y.shape[0], self.out_features)


@register(
    "efficient_probing.simpool",
    paper=_PAPER,
    source=Source.AUTHORS_CODE,
    repository="billpsomas/efficient-probing",
    cost=Cost(time="O(N·C²)", memory="O(N·H)"),
    summary="the mean token attends to the tokens; values are the normalised tokens, unprojected",
)
class SimPool(_SimPool):
    """Tokens (B, N, C) to one vector (B, C). See the module docstring for the equations.

    Args:
      features: channels C of the tokens.
      num_heads: heads H.
      gamma: exponent of the generalised mean; the plain mean when None.
      use_beta: whether a learned scalar is added to the generalised mean.
      use_bias: whether the maps to query and keys have a bias.
      scale: of the scores; D^-1/2 when None.
      dtype: of the computation and the result; that of the tokens when None.
      param_dtype: of the parameters.
      rngs: stream `params`.

    Raises:
      ValueError: if the heads do not divide the channels, or `use_beta` comes without `gamma`.
    """

    def __init__(
        self,
        features: int,
        *,
        num_heads: int = 1,
        gamma: float | None = None,
        use_beta: bool = False,
        use_bias: bool = False,
        scale: float | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        super().__init__(
            features,
            num_heads=num_heads,
            gamma=gamma,
            use_beta=use_beta,
            scale=scale,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        init = uniform_init(features)
        maps = {"use_bias": use_bias, "axes": ("embed", "heads"), "kernel_init": init, "bias_init": init}
        self.q = Linear(features, features, **maps, param_dtype=param_dtype, rngs=rngs)
        self.k = Linear(features, features, **maps, param_dtype=param_dtype, rngs=rngs)

    def pool(self, x: jax.Array, queries: jax.Array | None, mask: jax.Array | None, deterministic: bool) -> jax.Array:
        """Pools. `queries` (B, 1, C), for example class tokens, stand in for the mean token."""
        normed = self.norm(x)
        return self._average(self.q(self._query(x, queries, mask)), self.k(normed), normed, mask)


@register(
    "efficient_probing.esimpool",
    paper=_PAPER,
    source=Source.AUTHORS_CODE,
    repository="billpsomas/efficient-probing",
    cost=Cost(time="O(N·C)", memory="O(N·H)"),
    summary="SimPool without linear maps: one layer norm is all its parameters",
)
class ESimPool(_SimPool):
    """Tokens (B, N, C) to one vector (B, C). See the module docstring for the equations.

    Args:
      features: channels C of the tokens.
      num_heads: heads H.
      gamma: exponent of the generalised mean; the plain mean when None.
      use_beta: whether a learned scalar is added to the generalised mean.
      scale: of the scores; D^-1/2 when None.
      dtype: of the computation and the result; that of the tokens when None.
      param_dtype: of the parameters.
      rngs: stream `params`.

    Raises:
      ValueError: if the heads do not divide the channels, or `use_beta` comes without `gamma`.
    """

    def __init__(
        self,
        features: int,
        *,
        num_heads: int = 12,
        gamma: float | None = None,
        use_beta: bool = False,
        scale: float | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        super().__init__(
            features,
            num_heads=num_heads,
            gamma=gamma,
            use_beta=use_beta,
            scale=scale,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )

    def pool(self, x: jax.Array, queries: jax.Array | None, mask: jax.Array | None, deterministic: bool) -> jax.Array:
        """Pools. `queries` (B, 1, C), for example class tokens, stand in for the mean token."""
        return self._average(self.norm(self._query(x, queries, mask)), self.norm(x), x, mask)
