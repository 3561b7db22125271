"""Language model with landmark attention (Mohtashami and Jaggi, 2023, arXiv:2305.16300; epfml/landmark-attention).

GPT-2's blocks with rotary positions, without biases, and a landmark token behind every F others:

    x = E[t];   logits = layer_norm(x) Eᵀ
    in each block    x = x + landmark_attention(layer_norm(x));   x = x + gelu(layer_norm(x) W_1) W_2

Called, prefilled and stepped it is a `LanguageModel` whose landmarks are the tokens of that id. `extend` reads a text
of any length in runs: it inserts the landmarks, keeps `memory_blocks` blocks of every layer, and each query sees those
that it retrieves. Maps and tokens are drawn from a normal distribution of standard deviation 0.02, the last map of a
branch smaller by √(2 L).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from attnlab.attention.sparse.landmark_attention import LandmarkAttention, Landmarks
from attnlab.contract import UnsupportedArgument, View
from attnlab.models.language_model import LanguageModel, LanguageState
from attnlab.nn.heads import redraw_kernels
from attnlab.nn.landmark_memory import LandmarkMemory, Selection
from attnlab.nn.landmarks import SoftmaxName
from attnlab.registry import Cost, Kind, Paper, Source, register

Memory = tuple[LandmarkMemory, ...]


def with_landmarks(tokens: ArrayLike, frequency: int, landmark_id: int, *, before: int = 0) -> jax.Array:
    """Ids with a landmark behind every `frequency` of them: `(B, N)` to `(B, N + (before + N) // frequency)`.

    Args:
      tokens: integer ids `(B, N)`.
      frequency: F.
      landmark_id: id of a landmark.
      before: tokens of the open block, which stand in front.
    """
    tokens = jnp.asarray(tokens)
    total = tokens.shape[1] + (before + tokens.shape[1]) // frequency
    places = (before + np.arange(total)) % (frequency + 1)
    index = np.where(places < frequency, np.cumsum(places < frequency) - 1, -1)
    ids = jnp.concatenate([tokens, jnp.full_like(tokens[:, :1], landmark_id)], axis=1)
    return ids[:, index]


@register(
    "landmark_attention.gpt",
    kind=Kind.BACKBONE,
    paper=Paper(
        "Landmark Attention: Random-Access Infinite Context Length for Transformers",
        "Mohtashami and Jaggi",
        2023,
        arxiv="2305.16300",
        number=95,
    ),
    source=Source.AUTHORS_CODE,
    repository="epfml/landmark-attention",
    cost=Cost(
        time="O(N²·C), with a memory O(N·(Z + K·F)·C)",
        memory="O(N·max_landmarks·H), with a memory O(N·K·F·C)",
        state="2·L·N·C, with a memory 2·L·Z·(F+1)·C",
    ),
    kernel="block_sparse_attention",
    summary="decoder language model that reads texts of any length, retrieving blocks by their landmark tokens",
    small={"vocab_size": 11, "features": 16, "depth": 1, "num_heads": 2, "landmark_id": 10, "frequency": 2},
)
class LandmarkGPT(LanguageModel):
    """Token ids `(B, N)` to logits `(B, N, vocab_size)` in float32; `extend` also takes and returns a memory.

    Args:
      vocab_size: number of token ids, the landmark's among them.
      features: channels C.
      depth: number of blocks.
      num_heads: heads of each mixer.
      landmark_id: id of landmarks; the last one when None.
      frequency: tokens F between landmarks that `extend` inserts.
      memory_blocks: blocks Z that a layer keeps in `extend`.
      topk: blocks K that each query retrieves; none with 0.
      selection: who chooses them: "per_token_and_head", "max_over_heads" or "max_over_tokens".
      softmax: "grouped"; "plain", landmarks being tokens like others, though unseen by themselves; "tokens", without
        landmarks.
      max_landmarks: most landmarks of a sequence in a call; as many as tokens when None. The fewer, the less memory;
        with more of them logits are NaN.
      mlp_features: hidden channels of the feed-forward; 4 C when None.
      bias: whether maps and norms have biases.
      norm_eps: of all norms.
      rotary_base: base of the rotary frequencies.
      dropout: rate after the embedding, inside the feed-forward, and on weights and results of attention.
      remat: recompute blocks in the backward pass.
      dtype: of the computation, float32 when None.
      param_dtype: of the parameters.
      rngs: streams `params` and `dropout`.

    Raises:
      ValueError: for a landmark that is no id, or options out of range.
    """

    def __init__(
        self,
        vocab_size: int = 50304,
        *,
        features: int = 1024,
        depth: int = 12,
        num_heads: int = 8,
        landmark_id: int | None = None,
        frequency: int = 50,
        memory_blocks: int = 40,
        topk: int = 1,
        selection: Selection = "per_token_and_head",
        softmax: SoftmaxName = "grouped",
        max_landmarks: int | None = None,
        mlp_features: int | None = None,
        bias: bool = False,
        norm_eps: float = 1e-5,
        rotary_base: float = 10000.0,
        dropout: float = 0.0,
        remat: bool = False,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        landmark_id = vocab_size - 1 if landmark_id is None else landmark_id
        if not 0 <= landmark_id < vocab_size:
            raise ValueError(f"landmark_id must be an id in 0..{vocab_size - 1}, got {landmark_id}")
        if frequency < 1 or memory_blocks < 1:
            raise ValueError(f"frequency and memory_blocks must be at least 1, got {frequency} and {memory_blocks}")
        mixer: dict[str, Any] = {"block_length": frequency + 1, "softmax": softmax, "max_landmarks": max_landmarks}
        mixer |= {"topk": topk, "selection": selection, "qkv_bias": bias, "out_bias": bias}
        mixer |= {"attention_dropout": dropout, "projection_dropout": dropout}
        super().__init__(
            vocab_size,
            features=features,
            depth=depth,
            num_heads=num_heads,
            mixer="landmark_attention",
            mixer_options={"landmark_attention": mixer},
            mlp="gelu",
            mlp_features=4 * features if mlp_features is None else mlp_features,
            mlp_bias=bias,
            norm="layer",
            norm_eps=norm_eps,
            norm_bias=bias,
            rotary_base=rotary_base,
            embed_scale=1.0,
            dropout=dropout,
            remat=remat,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        self.landmark_id, self.frequency, self.memory_blocks = landmark_id, frequency, memory_blocks
        normal = nnx.initializers.normal(0.02)
        redraw_kernels(self, normal, rngs=rngs)
        for block in self.blocks.blocks:
            for last in (block.mixer.out, block.mlp.fc2):
                last.kernel[...] = last.kernel[...] / (2 * depth) ** 0.5
        self.embedding[...] = normal(rngs.params(), self.embedding.shape, param_dtype)

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
        """Logits of every position, those of landmarks among them; arguments as in `LanguageModel`.

        Raises:
          UnsupportedArgument: for embeddings, which do not say what is a landmark, or a mask of pairs.
        """
        view = self._with_landmarks(tokens, embeddings, mask)
        rest: dict[str, Any] = {"segment_ids": segment_ids, "positions": positions, "deterministic": deterministic}
        return super().__call__(tokens, mask=view, **rest)

    def prefill(
        self,
        tokens: ArrayLike | None,
        state: LanguageState,
        *,
        embeddings: ArrayLike | None = None,
        mask: ArrayLike | View | None = None,
        positions: ArrayLike | None = None,
    ) -> tuple[jax.Array, LanguageState]:
        view = self._with_landmarks(tokens, embeddings, mask)
        return super().prefill(tokens, state, mask=view, positions=positions)

    def step(
        self, token: ArrayLike | None, state: LanguageState, *, embeddings: ArrayLike | None = None
    ) -> tuple[jax.Array, LanguageState]:
        token = None if token is None else jnp.asarray(token)[:, None]
        logits, state = self.prefill(token, state, embeddings=embeddings)
        return logits[:, 0], state

    def init_memory(self, batch_size: int) -> Memory:
        """The memory of all layers before the first token."""
        memories = []
        for block in self.blocks.blocks:
            assert isinstance(block.mixer, LandmarkAttention)
            memories.append(block.mixer.init_memory(batch_size, self.memory_blocks, dtype=self.dtype))
        return tuple(memories)

    def extend(self, tokens: ArrayLike, memory: Memory | None = None) -> tuple[jax.Array, Memory]:
        """Logits of a run that follows what is in the memory, and the memory with it.

        Args:
          tokens: `(B, N)` integer ids without landmarks, which are inserted.
          memory: what the run before returned; none when None. Under `jit` each length of its open block is compiled,
            at most F + 1 of them.

        Returns:
          `(B, N, vocab_size)`, and the memory of each layer.

        Raises:
          UnsupportedArgument: if an attached intervention edits `tokens`, which memories need one by one.
          ValueError: for a memory of another number of layers.
        """
        tokens = jnp.asarray(tokens)
        memory = self.init_memory(tokens.shape[0]) if memory is None else memory
        if len(memory) != len(self.blocks.blocks):
            raise ValueError(f"memory must be of {len(self.blocks.blocks)} layers, got {len(memory)}")
        edits = self.edits()
        if edits.acts("tokens"):
            raise UnsupportedArgument("tokens are edited: a memory holds those of every layer, one by one")
        before = memory[0].open_keys.shape[1]
        ids = with_landmarks(tokens, self.frequency, self.landmark_id, before=before)
        x = self._placed(self.embed(ids), jnp.arange(ids.shape[1])[None])
        each = (None,) * len(memory) if edits.blocks is None else edits.blocks
        new = []
        for block, old, edit in zip(self.blocks.blocks, memory, each, strict=True):
            x, after = block.prefill(x, old, edits=edit)
            new.append(after)
        kept = np.flatnonzero(~memory[0].is_landmark(ids.shape[1]))
        return self._logits(x[:, kept], edits.model), tuple(new)

    def _with_landmarks(
        self, tokens: ArrayLike | None, embeddings: ArrayLike | None, mask: ArrayLike | View | None
    ) -> View:
        if embeddings is not None:
            raise UnsupportedArgument("embeddings do not say which tokens are landmarks: give tokens")
        if isinstance(mask, View):
            raise UnsupportedArgument("mask must be (B, N): the rule of this model's attention is that of landmarks")
        landmark = jnp.asarray(tokens) == self.landmark_id
        return View(rule=Landmarks(), q_labels=landmark.astype(jnp.int32), mask=mask)
