"""RALA: rank-augmented linear attention (Fan et al., CVPR 2025, arXiv:2411.07635).

Linear attention with φ = elu + 1 whose keys are weighted by how much the mean query looks at them, and whose result is
modulated channel by channel, so that neither the sum of keys and values nor the output is of low rank. Per head:

    q̄ = mean_i φ(q_i);   α_j = N softmax_j(D^-1/2 q̄ · φ(k_j));   k_j ← α_j φ(k_j)              (mean weight 1)
    y_i = (R_i φ(q_i)) Σ_j (R_j k_j) v_jᵀ / (N φ(q_i) · mean_j k_j + 1e-6 N)
    out = W_o ((y + DWConv5×5(v)) · o)                                            o = W x + b, without activation

R are rotary positions, of neighbouring channels, the first half of them by rows and the second by columns, with
frequencies 10000^-(i/(p-1)) that end at 1/10000 itself. The denominator is that of the keys before rotation, so the
weights of a token need not sum to 1. The paper gates by φ(x), the code by o; we follow the code. Stages of small maps
have softmax attention with the same modulation (`rala.softmax`), of q and k without φ.

The convolution is over the grid of the tokens, of any number of axes, each of which has its own share of the channels
of R. Key masks, sequences and videos are our extension; there is no causal form, since α is over all tokens.
Cost O(N·D²) per head. Names and defaults: qhfan/RALA.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from attnlab.contract import Given, Layout, TokenMixer, record
from attnlab.nn.dense_mixer import Heads
from attnlab.nn.depthwise import DepthwiseConv
from attnlab.nn.feature_maps import elu1
from attnlab.nn.grids import to_tokens
from attnlab.nn.heads import FromHeads, ToHeads
from attnlab.nn.linear_mixer import linear_attention_map
from attnlab.nn.masking import masked_softmax
from attnlab.nn.positions import grid_positions
from attnlab.nn.rotary import Rotary
from attnlab.nn.softmax import attention_weights, softmax_attention
from attnlab.points import visit
from attnlab.registry import Cost, Paper, Source, register
from pallas_kernels.dtypes import at_least_float32
from pallas_kernels.linear_attention import linear_attention

PAPER = Paper("Breaking the Low-Rank Dilemma of Linear Attention", "Fan et al.", 2025, arxiv="2411.07635", number=3)
_ENTRY = {"paper": PAPER, "source": Source.AUTHORS_CODE, "repository": "qhfan/RALA"}


def augmented_features(
    q: ArrayLike,
    k: ArrayLike,
    q_at: ArrayLike,
    k_at: ArrayLike,
    rotary: Rotary,
    *,
    mask: ArrayLike | None = None,
    eps: float = 1e-6,
) -> tuple[jax.Array, jax.Array]:
    """Queries and keys whose linear attention, without a denominator, is that of RALA.

    Args:
      q: φ(q), positive, `(B, N, H, D)`.
      k: φ(k), `(B, M, H, D)`.
      q_at: positions of the queries, `(B|1, N[, A])`.
      k_at: of the keys.
      rotary: R.
      mask: `(B, M)` boolean, which keys exist, and in self-attention queries; all when None.
      eps: added to the denominator.

    Returns:
      `(B, N, H, D)` and `(B, M, H, D)` in the dtypes of `q` and `k`.
    """
    q, k = jnp.asarray(q), jnp.asarray(k)
    types, wide, size = (q.dtype, k.dtype), at_least_float32(q.dtype), q.shape[-1]
    q, k = q.astype(wide), k.astype(wide)
    real = jnp.ones((1, k.shape[1]), bool) if mask is None else jnp.asarray(mask)
    sinks = real if mask is not None and q.shape[1] == k.shape[1] else jnp.ones((1, q.shape[1]), bool)
    count = jnp.maximum(real.sum(1), 1).astype(wide)
    mean = jnp.where(sinks[..., None, None], q, 0).sum(1) / jnp.maximum(sinks.sum(1, dtype=q.dtype), 1)[:, None, None]
    logits = size**-0.5 * jnp.einsum("bhd,bmhd->bhm", mean, k)
    share = masked_softmax(logits, real[:, None]) * count[:, None, None]
    k = k * share.swapaxes(1, 2)[..., None]
    total = jnp.einsum("bnhd,bhd->bnh", q, k.sum(1)) + eps * count[:, None, None]
    q = rotary(q, q_at) / jnp.where(real.any(1)[:, None, None], total, 1)[..., None]
    return q.astype(types[0]), rotary(k, k_at).astype(types[1])


class ModulatedAttention(TokenMixer):
    """Base of both kinds: projections, the convolution of the values, the modulation.

    Args:
      features: channels C.
      num_heads: heads H.
      layout: of the tokens.
      side: of the kernel of the convolution, odd.
      theta: base of the frequencies.
      dtype: of the computation and the result; that of the tokens when None.
      param_dtype: of the parameters.
      rngs: stream `params`.

    Raises:
      ValueError: if the heads do not divide the channels, or have fewer than two channels for each axis of the grid.
    """

    layouts = frozenset(Layout)
    accepts = frozenset({"key_mask"})
    points = frozenset({"qkv", "heads"})

    def __init__(
        self,
        features: int,
        *,
        num_heads: int,
        layout: Layout = Layout.IMAGE,
        side: int = 5,
        theta: float = 10000.0,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if features % num_heads:
            raise ValueError(f"num_heads must divide the {features} channels, got {num_heads}")
        self.features, self.num_heads, self.layout, self.dtype = features, num_heads, Layout(layout), dtype
        size, axes = features // num_heads, self.layout.axes
        self.rotary = Rotary(theta=theta, interleaved=True, inclusive=True)
        self.rotary.check(size, axes)
        common = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.query, self.key, self.value, self.gate = (ToHeads(features, num_heads, size, **common) for _ in range(4))
        self.local = DepthwiseConv((num_heads, size), (side,) * axes, **common)
        self.out = FromHeads(num_heads, size, features, **common)

    def attend(self, heads: Heads, at: jax.Array, mask: jax.Array | None) -> jax.Array:
        """`(B, N, H, D)` from heads that are not rotated, at positions `(1, N, A)`."""
        raise NotImplementedError

    def weights(self, heads: Heads, at: jax.Array, mask: jax.Array | None) -> jax.Array:
        """The map `(B, H, N, N)` in float32 by which `attend` mixes values."""
        raise NotImplementedError

    def mix(self, x: jax.Array, given: Given) -> jax.Array:
        tokens, grid, mask = to_tokens(x), x.shape[1:-1], given.mask
        at = jnp.asarray(grid_positions(grid))
        heads = Heads(self.query(tokens), self.key(tokens), self.value(tokens))
        heads = visit(self, given.edits, "qkv", heads)
        v = heads.v if mask is None else jnp.where(mask[..., None, None], heads.v, 0)
        record(self, "attention", lambda: self.weights(heads, at, mask))
        y = self.attend(heads._replace(v=v), at, mask)
        local = self.local(v.reshape(v.shape[0], *grid, *v.shape[2:])).reshape(v.shape)
        y = y + local
        if mask is not None:
            # The convolution's bias is there where nothing else is.
            y = jnp.where(mask.any(1)[:, None, None, None], y, 0)
        y = visit(self, given.edits, "heads", y)
        return self.out(y * self.gate(tokens)).reshape(x.shape)


@register(
    "rala",
    **_ENTRY,
    cost=Cost(time="O(N·C·D)", memory="O(C·D)"),
    kernel="linear_attention",
    summary="linear attention with keys weighted by the mean query and a result modulated by the tokens",
)
class RankAugmentedLinearAttention(ModulatedAttention):
    """Tokens of any layout to the same shape. See the module docstring for the equations.

    Args:
      features: channels C.
      num_heads: heads H.
      rngs: stream `params`.
      **options: layout, positions, convolution and dtypes: see `ModulatedAttention`.

    Raises:
      ValueError: for sizes that do not fit.
    """

    def __init__(self, features: int, *, num_heads: int, rngs: nnx.Rngs, **options: Any):
        super().__init__(features, num_heads=num_heads, rngs=rngs, **options)

    def attend(self, heads: Heads, at: jax.Array, mask: jax.Array | None) -> jax.Array:
        q, k = augmented_features(elu1(heads.q), elu1(heads.k), at, at, self.rotary, mask=mask)
        return linear_attention(q, k, heads.v, causal=False)

    def weights(self, heads: Heads, at: jax.Array, mask: jax.Array | None) -> jax.Array:
        q, k = augmented_features(elu1(heads.q), elu1(heads.k), at, at, self.rotary, mask=mask)
        return linear_attention_map(q, k, causal=False)


@register(
    "rala.softmax",
    **_ENTRY,
    cost=Cost(time="O(N²·C)", memory="O(N·C)"),
    summary="softmax attention with rotary positions and a result modulated by the tokens",
)
class ModulatedSoftmaxAttention(ModulatedAttention):
    """Tokens of any layout to the same shape: softmax(D^-1/2 R q · R k) v in place of RALA's y.

    Args:
      features: channels C.
      num_heads: heads H.
      rngs: stream `params`.
      **options: layout, positions, convolution and dtypes: see `ModulatedAttention`.

    Raises:
      ValueError: for sizes that do not fit.
    """

    def __init__(self, features: int, *, num_heads: int, rngs: nnx.Rngs, **options: Any):
        super().__init__(features, num_heads=num_heads, rngs=rngs, **options)

    def attend(self, heads: Heads, at: jax.Array, mask: jax.Array | None) -> jax.Array:
        return softmax_attention(self.rotary(heads.q, at), self.rotary(heads.k, at), heads.v, mask=mask)

    def weights(self, heads: Heads, at: jax.Array, mask: jax.Array | None) -> jax.Array:
        return attention_weights(self.rotary(heads.q, at), self.rotary(heads.k, at), mask=mask)
