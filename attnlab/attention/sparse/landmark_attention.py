"""Landmark attention (Mohtashami and Jaggi, 2023, arXiv:2305.16300; code: epfml/landmark-attention).

Text is cut into blocks, each closed by a landmark token, by whose key a query decides how much the whole block counts.
With s_ij = q_i·k_j / √D, L_i the tokens before i in its own block, m_b the landmark of an earlier block b and E_b its
other tokens, all of one softmax over L_i and the landmarks together, and of one inside each block:

    p_i = softmax(s_ij over j ∈ L_i ∪ {m_b})            the block's own landmark is seen by none of its tokens
    a_ij = p_ij for j ∈ L_i,    a_ij = p_i,m_b · softmax_j(s_ij over j ∈ E_b) for j ∈ E_b,    0 for landmarks
    y_i = Σ_j a_ij v_j

Values of landmarks never count. With ℓ_ib = log Σ_{j ∈ E_b} exp s_ij, the log of the sum over a group of keys, this is
one ordinary softmax over tokens whose scores are shifted by a table of rows,

    s'_ij = s_ij + s_i,m_b - ℓ_ib for j ∈ E_b,     s'_ij = s_ij for j ∈ L_i

and so it runs: `key_group_lse`, then `block_sparse_attention` with a score modification. Training costs O(N²·D) per
head and O(N²/(F + 1)) memory for the table, F tokens between landmarks. A block that holds nothing beside its landmark
takes its weight and gives nothing. What retrieves blocks by their landmarks is `attnlab.nn.landmark_memory`.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from attnlab.contract import Given, Layout, Pattern, UnsupportedArgument, View, record
from attnlab.nn.cache import KVCache
from attnlab.nn.dense_mixer import Core, Heads
from attnlab.nn.landmark_memory import LandmarkMemory, Selection, attend_memory, check_retrieval
from attnlab.nn.landmarks import SoftmaxName, check_softmax, landmark_attention, landmark_grouped_softmax
from attnlab.nn.masking import LabelRule, both, masked_softmax, segment_pair, visible_keys
from attnlab.nn.places import places_among
from attnlab.nn.projected_mixer import ProjectedMixer
from attnlab.nn.rotary import Rotary
from attnlab.nn.softmax import attention_scores
from attnlab.nn.softmax_core import ProductCore
from attnlab.points import Edits, acts, visit
from attnlab.registry import Cost, Example, Kind, Paper, Source, register
from pallas_kernels.masks import Causal

_PAPER = Paper(
    "Landmark Attention: Random-Access Infinite Context Length for Transformers",
    "Mohtashami and Jaggi",
    2023,
    arxiv="2305.16300",
    number=95,
)
_REPOSITORY = "epfml/landmark-attention"


def _example() -> Example:
    rng = np.random.default_rng(0)
    scores = rng.standard_normal((2, 2, 7, 7)).astype(np.float32)
    return Example(landmark_grouped_softmax, (scores, np.arange(7) % [[3], [4]] == 2), batched=(0, 1))


register(
    "landmark_attention.softmax",
    kind=Kind.FUNCTION,
    paper=_PAPER,
    source=Source.AUTHORS_CODE,
    repository=_REPOSITORY,
    cost=Cost(time="O(N·M·H)", memory="O(N·M·H)"),
    summary="softmax in groups: a block's weight is its landmark's, shared out by a softmax inside the block",
    small=_example,
)(landmark_grouped_softmax)


@dataclasses.dataclass(frozen=True)
class Landmarks(LabelRule):
    """Causal attention in which the tokens of label 1 are landmarks: `View(rule=Landmarks(), q_labels=is_landmark)`."""

    def on_labels(self, q_labels: jax.Array, k_labels: jax.Array) -> jax.Array:
        raise ValueError("Landmarks() is a rule of landmark attention, which reads it itself")


@dataclasses.dataclass(frozen=True)
class _Marked(Causal):
    """The causal rule of a view that is complete: whether landmarks follow from places, and whether keys are cached."""

    regular: bool = False
    cached: bool = False


class LandmarkCore(ProductCore):
    """Between the projections: rotary positions, the cache with its landmarks, and the grouped softmax.

    Args:
      block_length: tokens of a block, its landmark included, where no view says which tokens are landmarks.
      softmax: "grouped"; "plain", landmarks being tokens like others, though unseen by themselves; "tokens", without
        landmarks.
      max_landmarks: most landmarks of a sequence where a view says which they are; as many as tokens when None.
      scale: of the scores; D^-1/2 when None.
      kernel: name of an implementation of `block_sparse_attention`; the best one when None.
      **options: those of `ProductCore`.

    Raises:
      ValueError: for options out of range.
    """

    permutation_equivariant = False

    def __init__(
        self,
        *,
        block_length: int = 51,
        softmax: SoftmaxName = "grouped",
        max_landmarks: int | None = None,
        scale: float | None = None,
        kernel: str | None = None,
        **options: Any,
    ):
        super().__init__(**options)
        check_softmax(softmax)
        if block_length < 2:
            raise ValueError(f"block_length must be at least 2, a token and its landmark, got {block_length}")
        if max_landmarks is not None and max_landmarks < 0:
            raise ValueError(f"max_landmarks must be at least 0, got {max_landmarks}")
        self.block_length, self.softmax, self.max_landmarks = int(block_length), softmax, max_landmarks
        self.scale, self.kernel, self.permutation_equivariant = scale, kernel, False

    def placed(
        self, heads: Heads, view: View, cache: Any
    ) -> tuple[jax.Array, jax.Array, jax.Array, View, KVCache | None]:
        shape, given = heads.q.shape[:2], view.rule == Landmarks()
        if view.rule not in (None, Causal(), Landmarks()):
            raise UnsupportedArgument(f"rule must be Landmarks() or none here, got {view.rule}: attention is causal")
        if given and view.q_labels is None:
            raise ValueError("the rule Landmarks() needs q_labels, 1 at landmarks")
        regular = cache is None and not given and view.mask is None and view.segment_ids is None
        if given:
            labels = jnp.broadcast_to(jnp.asarray(view.q_labels, jnp.int32), shape)
        elif regular:
            labels = (jnp.arange(shape[1]) % self.block_length == self.block_length - 1)[None].astype(jnp.int32)
        else:
            real = jnp.ones(shape, bool) if view.mask is None else view.mask
            ids = None if view.segment_ids is None else segment_pair(view.segment_ids)[0]
            place = places_among(real, ids) if cache is None else cache.order(shape[1], view.mask)
            labels = (place % self.block_length == self.block_length - 1).astype(jnp.int32)
        view = dataclasses.replace(view, rule=Causal(), q_labels=labels, k_labels=labels)
        q, k, v, view, new = super().placed(heads, view, cache)
        return q, k, v, dataclasses.replace(view, rule=_Marked(regular=not given, cached=cache is not None)), new

    def weights(
        self, q: jax.Array, k: jax.Array, view: View, *, edits: Edits | None = None, owner: nnx.Module | None = None
    ) -> jax.Array:
        scores = attention_scores(q, k, scale=self.scale)
        scores = self.edited(edits, owner, "scores", scores, view=view, q=q, k=k)
        flags, allowed = jnp.asarray(view.k_labels) == 1, visible_keys(view)
        if self.softmax == "grouped":
            if view.mask is not None:
                flags = flags & view.mask
            return landmark_grouped_softmax(scores, flags, mask=allowed)
        unseen = flags[:, None, None]
        if self.softmax == "plain":
            rows, columns = jnp.atleast_2d(view.q_idx)[:, None, :, None], jnp.atleast_2d(view.k_idx)[:, None, None, :]
            unseen = unseen & (rows == columns)
        return masked_softmax(scores, both(allowed, ~unseen))

    def attend(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        view: View,
        *,
        edits: Edits | None = None,
        deterministic: bool = True,
        owner: nnx.Module | None = None,
    ) -> jax.Array:
        if acts(edits, "scores", "attention") or (not deterministic and self.dropout_rngs is not None):
            return super().attend(q, k, v, view, edits=edits, deterministic=deterministic, owner=owner)
        if owner is not None:
            record(owner, "scores", lambda: attention_scores(q, k, scale=self.scale))
            record(owner, "attention", lambda: self.weights(q, k, view))
        mark, ids = view.rule, None if view.segment_ids is None else segment_pair(view.segment_ids)[0]
        assert isinstance(mark, _Marked)
        given: dict[str, Any] = {"softmax": self.softmax, "scale": self.scale, "implementation": self.kernel}
        if mark.regular and not mark.cached:
            return landmark_attention(q, k, v, self.block_length, mask=view.mask, segment_ids=ids, **given)
        given["max_landmarks"] = k.shape[1] // self.block_length if mark.regular else self.max_landmarks
        given["index"] = view.q_idx if mark.cached else 0
        k, v = k.astype(q.dtype), v.astype(q.dtype)
        flags = jnp.broadcast_to(jnp.asarray(view.k_labels) == 1, k.shape[:2])
        return landmark_attention(q, k, v, flags, mask=view.mask, segment_ids=ids, **given)


@register(
    "landmark_attention",
    paper=_PAPER,
    source=Source.AUTHORS_CODE,
    repository=_REPOSITORY,
    cost=Cost(
        time="O(N²·H·D), with a memory O(N·(Z + K·F)·H·D)",
        memory="O(N²/F·H), with a memory O(N·K·F·H·D)",
        state="M·G·(D+E), with a memory Z·(F+1)·G·(D+E)",
    ),
    kernel="block_sparse_attention",
    summary="blocks count by the key of the landmark token that closes them, by which they are retrieved too",
    small={"block_length": 4},
)
class LandmarkAttention(ProjectedMixer):
    """Causal self-attention of sequences `(B, N, C)`. See the module docstring for the equations.

    Which tokens are landmarks a `View(rule=Landmarks(), q_labels=is_landmark)` in the place of the mask says, 1 at
    landmarks; without it, every `block_length`-th token is one, counted from the start of each segment.

    Args:
      features: channels C.
      num_heads: query heads H.
      block_length: tokens of a block, its landmark included, F + 1; the paper's is 51.
      softmax: "grouped"; "plain", landmarks being tokens like others, though unseen by themselves; "tokens", without
        landmarks.
      max_landmarks: most landmarks of a sequence where a view says which they are; as many as tokens when None. With
        more of them the result is NaN.
      topk: blocks K that each query retrieves from a memory.
      selection: who chooses them: "per_token_and_head", "max_over_heads" or "max_over_tokens".
      causal: True; there is no other form.
      rotary: rotary positions, or theta for `Rotary(theta, interleaved=True)`, as the authors have it.
      scale: of the scores; D^-1/2 when None.
      attention_dropout: rate on the weights.
      kernel: name of an implementation of `block_sparse_attention`; the best one when None.
      qkv_bias: whether the maps to queries, keys and values have a bias.
      out_bias: whether the last map has one.
      rngs: streams `params`, and `dropout` if there is any.
      **projections: sizes of the projections and dropout of the result: see `ProjectedMixer`.

    Raises:
      ValueError: for options out of range, or sizes that do not fit.
    """

    patterns = frozenset({Pattern.CAUSAL_SELF})
    layouts = frozenset({Layout.SEQUENCE})
    core: LandmarkCore

    def __init__(
        self,
        features: int,
        *,
        num_heads: int,
        block_length: int = 51,
        softmax: SoftmaxName = "grouped",
        max_landmarks: int | None = None,
        topk: int = 1,
        selection: Selection = "per_token_and_head",
        causal: bool = True,
        rotary: Rotary | float | None = None,
        scale: float | None = None,
        attention_dropout: float = 0.0,
        kernel: str | None = None,
        qkv_bias: bool = False,
        out_bias: bool = False,
        rngs: nnx.Rngs,
        **projections: Any,
    ):
        if not causal:
            raise UnsupportedArgument(f"{type(self).__name__} must be causal: a landmark closes the block before it")
        check_retrieval(topk, selection)
        biases: dict[str, Any] = {"qkv_bias": qkv_bias, "out_bias": out_bias}
        super().__init__(features, num_heads=num_heads, causal=True, **biases, **projections, rngs=rngs)
        self.topk, self.selection = topk, selection
        core: dict[str, Any] = {"softmax": softmax, "max_landmarks": max_landmarks, "scale": scale, "kernel": kernel}
        core |= {"rotary": Rotary.of(rotary, interleaved=True), "dropout": attention_dropout}
        self.set_core(LandmarkCore(block_length=block_length, **core, rngs=rngs))

    def set_core(self, core: Core) -> None:
        if not isinstance(core, LandmarkCore):
            raise ValueError(f"core must be a LandmarkCore, got {type(core).__name__}")
        super().set_core(core)
        self.accepts = self.accepts - {"mask"}

    def init_memory(self, batch_size: int, blocks: int, *, dtype: Any = None) -> LandmarkMemory:
        """An empty memory for so many blocks, a decode state that `prefill` and `step` take too.

        Behind it a run is seen together with the blocks that it retrieves, not with all tokens before. Its landmarks
        are every `block_length`-th token.

        Args:
          batch_size: B.
          blocks: Z.
          dtype: of keys and values, float32 when None.
        """
        return LandmarkMemory.create(batch_size, blocks, self.core.block_length - 1, self.sizes, dtype=dtype)

    def prefill(
        self,
        x: ArrayLike,
        state: Any,
        *,
        mask: ArrayLike | View | None = None,
        positions: ArrayLike | None = None,
        edits: Edits | None = None,
    ) -> tuple[jax.Array, Any]:
        """Appends a run of tokens to a cache, or to a `LandmarkMemory`.

        Raises:
          UnsupportedArgument: with a memory, for a mask or positions, which follow from it.
          ValueError: as `DenseMixer.prefill`.
        """
        if not isinstance(state, LandmarkMemory):
            return super().prefill(x, state, mask=mask, positions=positions, edits=edits)
        self.check_call(x, decoding=True)
        for name, given in (("mask", mask), ("positions", positions)):
            if given is not None:
                raise UnsupportedArgument(f"{name} is not taken with a memory, from which it follows")
        if acts(edits, "scores", "attention"):
            raise UnsupportedArgument("scores and attention are not edited with a memory: there are no such maps")
        x = jnp.asarray(x, self.dtype)
        heads = visit(self, edits, "qkv", self.project(x, x, Given(edits=edits)))
        core = self.core
        options: dict[str, Any] = {"rotary": core.rotary, "softmax": core.softmax, "scale": core.scale}
        options |= {"topk": self.topk, "selection": self.selection, "implementation": core.kernel}
        y, state = attend_memory(heads.q, heads.k, heads.v, state, **options)
        return self.merge(visit(self, edits, "heads", y), x), state
