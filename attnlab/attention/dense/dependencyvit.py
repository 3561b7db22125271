"""Reversed attention: children choose their parents and send to them (CVPR 2023, arXiv:2304.03282).

Every token i, a child, shares out one unit over its parents j; parents add up what they are sent. Two things decide how
much: P, which of its heads a child sends by, and m, whether it sends at all, a product over all layers so far:

    F = softmax_j(q_i·k_j / √D);     P_i = softmax_heads(W_p x_i / 0.1);     m_i ← m_i σ(w GELU(W_m x_i))
    R_ji = F_ij P_i m_i              reversed attention of parent j to child i, in each head
    y_j = W_o concat_h(Σ_i R_ji v_i)

Rows of R do not sum to 1; a child's column sums to P_i m_i in a head, to m_i over all. The dependency mask is Σ_h R, a
child's parent the largest entry of its column. Checked against the implementation of a third party
(fffffgggg54/pytorch-image-models, branch dependencyvit), since the authors' code was not published; that the maps of P
and m have no biases is that party's reading. `attnlab.models.dependencyvit` is built of it.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from attnlab.contract import record
from attnlab.nn.dense_mixer import Heads
from attnlab.nn.heads import FromHeads, ToHeads
from attnlab.nn.linear import Linear
from attnlab.nn.mlp import MLP
from attnlab.nn.norms import LayerNorm
from attnlab.nn.two_way_attention import TwoWayAttention, two_way_attention
from attnlab.points import Edits, acts, visit
from attnlab.registry import Cost, Example, Kind, Paper, Source, register
from pallas_kernels.dtypes import at_least_float32

PAPER = Paper(
    "Visual Dependency Transformers: Dependency Tree Emerges from Reversed Attention",
    "Ding et al.",
    2023,
    arxiv="2304.03282",
    number=85,
)
SOURCE = {"paper": PAPER, "source": Source.THIRD_PARTY, "repository": "fffffgggg54/pytorch-image-models"}
COST = Cost(time="O(N²·H·D)", memory="O(N²·H), with kernel O(N·H·D)")
TEMPERATURE = 0.1


class Dependent(NamedTuple):
    """Tokens and how much each of them still sends.

    Attributes:
      tokens: `(B, N, C)`.
      message: m `(B, N)`, float32 or wider.
    """

    tokens: jax.Array
    message: jax.Array


def reversed_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, gate: ArrayLike, *, kernel: str | None = None
) -> jax.Array:
    """Σ_i softmax_j(q_i·k_j / √D)_ij gate_i v_i: what parents j are sent.

    Args:
      q: children's queries `(B, N, H, D)`.
      k: parents' keys `(B, N, H, D)`.
      v: children's values `(B, N, H, E)`.
      gate: P m, `(B, N, H)`.
      kernel: "auto" or the name of an implementation of `pallas_kernels.block_sparse_attention`; dense when None.

    Returns:
      `(B, N, H, E)` in the dtype of the values.
    """
    return two_way_attention(q, k, v, kernel=kernel)[1].back(_gated(v, gate))


def _gated(v: jax.Array, gate: ArrayLike) -> jax.Array:
    wide = at_least_float32(v.dtype)
    return (v.astype(wide) * jnp.asarray(gate, wide)[..., None]).astype(v.dtype)


def parents(dependency_mask: ArrayLike) -> jax.Array:
    """The parent of each child, `(B, N)` int32, from a dependency mask `(B, N parents, N children)`."""
    return jnp.argmax(jnp.asarray(dependency_mask), axis=1).astype(jnp.int32)


def _example() -> Example:
    keys = jax.random.split(jax.random.key(0), 2)
    x, message = jax.random.normal(keys[0], (2, 5, 8)), jax.random.uniform(keys[1], (2, 5))
    return Example(ReversedAttention(8, num_heads=2, rngs=nnx.Rngs(0)), (x, message), {}, (0, 1), (0, 1))


@register(
    "dependencyvit",
    kind=Kind.MODULE,
    cost=COST,
    kernel="block_sparse_attention",
    summary="children send to the parents that they attend to, by one of their heads and as much as they still may",
    small=_example,
    **SOURCE,
)
class ReversedAttention(nnx.Module):
    """Tokens `(B, N, C)` and their messages `(B, N)` to the same; see the module docstring for the equations.

    Args:
      features: channels C.
      num_heads: heads H.
      qkv_bias: whether queries, keys and values have a bias.
      qk_norm: layer normalisation of queries and keys in each head.
      norm_eps: of these norms.
      kernel: `pallas_kernels.block_sparse_attention` in the place of a stored map: "auto", or the name of an
        implementation; dense when None.
      projection_dropout: rate on the result.
      dtype: of the computation; that of the tokens when None.
      param_dtype: of the parameters.
      rngs: streams `params`, and `dropout` if there is any.

    Raises:
      ValueError: if the heads do not divide the channels.
    """

    points = frozenset({"qkv", "attention", "heads"})

    def __init__(
        self,
        features: int,
        *,
        num_heads: int,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        norm_eps: float = 1e-6,
        kernel: str | None = None,
        projection_dropout: float = 0.0,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if features % num_heads:
            raise ValueError(f"num_heads must divide the {features} channels, got {num_heads}")
        self.features, self.dtype, self.kernel = features, dtype, kernel
        size, stored = features // num_heads, {"param_dtype": param_dtype, "rngs": rngs}
        maps = {"use_bias": qkv_bias, "dtype": dtype, **stored}
        self.query, self.key, self.value = (ToHeads(features, num_heads, size, **maps) for _ in range(3))
        self.query_norm, self.key_norm = (
            LayerNorm(size, eps=norm_eps, **stored) if qk_norm else nnx.data(None) for _ in range(2)
        )
        self.selector = Linear(features, num_heads, use_bias=False, axes=("embed", None), **stored)
        self.controller = MLP(features, features // 2, out_features=1, use_bias=False, **stored)
        self.out = FromHeads(num_heads, size, features, dtype=dtype, **stored)
        self.dropout = nnx.Dropout(projection_dropout, rngs=rngs) if projection_dropout > 0 else nnx.data(None)

    def __call__(
        self,
        x: ArrayLike,
        message: ArrayLike | None = None,
        *,
        edits: Edits | None = None,
        deterministic: bool = True,
    ) -> Dependent:
        """Sends, and records F as `"attention"` and P m `(B, N, H)` as `"gate"`.

        Args:
          x: tokens `(B, N, C)`.
          message: the product of m over all layers before, `(B, N)`; 1 when None.
          edits: interventions on this layer of this call; at `attention` they edit F.
          deterministic: False in training.

        Raises:
          ValueError: for shapes that do not fit.
        """
        heads, gate, message = self._sent(x, message)
        q, k, v = visit(self, edits, "qkv", Heads(*heads))[:3]
        record(self, "gate", lambda: gate)
        ways = two_way_attention(q, k, v, kernel=None if acts(edits, "attention") else self.kernel)[1]
        if acts(edits, "attention"):
            ways = ways._replace(weights=visit(self, edits, "attention", ways.weights, q=q, k=k, v=v))
        else:
            record(self, "attention", ways.all_weights)
        y = self.out(visit(self, edits, "heads", ways.back(_gated(v, gate))))
        y = y if self.dropout is None else self.dropout(y, deterministic=deterministic)
        return Dependent(y, message)

    def dependencies(self, x: ArrayLike, message: ArrayLike | None = None) -> jax.Array:
        """The dependency mask Σ_h R, `(B, N parents, N children)` in float32 (or wider); arguments as a call's."""
        (q, k, _), gate, _ = self._sent(x, message)
        weights = TwoWayAttention(q, k, q.shape[-1] ** -0.5).all_weights()
        return jnp.einsum("bhij,bih->bji", weights, gate, precision=jax.lax.Precision.HIGHEST)

    def _sent(
        self, x: ArrayLike, message: ArrayLike | None
    ) -> tuple[tuple[jax.Array, jax.Array, jax.Array], jax.Array, jax.Array]:
        """Queries, keys and values, P m, and m."""
        x = jnp.asarray(x, self.dtype)
        if x.ndim != 3 or x.shape[-1] != self.features:
            raise ValueError(f"x must be (B, N, {self.features}), got {x.shape}")
        wide = x.astype(at_least_float32(x.dtype))  # at a temperature of 0.1 rounding would be seen
        message = jnp.ones(x.shape[:2], wide.dtype) if message is None else jnp.asarray(message, wide.dtype)
        if message.shape != x.shape[:2]:
            raise ValueError(f"message must be (B, N) = {x.shape[:2]}, got {message.shape}")
        chosen = jax.nn.softmax(self.selector(wide) / TEMPERATURE)
        message = message * jax.nn.sigmoid(self.controller(wide)[..., 0])
        q, k, v = self.query(x), self.key(x), self.value(x)
        if self.query_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        return (q, k, v), chosen * message[..., None], message
