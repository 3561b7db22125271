"""Language model with a memory of earlier segments (Transformer-XL, Dai et al., 2019, arXiv:1901.02860).

A long text is read in segments. Every layer keeps its own inputs for the last tokens of the segments before, at most
`memory_length` of them and without gradients, and its mixer attends to them too:

    z = norm(x);   x = x + mixer(z, [norm(memory) | z]);   x = x + mlp(norm(x));   memory ← last tokens of [memory | x]

where the x that is remembered is the layer's input. The sizes by default are those of the language model of relative
convolutional attention (hermansh-id/rcmha), whose mixer has such a memory; that its feed-forward is of ReLU is our
reading.
"""

import inspect
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from attnlab.contract import UnsupportedArgument
from attnlab.models.block import MixerNames, MixerOptions, MLPName, Order
from attnlab.models.language_model import LanguageModel

Memory = tuple[jax.Array, ...]


class TransformerXL(LanguageModel):
    """Token ids `(B, N)` to logits `(B, N, vocab_size)` in float32; `extend` also takes and returns a memory.

    Called, prefilled and stepped it is a `LanguageModel`, without memory.

    Args:
      vocab_size: number of token ids.
      features: channels C.
      depth: number of blocks.
      num_heads: heads of each mixer.
      mixer: name of a registered mixer that has a method `attend(x, memory)`, or a pattern of names.
      mixer_options: constructor options by mixer name.
      memory_length: tokens that a layer remembers, at least 1.
      mlp: feed-forward, as in `LanguageModel`.
      mlp_features: hidden channels of the feed-forward.
      norm: of all norms, as in `LanguageModel`.
      norm_eps: of all norms.
      order: norms before the branches, or after the sums.
      dropout: rate after the embedding and inside the feed-forward.
      tie_embeddings: whether logits use the embedding's weights.
      dtype: of the computation, float32 when None.
      param_dtype: of the parameters.
      rngs: streams `params` and `dropout`.

    Raises:
      ValueError: for a memory of no token.
      UnsupportedArgument: for a mixer without memory.
    """

    def __init__(
        self,
        vocab_size: int,
        *,
        features: int = 128,
        depth: int = 6,
        num_heads: int = 8,
        mixer: MixerNames = "rcmha",
        mixer_options: MixerOptions | None = None,
        memory_length: int = 128,
        mlp: MLPName = "relu",
        mlp_features: int | None = 256,
        norm: Literal["rms", "layer", "srms"] = "layer",
        norm_eps: float = 1e-5,
        order: Order = "pre",
        dropout: float = 0.0,
        tie_embeddings: bool = False,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if memory_length < 1:
            raise ValueError(f"memory_length must be at least 1, got {memory_length}")
        super().__init__(
            vocab_size,
            features=features,
            depth=depth,
            num_heads=num_heads,
            mixer=mixer,
            mixer_options=mixer_options,
            mlp=mlp,
            mlp_features=mlp_features,
            norm=norm,
            norm_eps=norm_eps,
            order=order,
            position="none",
            dropout=dropout,
            tie_embeddings=tie_embeddings,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        self.memory_length = memory_length
        for block in self.blocks.blocks:
            attend = getattr(block.mixer, "attend", None)
            if attend is None or "memory" not in inspect.signature(attend).parameters:
                raise UnsupportedArgument(f"{type(block.mixer).__name__} has no method attend(x, memory)")

    def init_memory(self, batch_size: int) -> Memory:
        """The memory before the first segment: for each layer no token, `(B, 0, C)`."""
        return tuple(jnp.zeros((batch_size, 0, self.features), self.dtype) for _ in self.blocks.blocks)

    def extend(
        self, tokens: ArrayLike, memory: Memory | None = None, *, deterministic: bool = True
    ) -> tuple[jax.Array, Memory]:
        """Logits of a segment that follows what is in the memory, and the memory with it.

        Args:
          tokens: `(B, N)` integer ids.
          memory: what the segment before returned; none when None. Under `jit` each of its lengths is compiled, until
            it is full.
          deterministic: False in training, for dropout.

        Returns:
          `(B, N, vocab_size)`, and for each layer `(B, M, C)`, M at most `memory_length`.

        Raises:
          UnsupportedArgument: if an attached intervention edits `tokens`, which memories need one by one.
          ValueError: for shapes that do not fit.
        """
        x = self._placed(self._rows(tokens, None), jnp.arange(jnp.shape(tokens)[1])[None])
        memory = self.init_memory(x.shape[0]) if memory is None else memory
        if len(memory) != len(self.blocks.blocks):
            raise ValueError(f"memory must be of {len(self.blocks.blocks)} layers, got {len(memory)}")
        edits = self.edits()
        if edits.acts("tokens"):
            raise UnsupportedArgument("tokens are edited: a memory holds those of every layer, one by one")
        if self.dropout is not None:
            x = self.dropout(x, deterministic=deterministic)
        each = (None,) * len(memory) if edits.blocks is None else edits.blocks
        new = []
        for block, before, edit in zip(self.blocks.blocks, memory, each, strict=True):
            joined = jax.lax.stop_gradient(jnp.concatenate([before, x], axis=1))
            new.append(joined[:, -self.memory_length :])
            x = block.attend(x, jax.lax.stop_gradient(before), edits=edit, deterministic=deterministic)
        return self._logits(x, edits.model), tuple(new)
