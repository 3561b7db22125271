"""Relative convolutional multi-head attention, RCMHA (2023, arXiv:2308.03429; code: hermansh-id/rcmha).

Convolved heads under the relative positions of Transformer-XL (Dai et al., 2019, arXiv:1901.02860), with a learned
vector and number for each offset in place of its sines:

    q = conv(x W_q), k = conv(c W_k), v = conv(c W_v + b_v)      c: the tokens, behind those of a memory if there is one
    s_ij = ((q_i + u_h)·k_j + q_i·E_h[j - i] + c_h[j - i]) / √D
    y = concat_h(softmax_j(s_ij) v_j) W_o

conv is causal, depthwise over the last three tokens, and shared by the heads. The scale is for all terms. Cost
O(N·M·D) per head, the positions as much again. With a memory of M tokens the query convolution starts anew at x, those
of keys and values do not (`attend`): memory and tokens as one sequence would give another result.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from attnlab.contract import Given, Layout, Pattern, View
from attnlab.nn.causal_conv import CausalConv
from attnlab.nn.dense_mixer import DenseMixer, Heads, HeadSizes
from attnlab.nn.heads import FromHeads, ToHeads
from attnlab.nn.masking import existing_keys, masked_softmax, visible_keys
from attnlab.nn.position_bias import relative_logits, relative_logits_at
from attnlab.nn.softmax import attention_scores
from attnlab.nn.softmax_core import ProductCore
from attnlab.points import Edits
from attnlab.registry import Cost, Paper, Source, register


def relative_scores(
    q: ArrayLike,
    k: ArrayLike,
    query_bias: ArrayLike,
    key_vectors: ArrayLike,
    key_bias: ArrayLike,
    query_positions: ArrayLike | None = None,
    key_positions: ArrayLike | None = None,
) -> jax.Array:
    """Scores s before masks.

    Args:
      q: queries `(B, N, H, D)`.
      k: keys `(B, M, H, D)`.
      query_bias: u, `(H, D)`.
      key_vectors: E, `(2 P, H, D)`, row P for offset 0; keys farther than the table have none.
      key_bias: c, `(2 P, H)`.
      query_positions: `(B|1, N)`; when None the queries are the last of the keys' tokens, in order.
      key_positions: `(B|1, M)`, with the former.

    Returns:
      `(B, H, N, M)` in float32 (or wider).
    """
    q, k, key_vectors = jnp.asarray(q), jnp.asarray(k), jnp.asarray(key_vectors)
    table = jnp.concatenate([key_vectors, jnp.asarray(key_bias, key_vectors.dtype)[..., None]], axis=-1)
    # The number of an offset is its vector's product with one more channel.
    wide = jnp.concatenate([q, jnp.ones_like(q[..., :1])], axis=-1)
    zero = key_vectors.shape[0] // 2
    if query_positions is None:
        by_offset = relative_logits(wide, table, k.shape[1], zero=zero - (k.shape[1] - q.shape[1]))
    else:
        by_offset = relative_logits_at(wide, table, query_positions, key_positions, zero=zero)
    scale = q.shape[-1] ** -0.5
    return attention_scores(q + jnp.asarray(query_bias, q.dtype), k, scale=scale) + scale * by_offset


class RelativeCore(ProductCore):
    """Softmax of scores with learned vectors by offset.

    Args:
      num_heads: heads H.
      head_dim: size D of queries and keys.
      max_offset: P; tables have 2 P rows.
      param_dtype: of the tables, zero at the start.
      rngs: stream `dropout` if there is any.
      dropout: rate on the weights.
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        *,
        max_offset: int = 4096,
        param_dtype: Any = jnp.float32,
        dropout: float = 0.0,
        rngs: nnx.Rngs | None = None,
    ):
        if max_offset < 1:
            raise ValueError(f"max_offset must be at least 1, got {max_offset}")
        super().__init__(dropout=dropout, rngs=rngs)
        self.looks_at_positions, self.permutation_equivariant = True, False
        rows = 2 * max_offset
        self.query_bias = nnx.Param(jnp.zeros((num_heads, head_dim), param_dtype), logical_axes=("heads", None))
        vectors = jnp.zeros((rows, num_heads, head_dim), param_dtype)
        self.key_vectors = nnx.Param(vectors, logical_axes=(None, "heads", None), weight_decay=False)
        self.key_bias = nnx.Param(jnp.zeros((rows, num_heads), param_dtype), logical_axes=(None, "heads"))

    def weights(
        self, q: jax.Array, k: jax.Array, view: View, *, edits: Edits | None = None, owner: nnx.Module | None = None
    ) -> jax.Array:
        tables = (self.query_bias[...], self.key_vectors[...], self.key_bias[...])
        scores = relative_scores(q, k, *tables, view.q_at, view.k_at)
        scores = self.edited(edits, owner, "scores", scores, view=view, q=q, k=k)
        return masked_softmax(scores, visible_keys(view))


class ConvolvedHeads(NamedTuple):
    """What is carried from run to run: the last inputs `(B, K - 1, H, D)` of the convolutions, float32."""

    q: jax.Array
    k: jax.Array
    v: jax.Array


