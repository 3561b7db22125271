"""Multi-variate parallel attention, MVPA (2025; code: IBM/multi-variate-parallel-transformer).

Tokens x of T times and C channels of a series, of which there may be any number. A token n = (t, c) sees every token m
of its own and of earlier times; content, time and channel are scored apart, each with a learned vector of its own:

    content   (q_n + u) · k_m                       where t_n - t_m ≤ window, or t_n is the last time; elsewhere 0
    time      (q_n + w) · P[T - 1 - (t_n - t_m)]    P = time embeddings (T, E) · W_P, of which the last means "now"
    channel   (q_n + z) · R[C - 1 - |c_n - c_m|]    R = channel embeddings (C, E) · W_R, the last means "this channel"
    y_n = Σ_m softmax_m((content + time + channel) / √D) v_m;    out = concat_h(y) W_o

Keys, values, P, R and u, w, z have G heads, each for H / G query heads. A far token has no content, and competes by its
time and channel still. Distances are counted from the tables' ends: with another T or C other rows are in use, and what
a token of an earlier time gets depends on T, so that there is no decoding that equals a call. Cost O((T·C)²·D), and
O(T·C·(T + C)·D) for time and channel, which are rows (T·C, T) and (T·C, C) that `pallas_kernels.block_sparse_attention`
adds tile by tile: the scores are never there as a whole.
"""

import functools
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from attnlab.contract import Constant, record
from attnlab.nn.dense_mixer import HeadSizes
from attnlab.nn.heads import FromHeads, ToHeads
from attnlab.nn.linear import trunc_normal
from attnlab.nn.softmax import weighted_values
from attnlab.registry import Cost, Example, Kind, Paper, Source, register
from pallas_kernels.block_masks import BlockCausal
from pallas_kernels.block_sparse_attention import Indexed, ScoreMod, attention_weights, block_sparse_attention
from pallas_kernels.dtypes import at_least_float32
from pallas_kernels.masks import quotient

PAPER = Paper(
    "A foundation model with multi-variate parallel attention to generate neuronal activity",
    "Carzaniga et al.",
    2025,
    number=66,
)
REPOSITORY = "IBM/multi-variate-parallel-transformer"


def time_shift(logits: ArrayLike) -> jax.Array:
    """Logits by row of the time table to logits by time of the key, `(…, T·C, T)`: y[n, t] = x[n, T - 1 - (t_n - t)].

    The shift of Transformer-XL (Dai et al., 2019, arXiv:1901.02860), which gathers nothing. It is for t ≤ t_n: what it
    gives for later times are entries of the next token, and zeros.

    Raises:
      ValueError: if the tokens are no multiple of the times.
    """
    x = jnp.asarray(logits)
    *front, tokens, times = x.shape
    if tokens % times:
        raise ValueError(f"logits must be (…, T·C, T), got {x.shape}")
    padded = jnp.pad(x.reshape(*front, times, tokens), [(0, 0)] * (len(front) + 1) + [(1, 0)])
    return padded.reshape(*front, tokens + 1, times)[..., 1:, :]


