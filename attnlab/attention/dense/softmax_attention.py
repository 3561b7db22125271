"""Softmax attention (Vaswani et al., 2017, arXiv:1706.03762, section 3.2).

    q, k, v = x W_q, c W_k, c W_v             c the context; x itself in self-attention
    y = concat_h(softmax(q_h k_hᵀ / √D) v_h) W_o

What later work added is optional: grouped key and value heads (Ainslie et al., 2023, arXiv:2305.13245), normed queries
and keys (Dehghani et al., 2023, arXiv:2302.05442; RMSNorm here), rotary positions (Su et al., 2021, arXiv:2104.09864)
along one, two or three axes, and ALiBi (Press et al., 2022, arXiv:2108.12409). Cost O(N·M·(D+E)) per head. Where the
paper masks by -∞, a query without any key gives zeros.

The operator is `attnlab.nn.softmax.softmax_attention`.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from attnlab.contract import Layout, Pattern, TokenMixer, UnsupportedArgument, record
from attnlab.nn.cache import KVCache
from attnlab.nn.grids import to_tokens
from attnlab.nn.linear import Linear
from attnlab.nn.masking import segment_pair, segment_positions
from attnlab.nn.norms import RMSNorm
from attnlab.nn.positions import Rotary, alibi_bias, alibi_slopes, grid_positions
from attnlab.nn.softmax import attention_weights, softmax_attention
from attnlab.registry import Cost, Paper, Source, register
from pallas_kernels.masks import Mask


@register(
    "softmax_attention",
    paper=Paper("Attention Is All You Need", "Vaswani et al.", 2017, arxiv="1706.03762"),
    source=Source.PAPER_TEXT,
    cost=Cost(time="O(N·M·H·(D+E))", memory="O(N·M·H), with block_size O(N·H·(D+E))", state="M·G·(D+E)"),
    summary="every query weighs every value by the softmax of its scaled products with the keys",
)
class SoftmaxAttention(TokenMixer):
    """Tokens of any layout to the same shape; see the module docstring for the equations.

    Images and videos are attended as a sequence in row-major order: masks, `structural_mask` and `causal` go by it.
    Causal cross-attention lets query i see the keys 0..i of the context, both counted from the start.

    Args:
      features: channels C.
      num_heads: query heads H.
      num_kv_heads: key and value heads G, a divisor of H; H when None.
      head_dim: D; C / H when None.
      value_dim: E; D when None.
      causal: whether query i sees keys j ≤ i only.
      layout: of the tokens.
      context_features: channels of the context, for a module that needs one; without it, self-attention, or
        cross-attention to a context of C channels.
      qkv_bias: whether the maps to queries, keys and values have a bias.
      out_bias: whether the last map has a bias.
      qk_norm: whether queries and keys pass an RMSNorm over D.
      rotary: rotary positions along the axes of the layout, or theta for `Rotary(theta)`.
      alibi: whether scores fall with the distance; for sequences.
      structural_mask: a rule on indices, such as `pallas_kernels.masks.SlidingWindow(127, 0)`.
      scale: of the scores; D^-1/2 when None.
      softcap: bound of the scores by tanh; none when None.
      attention_dropout: rate on the weights.
      projection_dropout: rate on the result.
      block_size: keys per block, for memory linear in M; all at once when None.
      dtype: of the computation and the result; that of the tokens when None.
      param_dtype: of the parameters.
      rngs: streams `params`, and `dropout` if there is any.

    Raises:
      ValueError: for sizes that do not fit, or options that exclude each other.
    """

    patterns = frozenset(Pattern)
    layouts = frozenset(Layout)
    accepts = frozenset({"mask", "key_mask", "segment_ids", "positions"})

    def __init__(
        self,
        features: int,
        *,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        value_dim: int | None = None,
        causal: bool = False,
        layout: Layout = Layout.SEQUENCE,
        context_features: int | None = None,
        qkv_bias: bool = True,
        out_bias: bool = True,
        qk_norm: bool = False,
        rotary: Rotary | float | None = None,
        alibi: bool = False,
        structural_mask: Mask | None = None,
        scale: float | None = None,
        softcap: float | None = None,
        attention_dropout: float = 0.0,
        projection_dropout: float = 0.0,
        block_size: int | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        groups = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads < 1 or groups < 1 or num_heads % groups:
            raise ValueError(f"num_heads {num_heads} must be a multiple of num_kv_heads {groups}, both at least 1")
        if head_dim is None and features % num_heads:
            raise ValueError(f"features {features} is not a multiple of num_heads {num_heads}; give head_dim")
        head_dim = features // num_heads if head_dim is None else head_dim
        value_dim = head_dim if value_dim is None else value_dim
        layout = Layout(layout)
        if alibi and layout is not Layout.SEQUENCE:
            raise ValueError(f"alibi is a distance along a sequence, the layout is {layout}")
        if block_size is not None and (alibi or attention_dropout):
            raise ValueError("block_size does not go with alibi or attention_dropout: they are as large as the weights")
        if isinstance(rotary, bool):
            raise ValueError(f"rotary must be a Rotary or theta, got {rotary}")
        rotary = Rotary(float(rotary)) if isinstance(rotary, int | float) else rotary
        if rotary is not None:
            rotary.check(head_dim, layout.axes)
        self.features, self.num_heads, self.num_kv_heads = features, num_heads, groups
        self.head_dim, self.value_dim, self.causal, self.layout = head_dim, value_dim, causal, layout
        self.context_features, self.rotary, self.alibi, self.dtype = context_features, rotary, alibi, dtype
        self.structural_mask, self.block_size, self.attention_dropout = structural_mask, block_size, attention_dropout
        self.scale, self.softcap = scale, softcap
        self.permutation_equivariant = rotary is None and not alibi and structural_mask is None
        self.accepts = frozenset({"mask", "key_mask"})
        if layout is Layout.SEQUENCE:
            self.accepts |= {"segment_ids"}
        if rotary is not None or alibi:
            self.accepts |= {"positions"}

        source = features if context_features is None else context_features
        common = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        maps = {"use_bias": qkv_bias, "axes": ("embed", "heads"), **common}
        self.query = Linear(features, num_heads * head_dim, **maps)
        self.key = Linear(source, groups * head_dim, **maps)
        self.value = Linear(source, groups * value_dim, **maps)
        self.projection = Linear(num_heads * value_dim, features, use_bias=out_bias, axes=("heads", "embed"), **common)
        self.query_norm = RMSNorm(head_dim, param_dtype=param_dtype, rngs=rngs) if qk_norm else nnx.data(None)
        self.key_norm = RMSNorm(head_dim, param_dtype=param_dtype, rngs=rngs) if qk_norm else nnx.data(None)
        self.dropout_rngs = rngs["dropout"].fork() if attention_dropout > 0 else nnx.data(None)
        self.dropout = nnx.Dropout(projection_dropout, rngs=rngs) if projection_dropout > 0 else nnx.data(None)

    def __call__(
        self,
        x: ArrayLike,
        context: ArrayLike | None = None,
        *,
        mask: ArrayLike | None = None,
        segment_ids: ArrayLike | tuple[ArrayLike, ArrayLike] | None = None,
        positions: ArrayLike | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """Mixes tokens.

        With `context`, `positions` are those of the queries; keys are at 0..M-1, or at their places in their segments.
        Without `positions`, tokens are at their places in the grid, or in their segments.
        """
        self.check_call(x, context=context, mask=mask, segment_ids=segment_ids, positions=positions)
        x = jnp.asarray(x, self.dtype)
        source = self._source(x, context)
        q, k, v = self._project(to_tokens(x), source)
        q_at, k_at = self._places(x.shape[1:-1], None if context is None else k.shape[1], segment_ids, positions)
        if self.rotary is not None:
            q, k = self.rotary(q, q_at), self.rotary(k, k_at)
        arguments = {
            "mask": mask,
            "segment_ids": segment_ids,
            "structural_mask": self.structural_mask,
            "causal": self.causal,
            "bias": alibi_bias(alibi_slopes(self.num_heads), q_at, k_at) if self.alibi else None,
            "scale": self.scale,
            "softcap": self.softcap,
        }
        record(self, "attention", lambda: attention_weights(q, k, **arguments))
        if self.dropout_rngs is not None and not deterministic:
            arguments |= {"dropout_rate": self.attention_dropout, "dropout_key": self.dropout_rngs()}
        y = softmax_attention(q, k, v, **arguments, block_size=self.block_size)
        return self._merge(y, deterministic=deterministic).reshape(x.shape)

    def init_state(self, batch_size: int, max_length: int | None = None, *, dtype: Any = None) -> KVCache:
        """An empty cache for `max_length` tokens.

        Raises:
          UnsupportedArgument: unless built for causal self-attention of sequences.
          ValueError: without `max_length`.
        """
        self._check_decodes()
        if max_length is None:
            raise ValueError("SoftmaxAttention caches keys and values: init_state needs max_length")
        return KVCache.create(batch_size, max_length, self.num_kv_heads, self.head_dim, self.value_dim, dtype=dtype)

    def prefill(self, x: ArrayLike, state: KVCache, *, mask: ArrayLike | None = None) -> tuple[jax.Array, KVCache]:
        """Appends a run of tokens `(B, N, C)` to the cache; see `KVCache.append` for what happens when it is full.

        Raises:
          UnsupportedArgument: unless built for causal self-attention of sequences.
          ValueError: for shapes that do not fit, or more tokens than the cache has room for.
        """
        self._check_decodes()
        self.check_call(x)
        x = jnp.asarray(x, self.dtype)
        q, k, v = self._project(x, x)
        at = state.positions(x.shape[1], mask)
        if self.rotary is not None:
            q, k = self.rotary(q, at), self.rotary(k, at)
        state = state.append(k, v, mask)
        bias = alibi_bias(alibi_slopes(self.num_heads), at, jnp.arange(state.max_length)) if self.alibi else None
        # Slots are positions, and the causal rule hides those that are still empty.
        y = softmax_attention(
            q,
            state.keys,
            state.values,
            bias=bias,
            structural_mask=self.structural_mask,
            causal=True,
            q_idx=at,
            scale=self.scale,
            softcap=self.softcap,
            block_size=self.block_size,
        )
        return self._merge(y, deterministic=True), state

    def step(self, x_t: ArrayLike, state: KVCache) -> tuple[jax.Array, KVCache]:
        """Appends one token `(B, C)`."""
        y, state = self.prefill(jnp.asarray(x_t)[:, None], state)
        return y[:, 0], state

    def _source(self, x: jax.Array, context: ArrayLike | None) -> jax.Array:
        """Tokens `(B, M, C')` that keys and values are made of."""
        if context is None:
            if self.context_features is not None:
                raise ValueError(
                    f"context is missing: the module was built for one of {self.context_features} channels"
                )
            return to_tokens(x)
        shape, channels = jnp.shape(context), self.key.in_features
        if len(shape) != 3 or shape[0] != x.shape[0] or shape[-1] != channels:
            raise ValueError(f"context must be (B, M, {channels}) with B = {x.shape[0]}, got {shape}")
        return jnp.asarray(context, x.dtype)

    def _project(self, x: jax.Array, source: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        q = self.query(x).reshape(*x.shape[:2], self.num_heads, self.head_dim)
        k = self.key(source).reshape(*source.shape[:2], self.num_kv_heads, self.head_dim)
        v = self.value(source).reshape(*source.shape[:2], self.num_kv_heads, self.value_dim)
        if self.query_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        return q, k, v

    def _places(
        self, grid: tuple[int, ...], num_keys: int | None, segment_ids: Any, positions: ArrayLike | None
    ) -> tuple[jax.Array, jax.Array]:
        """Positions of queries and keys for rotary and ALiBi; `num_keys` is None in self-attention."""
        if segment_ids is not None:
            q_at, k_at = (segment_positions(ids) for ids in segment_pair(segment_ids))
        else:
            q_at = grid_positions(grid) if len(grid) > 1 else jnp.arange(grid[0])[None]
            k_at = q_at if num_keys is None else jnp.arange(num_keys)[None]
        if positions is not None:
            q_at = jnp.asarray(positions)
            tokens, axes = math.prod(grid), () if len(grid) == 1 else (len(grid),)
            if q_at.ndim < 2 or q_at.shape[1:] != (tokens, *axes):
                wanted = ", ".join(map(str, ("B", tokens, *axes)))
                raise ValueError(f"positions must be ({wanted}) for the layout {self.layout}, got {q_at.shape}")
            k_at = q_at if num_keys is None else k_at
        if q_at.ndim != k_at.ndim and self.rotary is not None:
            raise UnsupportedArgument(
                f"rotary positions in the layout {self.layout} do not reach a context, which is a sequence"
            )
        return q_at, k_at

    def _merge(self, y: jax.Array, *, deterministic: bool) -> jax.Array:
        y = self.projection(y.reshape(*y.shape[:2], -1))
        return y if self.dropout is None else self.dropout(y, deterministic=deterministic)

    def _check_decodes(self) -> None:
        if not self.causal or self.layout is not Layout.SEQUENCE or self.context_features is not None:
            built = (
                f"{'causal ' if self.causal else ''}{'self' if self.context_features is None else 'cross'}-attention"
            )
            raise UnsupportedArgument(
                f"SoftmaxAttention decodes causal self-attention of a sequence; this is {built}, layout {self.layout}"
            )
