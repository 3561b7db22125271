"""Efficient probing (Psomas et al., 2025, arXiv:2506.10178), code at billpsomas/efficient-probing.

Attentive pooling in which learned queries read the raw tokens and each query owns a slice of the values:

    a   = softmax_n(q xᵀ / √C)                 (B, Q, N)    weights, over tokens
    y_j = a_j · (x W_v)[slice j],  j = 1..Q    (B, C')      slices concatenated

Keys are the tokens themselves, and there is no output projection: Q·C + C·C' weights, against more than 2C² of a
multi-head pooling. The scale uses all C channels, not the C/Q of a slice.

The published code projects every token and then pools, O(N·Q·C + N·C·C'). Here the tokens are pooled first and each
query projects its own pool: equal, since each row of `a` sums to 1 (so the bias may be added last), and
O(N·Q·C + C·C').
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from attnlab.contract import Pooling, Site, record
from attnlab.nn.linear import Linear, uniform_init
from attnlab.nn.masking import masked_softmax
from attnlab.pooling.parts import given_queries
from attnlab.registry import Cost, Paper, Source, register
from pallas_kernels.dtypes import at_least_float32


def _accumulator(x: ArrayLike) -> jnp.dtype:
    return at_least_float32(x.dtype)


def probing_weights(
    x: ArrayLike, queries: ArrayLike, scale: float | None = None, *, mask: ArrayLike | None = None
) -> jax.Array:
    """softmax over the tokens of `scale` · q xᵀ, (B, Q, N) in float32.

    Args:
      x: tokens, (B, N, C).
      queries: (Q, C) learned, or (B, Q, C) one set per example.
      scale: of the scores; C^-1/2 when None.
      mask: (B, N) boolean, which tokens exist; a row without any has zeros.
    """
    scores = jnp.einsum("...qc,...nc->...qn", queries, x, preferred_element_type=_accumulator(x))
    scores = scores * (queries.shape[-1] ** -0.5 if scale is None else scale)
    return masked_softmax(scores, None if mask is None else mask[:, None])


def efficient_probing(
    x: ArrayLike,
    queries: ArrayLike,
    value: ArrayLike,
    value_bias: ArrayLike | None = None,
    *,
    scale: float | None = None,
    mask: ArrayLike | None = None,
) -> jax.Array:
    """Pool tokens with shared keys; the operator of `EfficientProbing`.

    Args:
      x: tokens, (B, N, C).
      queries: (Q, C) learned, or (B, Q, C) one set per example.
      value: value projection, (C, C'), C' a multiple of Q.
      value_bias: (C',) or None.
      scale: of the scores; C^-1/2 when None.
      mask: (B, N) boolean, which tokens exist.

    Returns:
      (B, C'), in the dtype of `x`; weights are computed in float32.

    Raises:
      ValueError: if C' is not a multiple of Q.
    """
    (num_queries, channels), width = queries.shape[-2:], value.shape[1]
    if width % num_queries:
        raise ValueError(f"value width {width} is not a multiple of the number of queries {num_queries}")
    weights = probing_weights(x, queries, scale, mask=mask).astype(x.dtype)
    pooled = jnp.einsum("bqn,bnc->bqc", weights, x, preferred_element_type=_accumulator(x))
    slices = value.reshape(channels, num_queries, width // num_queries)
    y = jnp.einsum("bqc,cqd->bqd", pooled, slices.astype(pooled.dtype)).reshape(x.shape[0], width)
    return (y if value_bias is None else y + value_bias).astype(x.dtype)


@register(
    "efficient_probing",
    paper=Paper(
        "Attention, Please! Revisiting Attentive Probing Through the Lens of Efficiency",
        "Psomas et al.",
        2025,
        arxiv="2506.10178",
        number=103,
    ),
    source=Source.AUTHORS_CODE,
    repository="billpsomas/efficient-probing",
    cost=Cost(time="O(N·Q·C + C·C')", memory="O(N·Q)"),
    summary="Q learned queries read the raw tokens; each owns a slice of one value projection",
)
class EfficientProbing(Pooling):
    """Tokens (B, N, C) to one vector (B, C'). See the module docstring for the equations.

    Args:
      features: channels C of the tokens.
      num_queries: learned queries Q; they divide C'.
      out_features: C'; C when None.
      use_bias: whether the value projection has a bias.
      scale: of the scores; C^-1/2 when None.
      dtype: of the computation and the result; that of the tokens when None.
      param_dtype: of the parameters.
      rngs: stream `params`.

    Raises:
      ValueError: if `num_queries` does not divide `out_features`.
    """

    accepts = frozenset({"mask", "queries"})

    def __init__(
        self,
        features: int,
        *,
        num_queries: int = 32,
        out_features: int | None = None,
        use_bias: bool = False,
        scale: float | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        out_features = features if out_features is None else out_features
        if out_features % num_queries:
            raise ValueError(f"num_queries must divide out_features {out_features}, got {num_queries}")
        self.features, self.out_features, self.num_queries = features, out_features, num_queries
        self.scale, self.dtype = scale, dtype
        self.queries = nnx.Param(
            0.02 * jax.random.normal(rngs.params(), (num_queries, features), param_dtype), logical_axes=(None, "embed")
        )
        init = uniform_init(features)
        self.value = Linear(
            features,
            out_features,
            use_bias=use_bias,
            kernel_init=init,
            bias_init=init,
            param_dtype=param_dtype,
            rngs=rngs,
        )

    @classmethod
    def site_defaults(cls, site: Site) -> dict[str, Any]:
        return {"num_queries": max(q for q in range(1, min(32, site.features) + 1) if site.features % q == 0)}

    def pool_branches(
        self, x: jax.Array, queries: jax.Array | None, mask: jax.Array | None, deterministic: bool
    ) -> jax.Array:
        """Pools. `queries` (B, Q, C) of the caller, for example class tokens, stand in for the learned ones."""
        if queries is None:
            queries = self.queries[...].astype(x.dtype)
        else:
            queries = given_queries(queries, x, self.num_queries)
        record(self, "attention", lambda: probing_weights(x, queries, self.scale, mask=mask)[:, None])
        kernel = self.value.kernel[...].astype(x.dtype)
        bias = None if self.value.bias is None else self.value.bias[...]
        y = efficient_probing(x, queries, kernel, bias, scale=self.scale, mask=mask)
        return y.reshape(y.shape[0], self.num_queries, -1)