def channel_shift(logits: ArrayLike) -> jax.Array:
    """Logits by row of the channel table to logits by the key's channel: y[n, c] = x[n, C - 1 - |c_n - c|].

    Args:
      logits: `(…, T·C, C)`.

    Raises:
      ValueError: if the tokens are no multiple of the channels.
    """
    x = jnp.asarray(logits)
    *front, tokens, channels = x.shape
    if tokens % channels:
        raise ValueError(f"logits must be (…, T·C, C), got {x.shape}")
    place = np.arange(channels)
    row = channels - 1 - np.abs(place[:, None] - place)
    split = x.reshape(*front, tokens // channels, channels, channels)
    index = row.reshape((1,) * (len(front) + 1) + row.shape)
    return jnp.take_along_axis(split, index, axis=-1).reshape(x.shape)


def multivariate_scores(
    q: ArrayLike,
    k: ArrayLike,
    time_keys: ArrayLike,
    channel_keys: ArrayLike,
    biases: ArrayLike,
    *,
    scale: ArrayLike | None = None,
    window: int | None = 10,
    content: bool = True,
) -> tuple[jax.Array, jax.Array, dict[str, Any]]:
    """What `block_sparse_attention` and `attention_weights` are to be given.

    Args:
      q: queries `(B, T, C, H, D)`.
      k: keys `(B, T, C, G, D)`, H a multiple of G.
      time_keys: P, `(T, G, D)`.
      channel_keys: R, `(C, G, D)`.
      biases: u, w and z, `(3, G, D)`.
      scale: of all three terms; D^-1/2 when None.
      window: times between which content counts; all when None.
      content: whether it counts at all.

    Returns:
      Queries and keys, `(B, T·C, ·, D)`, and the options that make the scores of them.
    """
    q, k = jnp.asarray(q), jnp.asarray(k)
    batch, times, channels, heads, size = q.shape
    groups, tokens, wide = k.shape[3], times * channels, at_least_float32(q.dtype)
    scale = size**-0.5 if scale is None else scale
    q, k = q.reshape(batch, tokens, heads, size), k.reshape(batch, tokens, groups, size)
    u, w, z = jnp.repeat(jnp.asarray(biases, q.dtype), heads // groups, axis=1)

    def by_row(queries: jax.Array, table: ArrayLike) -> jax.Array:
        """(B, H, N, R): products of queries with each row of a table, scaled."""
        split = queries.reshape(batch, tokens, groups, heads // groups, size)
        table = jnp.asarray(table, q.dtype)
        products = jnp.einsum("bngrd,sgd->bgrns", split, table, preferred_element_type=wide)
        return products.reshape(batch, heads, tokens, -1) * jnp.asarray(scale, wide)

    tables = (
        Indexed(time_shift(by_row(q + w, time_keys)), f"b h i j//{channels}"),
        Indexed(channel_shift(by_row(q + z, channel_keys)), f"b h i j%{channels}"),
    )
    scores = _scores(times, channels, window, content)
    if isinstance(scale, jax.Array):
        scale = scale.astype(wide)
    return q + u, k, {"mask": BlockCausal(channels), "score_mod": ScoreMod(scores, tables), "scale": scale}


@functools.cache  # functions are compared by identity
def _scores(times: int, channels: int, window: int | None, content: bool) -> Callable[..., jax.Array]:
    def scores(
        score: jax.Array,
        b: jax.Array,
        h: jax.Array,
        i: jax.Array,
        j: jax.Array,
        by_time: jax.Array,
        by_channel: jax.Array,
    ) -> jax.Array:
        if not content:
            score = jnp.zeros_like(score)
        elif window is not None:
            at, of = quotient(i, channels), quotient(j, channels)
            score = jnp.where((at - of <= window) | (at == times - 1), score, jnp.zeros_like(score))
        return score + by_time + by_channel

    return scores


def _example() -> Example:
    mixer = MultiVariateParallelAttention(8, num_heads=2, num_kv_heads=1, window=1, rngs=nnx.Rngs(0))
    x, time, channel = (
        jax.random.normal(key, shape)
        for key, shape in zip(jax.random.split(jax.random.key(0), 3), ((2, 4, 3, 8), (1, 4, 8), (1, 3, 8)), strict=True)
    )
    mask = np.arange(3) < np.array([[3], [2]])
    mask = np.broadcast_to(mask[:, None], (2, 4, 3))
    return Example(mixer, (x, time, channel), {"mask": mask}, (0, "mask"), (0, 1, 2))


@register(
    "mvpa",
    kind=Kind.MODULE,
    paper=PAPER,
    source=Source.AUTHORS_CODE,
    repository=REPOSITORY,
    cost=Cost(time="O((T·C)²·H·D)", memory="O(T·C·(T + C)·H)"),
    kernel="block_sparse_attention",
    summary="attention over times and channels of a series, scored apart by content, time and channel",
    small=_example,
)
class MultiVariateParallelAttention(nnx.Module):
    """Tokens `(B, T, C, E)` and embeddings of times and channels to `(B, T, C, E)`; equations in the module docstring.

    Args:
      features: channels E of a token.
      num_heads: query heads H.
      num_kv_heads: heads G of keys, values, tables and vectors; H when None.
      window: times between which content counts; all when None.
      content: whether there is a content term at all.
      scaled: whether scores are divided by √D.
      scale_by_layer: whether scores are divided by the layer's number, counted from 1, too.
      layer: index of the layer from 0, for `scale_by_layer`.
      attention_dropout: rate on the weights.
      projection_dropout: rate on the result.
      implementation: of `pallas_kernels.block_sparse_attention`; the best one here when None.
      dtype: of the computation and the result; that of the tokens when None.
      param_dtype: of the parameters.
      rngs: streams `params`, and `dropout` if there is any.

    Raises:
      ValueError: for sizes that do not fit, a negative window, or a rate out of [0, 1).
    """

    def __init__(
        self,
        features: int,
        *,
        num_heads: int,
        num_kv_heads: int | None = None,
        window: int | None = 10,
        content: bool = True,
        scaled: bool = True,
        scale_by_layer: bool = False,
        layer: int = 0,
        attention_dropout: float = 0.0,
        projection_dropout: float = 0.0,
        implementation: str | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        groups, size, _ = HeadSizes.of(features, num_heads, num_kv_heads)
        if window is not None and window < 0:
            raise ValueError(f"window must be at least 0, or None for no bound, got {window}")
        if not 0 <= attention_dropout < 1:
            raise ValueError(f"attention_dropout must be in [0, 1), got {attention_dropout}")
        self.features, self.num_heads, self.window, self.content = features, num_heads, window, content
        self.implementation, self.dtype, self.attention_dropout = implementation, dtype, attention_dropout
        self.size_scale = size**-0.5 if scaled else 1.0
        # An array, so that layers can be stacked.
        self.layer_scale = nnx.data(None)
        if scale_by_layer:
            self.layer_scale = Constant(jnp.asarray(1 / (layer + 1), jnp.float32))
        common: dict[str, Any] = {"use_bias": False, "dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.query = ToHeads(features, num_heads, size, **common)
        self.key, self.value, self.time_key, self.channel_key = (
            ToHeads(features, groups, size, **common) for _ in range(4)
        )
        biases = trunc_normal(rngs.params(), (3, groups, size), param_dtype)
        self.biases = nnx.Param(biases, logical_axes=(None, "heads", None), weight_decay=False)
        self.out = FromHeads(num_heads, size, features, **common)
        self.dropout = nnx.Dropout(projection_dropout, rngs=rngs) if projection_dropout > 0 else nnx.data(None)
        self.dropout_rngs = rngs["dropout"].fork() if attention_dropout > 0 else nnx.data(None)

    def __call__(
        self,
        x: ArrayLike,
        time: ArrayLike,
        channel: ArrayLike,
        *,
        mask: ArrayLike | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """Attends, and records the weights as `"attention"`.

        Args:
          x: tokens `(B, T, C, E)`.
          time: embeddings of the times `(1, T, E)`, or `(T, E)`: of T - 1 times ago first, of the same time last.
          channel: of distances between channels, `(1, C, E)` or `(C, E)`: the farthest first, none last.
          mask: `(B, T, C)` boolean, True where a token exists; None if all do.
          deterministic: False in training, for dropout.

        Raises:
          ValueError: for shapes that do not fit, or a mask that is not boolean.
        """
        q, k, v, options = self._parts(x, time, channel, mask)
        record(self, "attention", lambda: attention_weights(q, k, **options))
        if self.dropout_rngs is not None and not deterministic:
            weights = attention_weights(q, k, **options)
            kept = jax.random.bernoulli(self.dropout_rngs(), 1 - self.attention_dropout, weights.shape)
            y = weighted_values(jnp.where(kept, weights / (1 - self.attention_dropout), jnp.zeros_like(weights)), v)
        else:
            y = cast(jax.Array, block_sparse_attention(q, k, v, **options, implementation=self.implementation))
        y = self._out(y, jnp.shape(x))
        return y if self.dropout is None else self.dropout(y, deterministic=deterministic)

    def with_weights(
        self, x: ArrayLike, time: ArrayLike, channel: ArrayLike, *, mask: ArrayLike | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """The result without dropout, and the weights `(B, H, T·C, T·C)`, times first; arguments as a call's."""
        q, k, v, options = self._parts(x, time, channel, mask)
        weights = attention_weights(q, k, **options)
        return self._out(weighted_values(weights, v), jnp.shape(x)), weights

    def _out(self, y: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return self.out(y).reshape(shape)

    def _parts(
        self, x: ArrayLike, time: ArrayLike, channel: ArrayLike, mask: ArrayLike | None
    ) -> tuple[jax.Array, jax.Array, jax.Array, dict[str, Any]]:
        x = jnp.asarray(x, self.dtype)
        if x.ndim != 4 or x.shape[-1] != self.features:
            raise ValueError(f"x must be (B, T, C, {self.features}), got {x.shape}")
        batch, times, channels, _ = x.shape
        time, channel = (
            self._table(name, table, length, x.dtype)
            for name, table, length in (("time", time, times), ("channel", channel, channels))
        )
        scale: ArrayLike = self.size_scale
        if self.layer_scale is not None:
            scale = self.size_scale * self.layer_scale[...]
        q, k, options = multivariate_scores(
            self.query(x),
            self.key(x),
            self.time_key(time),
            self.channel_key(channel),
            self.biases[...],
            scale=scale,
            window=self.window,
            content=self.content,
        )
        if mask is not None:
            mask = jnp.asarray(mask)
            if mask.shape != x.shape[:3] or mask.dtype != jnp.bool_:
                raise ValueError(f"mask must be boolean (B, T, C) = {x.shape[:3]}, got {mask.dtype} {mask.shape}")
            # Tokens that do not exist are a segment that no query is in.
            absent = jnp.logical_not(mask.reshape(batch, -1)).astype(jnp.int32)
            options["segment_ids"] = (jnp.zeros_like(absent), absent)
        v = self.value(x)
        return q, k, v.reshape(batch, times * channels, *v.shape[3:]), options

    def _table(self, name: str, table: ArrayLike, length: int, dtype: Any) -> jax.Array:
        table = jnp.asarray(table, dtype)
        if table.shape not in ((length, self.features), (1, length, self.features)):
            raise ValueError(f"{name} must be (1, {length}, {self.features}) for these tokens, got {table.shape}")
        return table.reshape(length, self.features)
