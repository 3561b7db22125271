"""Decoder language model with any registered causal mixer in each layer.

Embedding, `depth` pre-norm blocks (RMSNorm, SwiGLU), a norm and a linear map to logits. Generation runs on the mixers'
decode states: constant in memory where all mixers are linear, a cache of keys and values where they are not.
"""

from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from attnlab.contract import Layout, Site, UnsupportedArgument, View
from attnlab.models.block import NORMS, Blocks, MixerNames, MixerOptions, blocks_for
from attnlab.models.inputs import TokenIds
from attnlab.nn.linear import Linear
from attnlab.points import Editable, Edits, visit

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
    """Token ids `(B, N)` to logits `(B, N, vocab_size)` in float32; logits at n predict token n + 1.

    Args:
      vocab_size: number of token ids.
      features: channels C.
      depth: number of blocks.
      num_heads: heads of each mixer.
      mixer: name of a registered mixer with a causal form, or a pattern of names repeated over the depth.
      mixer_options: constructor options by mixer name.
      mlp: `"swiglu"`, `"gelu"` or `"sglu"`; see `Block`.
      mlp_ratio: hidden channels of the feed-forward over C; 8/3 gives SwiGLU the weights of a GELU of ratio 4.
      mlp_bias: whether the feed-forward has biases; its usual choice when None.
      norm: `"rms"`, `"layer"` or `"srms"`; see `Block`.
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
      UnsupportedArgument: for a mixer without a causal form.
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
        mlp: Literal["swiglu", "gelu", "sglu"] = "swiglu",
        mlp_ratio: float = 8 / 3,
        mlp_bias: bool | None = None,
        norm: Literal["rms", "layer", "srms"] = "rms",
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
        self.vocab_size, self.max_length = vocab_size, max_length
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
                causal=True,
                num_layers=depth,
                rotary=rotary_base if position == "rotary" else None,
            ),
            depth,
            mixer=mixer,
            mixer_options=mixer_options,
            mlp=mlp,
            mlp_ratio=mlp_ratio,
            mlp_bias=mlp_bias,
            norm=norm,
            dropout=dropout,
            drop_path=drop_path,
            **common,
            rngs=rngs,
        )
        self.blocks = Blocks(blocks, remat=remat)
        self.norm = NORMS[norm](features, param_dtype=param_dtype, rngs=rngs)
        self.head = nnx.data(None)
        if not tie_embeddings:
            self.head = Linear(features, vocab_size, use_bias=False, axes=("embed", "vocab"), **common, rngs=rngs)

    def __call__(
        self,
        tokens: ArrayLike,
        *,
        mask: ArrayLike | View | None = None,
        segment_ids: ArrayLike | None = None,
        positions: ArrayLike | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """Logits of every position.

        Args:
          tokens: `(B, N)` integer ids.
          mask: `(B, N)` boolean, False at padding, or `(B|1, H|1, N, N)`; or a `View`, whose rule takes the place of
            the causal one: `View(rule=Causal() | SameLabel(), q_labels=...)` lets an image's tokens see each other.
          segment_ids: `(B, N)` packed documents; tokens see only their own.
          positions: `(B, N)` places of the tokens in their documents; 0..N-1 when None.
          deterministic: False in training, for dropout.

        Raises:
          UnsupportedArgument: for positions that neither a table nor any mixer would use, or a mask that a mixer does
            not take.
          ValueError: for a sequence longer than a learned table.
        """
        given = {"mask": mask, "segment_ids": segment_ids, "positions": positions}
        self._check_positions(positions)
        arguments = {name: value for name, value in given.items() if value is not None}
        arguments["deterministic"] = deterministic
        tokens = jnp.asarray(tokens)
        x = self._embed(tokens, jnp.arange(tokens.shape[1])[None] if positions is None else positions)
        if self.dropout is not None:
            x = self.dropout(x, deterministic=deterministic)
        edits = self.edits()
        return self._logits(self.blocks(x, edits=edits.blocks, **arguments), edits.model)

    def init_state(self, batch_size: int, max_length: int | None = None, *, dtype: Any = None) -> LanguageState:
        """State before the first token; `max_length` bounds what caches of keys and values hold.

        Raises:
          ValueError: if `max_length` is missing or beyond the table, for a model with learned positions.
        """
        if self.max_length is not None and (max_length is None or max_length > self.max_length):
            rows = self.max_length
            raise ValueError(f"max_length must be at most the {rows} rows of the position table, got {max_length}")
        mixers = self.blocks.init_state(batch_size, max_length, dtype=self.dtype if dtype is None else dtype)
        memories = self.init_memories(batch_size, max_length)
        length, position = (jnp.zeros((batch_size,), jnp.int32) for _ in range(2))
        return LanguageState(mixers, length, position, memories)

    def prefill(
        self,
        tokens: ArrayLike,
        state: LanguageState,
        *,
        mask: ArrayLike | View | None = None,
        positions: ArrayLike | None = None,
    ) -> tuple[jax.Array, LanguageState]:
        """Logits `(B, N, vocab_size)` of a run of tokens, and the state after it.

        `mask` `(B, N)` is False at padding, on the left of shorter prompts; a `View` may also bring a rule and labels,
        as in the call. `positions` `(B, N)` go on from the last token's when None.
        """
        tokens = jnp.asarray(tokens)
        self._check_positions(positions)
        padding = mask.mask if isinstance(mask, View) else mask
        real = jnp.ones(tokens.shape, bool) if padding is None else jnp.asarray(padding)
        seen = jnp.cumsum(real, axis=1, dtype=jnp.int32)
        before = jnp.maximum(seen - 1, 0)
        at = state.position[:, None] + before if positions is None else jnp.asarray(positions)
        edits = self.edits("prefill", state.memories, jnp.where(real, state.length[:, None] + before, -1))
        if edits.acts("tokens"):
            positions = at  # which do not follow from how many tokens a layer has seen
        x = self._embed(tokens, at)
        x, mixers = self.blocks.prefill(x, state.mixers, mask=mask, positions=positions, edits=edits.blocks)
        last = jnp.max(jnp.where(real, at, -1), axis=1).astype(jnp.int32)
        position = jnp.maximum(state.position, last + 1)
        if edits.model is not None and x.shape[1] != tokens.shape[1]:
            edits.model.order = None
        logits = self._logits(x, edits.model)
        return logits, LanguageState(mixers, state.length + seen[:, -1], position, edits.memories)

    def step(self, token: ArrayLike, state: LanguageState) -> tuple[jax.Array, LanguageState]:
        """Logits `(B, vocab_size)` after one more token `(B,)`, and the new state."""
        edits = self.edits("step", state.memories, state.length[:, None])
        x = self._embed(jnp.asarray(token), state.position)
        positions = state.position if edits.acts("tokens") else None
        x, mixers = self.blocks.step(x, state.mixers, positions=positions, edits=edits.blocks)
        logits = self._logits(x[:, None], edits.model)[:, 0]
        return logits, LanguageState(mixers, state.length + 1, state.position + 1, edits.memories)

    def _check_positions(self, positions: ArrayLike | None) -> None:
        mixers = (block.mixer for block in self.blocks.blocks)
        if positions is not None and self.position is None and not any("positions" in m.accepts for m in mixers):
            raise UnsupportedArgument("positions are given, but this model's mixers do not depend on them")

    def _embed(self, tokens: jax.Array, positions: ArrayLike) -> jax.Array:
        x = self.embedding[...][tokens]
        if self.position is not None:
            if tokens.ndim == 2 and tokens.shape[1] > self.max_length:
                raise ValueError(f"{tokens.shape[1]} tokens are beyond the position table of {self.max_length} rows")
            x = x + self.position[...][positions]
        return (x * self.embed_scale).astype(self.dtype)

    def _logits(self, x: jax.Array, edits: Edits | None) -> jax.Array:
        x = self.norm(x)
        if self.head is not None:
            logits = self.head(x).astype(jnp.float32)
        else:
            table = self.embedding[...].astype(x.dtype)
            logits = jnp.einsum("bnc,vc->bnv", x, table, preferred_element_type=jnp.float32)
        return visit(self, edits, "logits", logits)