@register(
    "rcmha",
    paper=Paper(
        "RCMHA: Relative Convolutional Multi-Head Attention for Natural Language Modelling",
        "Sugiharto et al.",
        2023,
        arxiv="2308.03429",
        number=48,
    ),
    source=Source.AUTHORS_CODE,
    repository="hermansh-id/rcmha",
    cost=Cost(time="O(N·M·H·D)", memory="O(N·M·H)", state="M·H·(D+E) + 6·H·D"),
    summary="heads convolved over three tokens, scores with a learned vector and number for each offset",
    small={"max_offset": 24},
)
class RelativeConvolutionalAttention(DenseMixer):
    """Sequences to the same shape, causally. See the module docstring for the equations.

    Args:
      features: channels C.
      num_heads: heads H.
      head_dim: D; C / H when None.
      causal: True; there is no other form.
      kernel_size: tokens that the convolutions read.
      max_offset: P: tokens farther apart than that have no vector.
      attention_dropout: rate on the weights.
      dtype: of the computation and the result; that of the tokens when None.
      param_dtype: of the parameters.
      rngs: streams `params`, and `dropout` if there is any.

    Raises:
      ValueError: for sizes that do not fit.
    """

    patterns = frozenset({Pattern.CAUSAL_SELF})
    layouts = frozenset({Layout.SEQUENCE})

    def __init__(
        self,
        features: int,
        *,
        num_heads: int,
        head_dim: int | None = None,
        causal: bool = True,
        kernel_size: int = 3,
        max_offset: int = 4096,
        attention_dropout: float = 0.0,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if not causal:
            raise ValueError("causal must be True: the convolutions look at the tokens before")
        self.sizes = HeadSizes.of(features, num_heads, None, head_dim)
        size = self.sizes.key_size
        self.features, self.num_heads, self.causal, self.dtype = features, num_heads, causal, dtype
        common: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.query = ToHeads(features, num_heads, size, use_bias=False, **common)
        self.key = ToHeads(features, num_heads, size, use_bias=False, **common)
        self.value = ToHeads(features, num_heads, size, **common)
        conv: dict[str, Any] = {"form": "shared", "use_bias": True, **common}
        self.query_conv, self.key_conv, self.value_conv = (
            CausalConv((num_heads, size), kernel_size, **conv) for _ in range(3)
        )
        self.out = FromHeads(num_heads, size, features, **common)
        core: dict[str, Any] = {"max_offset": max_offset, "param_dtype": param_dtype, "dropout": attention_dropout}
        self.set_core(RelativeCore(num_heads, size, **core, rngs=rngs))

    def attend(
        self, x: ArrayLike, memory: ArrayLike, *, deterministic: bool = True, edits: Edits | None = None
    ) -> jax.Array:
        """Tokens that also see a memory, all of it: Transformer-XL's inputs of this layer for the tokens before.

        Args:
          x: tokens `(B, N, C)`.
          memory: `(B, M, C)`; no gradient should flow into it, `jax.lax.stop_gradient` is the caller's.
          deterministic, edits: as in the call.

        Returns:
          `(B, N, C)`.

        Raises:
          ValueError: for shapes that do not fit.
        """
        self.check_call(x)
        x = jnp.asarray(x, self.dtype)
        memory = jnp.asarray(memory, x.dtype)
        if memory.ndim != 3 or (memory.shape[0], memory.shape[2]) != (x.shape[0], x.shape[2]):
            raise ValueError(f"memory must be (B, M, C) with B and C of x {x.shape}, got {memory.shape}")
        source = jnp.concatenate([memory, x], axis=1)
        keys = jnp.arange(source.shape[1])[None]
        given = Given(view=View(q_idx=keys[:, memory.shape[1] :], k_idx=keys), deterministic=deterministic, edits=edits)
        view = self._view(x.shape[1:-1], source.shape[1], given)
        return self._attend(x, source, dataclasses.replace(view, q_at=None, k_at=None), None, given)[0]

    def init_carry(self, batch_size: int) -> ConvolvedHeads:
        return ConvolvedHeads(
            *(conv.init_state(batch_size) for conv in (self.query_conv, self.key_conv, self.value_conv))
        )

    def project(self, x: jax.Array, source: jax.Array, given: Given) -> Heads:
        return self.project_run(x, source, given, None)[0]

    def project_run(
        self, x: jax.Array, source: jax.Array, given: Given, carry: ConvolvedHeads | None
    ) -> tuple[Heads, ConvolvedHeads]:
        real = existing_keys(given.mask)
        real = None if real is None else jnp.broadcast_to(real, x.shape[:2])
        tokens: dict[str, Any] = {"real": real, "segment_ids": given.segment_ids}
        before = (None, None, None) if carry is None else carry
        q, carried_q = self.query_conv(self.query(x), before[0], **tokens)
        k, carried_k = self.key_conv(self.key(source), before[1], **tokens)
        v, carried_v = self.value_conv(self.value(source), before[2], **tokens)
        return Heads(q, k, v), ConvolvedHeads(carried_q, carried_k, carried_v)

    def merge(self, y: jax.Array, x: jax.Array, *, deterministic: bool = True) -> jax.Array:
        return self.out(y)

    def _view(self, grid: tuple[int, ...], num_keys: int | None, given: Given) -> View:
        view = super()._view(grid, num_keys, given)
        usual = (
            given.positions is None and given.segment_ids is None and (given.view is None or given.view.k_at is None)
        )
        # Tokens in order need no gathers.
        return dataclasses.replace(view, q_at=None, k_at=None) if usual else view
