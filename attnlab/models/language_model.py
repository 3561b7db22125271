"""Language model with any registered mixer in each layer; causal, or with `causal=False` one that sees both ways.

Embedding, `depth` pre-norm blocks (RMSNorm, SwiGLU), a norm and a linear map to logits. Generation runs on the mixers'
decode states: constant in memory where all mixers are linear, a cache of keys and values where they are not.

`models.gpt2` and `models.llama` are configurations of it that take published weights.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from attnlab.contract import Layout, Site, UnsupportedArgument, View
from attnlab.models.block import MixerNames, MixerOptions, MLPName, Order, blocks_for, norm_for
from attnlab.models.blocks import Blocks
from attnlab.models.inputs import TokenIds
from attnlab.nn.linear import Linear
from attnlab.nn.lookup import table_rows
from attnlab.points import Editable, Edits, visit
from pallas_kernels.dtypes import at_least_float32
from pallas_kernels.integers import integers
from pallas_kernels.promotion import numpy_ranks

POSITIONS = ("rotary", "learned", "none")


class LanguageState(NamedTuple):
    """Decode state.

    Attributes:
      mixers: the state of each mixer.
      length: `(B,)` int32, the number of tokens seen.
      position: `(B,)` int32, the position after the last token's: `length`, unless positions were given.
      memories: what interventions remember, see `attnlab.points`; () without any.
    """

    mixers: tuple[Any, ...]
    length: jax.Array
    position: jax.Array
    memories: tuple[Any, ...] = ()


class LanguageModel(Editable):
    """Token ids `(B, N)` to logits `(B, N, vocab_size)` in float32; causal logits at n predict token n + 1.

    Args:
      vocab_size: number of token ids.
      features: channels C.
      depth: number of blocks.
      num_heads: heads of each mixer.
      mixer: name of a registered mixer with a causal form, or a pattern of names repeated over the depth; a name for
        each layer is any plan.
      mixer_options: constructor options by mixer name.
      causal: whether tokens see only those before them; without, nothing is decoded.
      mlp: `"swiglu"`, `"geglu"`, `"sglu"`, `"gelu"`, `"gelu_tanh"`, `"relu"`, `"linear"` or `"uome"`, or a pattern; see
        `block_for`.
      mlp_ratio: hidden channels of the feed-forward over C; 8/3 gives SwiGLU the weights of a GELU of ratio 4.
      mlp_features: hidden channels, in place of the ratio.
      mlp_bias: whether the feed-forward has biases; its usual choice when None.
      norm: `"rms"`, `"layer"` or `"srms"` (RMSNorm without weights).
      norm_eps: of all norms.
      norm_bias: whether a LayerNorm has a bias, as it does when None; the others have none.
      order: `"pre"`, norms before the branches, or `"post"`, after the sums.
      without: layers without a piece: `{"mixer": [0], "mlp": [1], "norm1": [], "norm2": []}`; with a branch its norm is
        left out too.
      final_norm: whether a norm stands in front of the logits.
      position: how order is seen beyond what a mixer's own decay tells: `"rotary"` (of queries and keys, in those
        mixers that have the option), `"learned"` (a table of `max_length` rows), or `"none"`.
      max_length: longest sequence of a learned table; None without one.
      rotary_base: base of the rotary frequencies.
      embed_scale: factor of the embedding, with its position, in front of the first block; √C when None, so that its
        entries, drawn with variance 1 / C for the sake of the logits, stand there with variance 1.
      tie_embeddings: whether logits use the embedding's weights.
      dropout: rate after the embedding and inside the feed-forward.
      drop_path: stochastic depth rate of the last block.
      remat: recompute blocks in the backward pass.
      dtype: of the computation, float32 when None.
      param_dtype: of the parameters.
      rngs: streams `params` and `dropout`.

    Raises:
      ValueError: for an unknown option, or `max_length` without a learned table or a learned table without it.
      UnsupportedArgument: for a mixer without a form of that pattern.
    """

    model_points = frozenset({"logits"})

    inputs: ClassVar[TokenIds] = TokenIds()

    def __init__(
        self,
        vocab_size: int,
        *,
        features: int = 512,
        depth: int = 8,
        num_heads: int = 8,
        mixer: MixerNames = "softmax_attention",
        mixer_options: MixerOptions | None = None,
        causal: bool = True,
        mlp: MLPName | Sequence[MLPName] = "swiglu",
        mlp_ratio: float = 8 / 3,
        mlp_features: int | None = None,
        mlp_bias: bool | None = None,
        norm: Literal["rms", "layer", "srms"] = "rms",
        norm_eps: float = 1e-6,
        norm_bias: bool | None = None,
        order: Order = "pre",
        without: Mapping[str, Sequence[int]] | None = None,
        final_norm: bool = True,
        position: Literal["rotary", "learned", "none"] = "rotary",
        max_length: int | None = None,
        rotary_base: float = 10000.0,
        embed_scale: float | None = None,
        tie_embeddings: bool = True,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        remat: bool = False,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if position not in POSITIONS:
            raise ValueError(f"position must be one of {', '.join(POSITIONS)}, got {position!r}")
        if (position == "learned") != (max_length is not None):
            raise ValueError(f"max_length goes with position='learned': got {max_length} with {position!r}")
        common = {"dtype": dtype, "param_dtype": param_dtype}
        self.vocab_size, self.features, self.causal, self.max_length = vocab_size, features, causal, max_length
        self.embed_scale = features**0.5 if embed_scale is None else embed_scale
        self.dtype = jnp.float32 if dtype is None else dtype
        embedding = features**-0.5 * jax.random.normal(rngs.params(), (vocab_size, features), param_dtype)
        self.embedding = nnx.Param(embedding, logical_axes=("vocab", "embed"))
        self.position = nnx.data(None)
        if max_length is not None:
            table = 0.5 * features**-0.5 * jax.random.normal(rngs.params(), (max_length, features), param_dtype)
            self.position = nnx.Param(table, logical_axes=(None, "embed"))
        self.dropout = nnx.Dropout(dropout, rngs=rngs) if dropout else nnx.data(None)
        blocks = blocks_for(
            Site(
                features,
                num_heads,
                layout=Layout.SEQUENCE,
                causal=causal,
                num_layers=depth,
                rotary=rotary_base if position == "rotary" else None,
            ),
            depth,
            mixer=mixer,
            mixer_options=mixer_options,
            mlp=mlp,
            mlp_ratio=mlp_ratio,
            mlp_features=mlp_features,
            mlp_bias=mlp_bias,
            norm=norm,
            norm_eps=norm_eps,
            norm_bias=norm_bias,
            order=order,
            without=without,
            dropout=dropout,
            drop_path=drop_path,
            **common,
            rngs=rngs,
        )
        self.blocks = Blocks(blocks, remat=remat)
        self.norm = nnx.data(None)
        if final_norm:
            self.norm = norm_for(features, norm, eps=norm_eps, bias=norm_bias, param_dtype=param_dtype, rngs=rngs)
        self.head = nnx.data(None)
        if not tie_embeddings:
            self.head = Linear(features, vocab_size, use_bias=False, axes=("embed", "vocab"), **common, rngs=rngs)

    @numpy_ranks()
    def __call__(
        self,
        tokens: ArrayLike | None = None,
        *,
        embeddings: ArrayLike | None = None,
        mask: ArrayLike | View | None = None,
        segment_ids: ArrayLike | None = None,
        positions: ArrayLike | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """Logits of every position.

        Args:
          tokens: `(B, N)` integer ids.
          embeddings: `(B, N, C)` in place of tokens, as `embed` gives them: in front of positions and scale.
          mask: `(B, N)` boolean, False at padding, or `(B|1, H|1, N, N)`; or a `View`, whose rule takes the place of
            the causal one: `View(rule=Causal() | SameLabel(), q_labels=...)` lets an image's tokens see each other.
          segment_ids: `(B, N)` packed documents; tokens see only their own.
          positions: `(B, N)` places of the tokens in their documents; 0..N-1 when None.
          deterministic: False in training, for dropout.

        Raises:
          UnsupportedArgument: for positions that neither a table nor any mixer would use, or a mask that a mixer does
            not take.
          ValueError: for a sequence longer than a learned table, not one of tokens and embeddings, or ids and positions
            that the tables lack; where the values of those are traced, logits are NaN instead.
        """
        given = {"mask": mask, "segment_ids": segment_ids, "positions": positions}
        self._check_positions(positions)
        arguments = {name: value for name, value in given.items() if value is not None}
        arguments["deterministic"] = deterministic
        rows = self._rows(tokens, embeddings)
        x = self._placed(rows, jnp.arange(rows.shape[1])[None] if positions is None else positions)
        if self.dropout is not None:
            x = self.dropout(x, deterministic=deterministic)
        edits = self.edits()
        return self._logits(self.blocks(x, edits=edits.blocks, **arguments), edits.model)

    def init_state(self, batch_size: int, max_length: int | None = None, *, dtype: Any = None) -> LanguageState:
        """State before the first token; `max_length` bounds what caches of keys and values hold.

        Raises:
          UnsupportedArgument: for a model that is not causal.
          ValueError: if `max_length` is missing or beyond the table, for a model with learned positions.
        """
        if not self.causal:
            raise UnsupportedArgument("causal=False: a model whose tokens see those behind them does not decode")
        if self.max_length is not None and (max_length is None or max_length > self.max_length):
            rows = self.max_length
            raise ValueError(f"max_length must be at most the {rows} rows of the position table, got {max_length}")
        mixers = self.blocks.init_state(batch_size, max_length, dtype=self.dtype if dtype is None else dtype)
        memories = self.init_memories(batch_size, max_length)
        length, position = (jnp.zeros((batch_size,), jnp.int32) for _ in range(2))
        return LanguageState(mixers, length, position, memories)

    def embed(self, tokens: ArrayLike) -> jax.Array:
        """Rows `(..., C)` of the embedding for token ids `(...)`, to be joined with others and given as embeddings."""
        return table_rows(self.embedding[...], tokens, "token ids")

    @numpy_ranks()
    def prefill(
        self,
        tokens: ArrayLike | None,
        state: LanguageState,
        *,
        embeddings: ArrayLike | None = None,
        mask: ArrayLike | View | None = None,
        positions: ArrayLike | None = None,
    ) -> tuple[jax.Array, LanguageState]:
        """Logits `(B, N, vocab_size)` of a run of tokens, or of embeddings `(B, N, C)`, and the state after it.

        `mask` `(B, N)` is False at padding, on the left of shorter prompts; a `View` may also bring a rule and labels,
        as in the call. `positions` `(B, N)` go on from the last token's when None.
        """
        rows = self._rows(tokens, embeddings)
        self._check_positions(positions)
        padding = mask.mask if isinstance(mask, View) else mask
        real = jnp.ones(rows.shape[:2], bool) if padding is None else jnp.asarray(padding)
        seen = jnp.cumsum(real, axis=1, dtype=jnp.int32)
        before = jnp.maximum(seen - 1, 0)
        at = state.position[:, None] + before if positions is None else integers("positions", positions)
        edits = self.edits("prefill", state.memories, jnp.where(real, state.length[:, None] + before, -1))
        if edits.acts("tokens"):
            positions = at  # which do not follow from how many tokens a layer has seen
        x = self._placed(rows, at)
        x, mixers = self.blocks.prefill(x, state.mixers, mask=mask, positions=positions, edits=edits.blocks)
        last = jnp.max(jnp.where(real, at, -1), axis=1).astype(jnp.int32)
        position = jnp.maximum(state.position, last + 1)
        if edits.model is not None and x.shape[1] != rows.shape[1]:
            edits.model.order = None
        logits = self._logits(x, edits.model)
        return logits, LanguageState(mixers, state.length + seen[:, -1], position, edits.memories)

    @numpy_ranks()
    def step(
        self, token: ArrayLike | None, state: LanguageState, *, embeddings: ArrayLike | None = None
    ) -> tuple[jax.Array, LanguageState]:
        """Logits `(B, vocab_size)` after one more token `(B,)`, or its embedding `(B, C)`, and the new state."""
        edits = self.edits("step", state.memories, state.length[:, None])
        x = self._placed(self._rows(token, embeddings), state.position)
        positions = state.position if edits.acts("tokens") else None
        x, mixers = self.blocks.step(x, state.mixers, positions=positions, edits=edits.blocks)
        logits = self._logits(x[:, None], edits.model)[:, 0]
        return logits, LanguageState(mixers, state.length + 1, state.position + 1, edits.memories)

    def _check_positions(self, positions: ArrayLike | None) -> None:
        looked_at = self.position is not None or any(block.looks_at_positions for block in self.blocks.blocks)
        if positions is not None and not looked_at:
            raise UnsupportedArgument("positions are given, but this model's mixers do not depend on them")

    def _rows(self, tokens: ArrayLike | None, embeddings: ArrayLike | None) -> jax.Array:
        """Embeddings `(B, N, C)`, or in a step `(B, C)`."""
        if (tokens is None) == (embeddings is None):
            raise ValueError("either tokens or embeddings must be given, and not both")
        if embeddings is None:
            return self.embed(tokens)
        rows = jnp.asarray(embeddings)
        if rows.shape[-1] != self.features:
            raise ValueError(f"embeddings must have {self.features} channels, got shape {rows.shape}")
        return rows

    def _placed(self, x: jax.Array, positions: ArrayLike) -> jax.Array:
        """With positions, scaled, in the dtype of the computation."""
        if self.position is not None:
            if x.ndim == 3 and x.shape[1] > self.max_length:
                raise ValueError(f"{x.shape[1]} tokens are beyond the position table of {self.max_length} rows")
            x = x + table_rows(self.position[...], positions, "positions")
        return (x * self.embed_scale).astype(self.dtype)

    def _logits(self, x: jax.Array, edits: Edits | None) -> jax.Array:
        x = x if self.norm is None else self.norm(x)
        if self.head is not None:
            logits = self.head(x).astype(at_least_float32(x.dtype))
        else:
            table, wide = self.embedding[...].astype(x.dtype), at_least_float32(x.dtype)
            logits = jnp.einsum("bnc,vc->bnv", x, table, preferred_element_type=wide)
        return visit(self, edits, "logits", logits)
