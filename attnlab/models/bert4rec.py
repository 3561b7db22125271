"""BERT4Rec: the encoder of BERT on a user's items (Sun et al., 2019, arXiv:1904.06690; code: FeiSun/BERT4Rec).

Of item ids, with E a table of items, P of places and S of segment types, of which the first is used:

    x = LN(E[ids] + P + S_0)
    in each layer    x = LN(x + attention(x));   x = LN(x + W_2 gelu(W_1 x + b_1) + b_2)
    head             logits = LN(gelu(W x + b)) Eᵀ + c

Every token sees every real one; padding stands at the end. The network is
BERT's (Devlin et al., 2019, arXiv:1810.04805), with an eps of 1e-12 and the exact GELU; its weights load by the names
of `transformers`. It is trained to fill in masked items: `attnlab.objectives.cloze`, on examples that
`attnlab.data.interactions` makes, and its rankings are judged by `attnlab.analysis.ranking`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from attnlab.attention.dense.softmax_attention import SoftmaxAttention
from attnlab.models.block import Block
from attnlab.models.blocks import Blocks
from attnlab.nn.activations import gelu
from attnlab.nn.heads import redraw_kernels
from attnlab.nn.linear import Linear, trunc_normal
from attnlab.nn.lookup import table_rows
from attnlab.nn.mlp import MLP
from attnlab.nn.norms import LayerNorm
from attnlab.points import Editable, Edits, Pass, visit
from attnlab.registry import Cost, Kind, Paper, Source, register
from pallas_kernels.dtypes import at_least_float32

PAPER = Paper(
    "BERT4Rec: Sequential Recommendation with Bidirectional Encoder Representations from Transformer",
    "Sun et al.",
    2019,
    arxiv="1904.06690",
    number=115,
)
REPOSITORY = "FeiSun/BERT4Rec"
EPS = 1e-12


class _BranchMLP(MLP):
    """A feed-forward of which dropout falls on the result alone."""

    def __init__(self, features: int, hidden_features: int, *, dropout: float, rngs: nnx.Rngs, **options: Any):
        super().__init__(features, hidden_features, activation=gelu, rngs=rngs, **options)
        self.after = nnx.Dropout(dropout, rngs=rngs)

    def __call__(self, x: ArrayLike, *, deterministic: bool = True) -> jax.Array:
        return self.after(super().__call__(x), deterministic=deterministic)


@register(
    "bert4rec",
    kind=Kind.BACKBONE,
    paper=PAPER,
    source=Source.THIRD_PARTY,
    repository=REPOSITORY,
    cost=Cost(time="O(N²·C)", memory="O(N²·H)"),
    summary="a bidirectional encoder of a user's items, which fills in those that are masked",
    small={"vocab_size": 11, "features": 8, "depth": 1, "num_heads": 2, "hidden_features": 16, "max_length": 12},
)
class BERT4Rec(Editable):
    """Item ids `(B, N)` to logits `(B, N, vocab_size)` in float32, or at chosen places `(B, P, vocab_size)`.

    Args:
      vocab_size: number of ids V, those of padding and of the mask included.
      features: channels C.
      depth: number of layers.
      num_heads: heads H.
      hidden_features: of the feed-forwards; 4 C when None.
      max_length: rows of the table of places, at least N.
      num_types: rows of the table of segment types.
      pad_id: id of padding, whose row learns as an answer alone, not from where it stands; None for no such id.
      eps: of the norms.
      causal: whether a token sees only tokens up to itself: the same network from left to right.
      dropout: rate on the embeddings, on weights and on the result of each branch.
      dtype: of the computation, float32 when None.
      param_dtype: of the parameters.
      rngs: streams `params`, and `dropout` if there is any.

    Raises:
      ValueError: for sizes that do not fit.
    """

    model_points = frozenset({"logits"})

    def __init__(
        self,
        vocab_size: int,
        *,
        features: int = 64,
        depth: int = 2,
        num_heads: int = 2,
        hidden_features: int | None = None,
        max_length: int = 200,
        num_types: int = 2,
        pad_id: int | None = 0,
        eps: float = EPS,
        causal: bool = False,
        dropout: float = 0.0,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if min(vocab_size, depth, max_length, num_types) < 1:
            got = vocab_size, depth, max_length, num_types
            raise ValueError(f"vocab_size, depth, max_length and num_types must be at least 1, got {got}")
        stored: dict[str, Any] = {"param_dtype": param_dtype, "rngs": rngs}
        self.vocab_size, self.features, self.max_length, self.causal = vocab_size, features, max_length, causal
        self.pad_id, self.dtype = pad_id, jnp.float32 if dtype is None else dtype
        common: dict[str, Any] = {"dtype": self.dtype, **stored}
        hidden = 4 * features if hidden_features is None else hidden_features

        def table(rows: int, axis: str | None) -> nnx.Param:
            # The authors' optimiser lets all decay that is no bias and in no norm.
            values = trunc_normal(rngs.params(), (rows, features), param_dtype)
            return nnx.Param(values, logical_axes=(axis, "embed"), weight_decay=True)

        self.items = table(vocab_size, "vocab")
        self.places, self.types = (table(rows, None) for rows in (max_length, num_types))
        self.embedding_norm = LayerNorm(features, eps=eps, **stored)
        rates: dict[str, Any] = {"attention_dropout": dropout, "projection_dropout": dropout}

        def block() -> Block:
            mixer = SoftmaxAttention(features, num_heads=num_heads, causal=causal, **rates, **common)
            mlp: MLP = MLP(features, hidden, activation=gelu, **common)
            if dropout > 0:
                mlp = _BranchMLP(features, hidden, dropout=dropout, **common)
            norm1, norm2 = (LayerNorm(features, eps=eps, **stored) for _ in range(2))
            return Block(mixer, mlp, norm1, norm2, order="post")

        self.blocks = Blocks([block() for _ in range(depth)])
        self.transform = Linear(features, features, **common)
        self.transform_norm = LayerNorm(features, eps=eps, **stored)
        self.bias = nnx.Param(jnp.zeros((vocab_size,), param_dtype), logical_axes=("vocab",))
        self.dropout = nnx.Dropout(dropout, rngs=rngs) if dropout > 0 else nnx.data(None)
        redraw_kernels(self, trunc_normal, rngs=rngs)

    def __call__(
        self,
        ids: ArrayLike,
        *,
        mask: ArrayLike | None = None,
        positions: ArrayLike | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """Scores of all items.

        Args:
          ids: `(B, N)` integers.
          mask: `(B, N)` boolean, True where a token is real; all are when None.
          positions: `(B, P)` integers, places whose logits are wanted; all when None.
          deterministic: False in training, for dropout.

        Raises:
          ValueError: as `tokens`, or for positions of another shape.
        """
        edits = self.edits()
        return self._logits(self._tokens(ids, mask, deterministic, edits), positions, edits.model)

    def tokens(self, ids: ArrayLike, *, mask: ArrayLike | None = None, deterministic: bool = True) -> jax.Array:
        """The tokens `(B, N, C)` behind the last layer; arguments as a call's.

        Raises:
          ValueError: for shapes that do not fit, more tokens than places, or ids out of range where they are known.
        """
        return self._tokens(ids, mask, deterministic, self.edits())

    def _tokens(self, ids: ArrayLike, mask: ArrayLike | None, deterministic: bool, edits: Pass) -> jax.Array:
        shape = jnp.shape(ids)
        if len(shape) != 2 or shape[1] > self.max_length:
            raise ValueError(f"ids must be (B, N) with N at most {self.max_length}, got {shape}")
        if mask is not None:
            mask = jnp.asarray(mask)
            if mask.shape != shape or mask.dtype != jnp.bool_:
                raise ValueError(f"mask must be boolean (B, N) = {shape}, got {mask.dtype} {mask.shape}")
        rows = table_rows(self.items[...], ids, "ids")
        if self.pad_id is not None:
            rows = jnp.where(jnp.asarray(ids)[..., None] == self.pad_id, jax.lax.stop_gradient(rows), rows)
        x = rows + self.places[: shape[1]] + self.types[0]
        x = self.embedding_norm(x.astype(self.dtype))
        x = x if self.dropout is None else self.dropout(x, deterministic=deterministic)
        given: dict[str, Any] = {} if mask is None else {"mask": mask}
        return self.blocks(x, edits=edits.blocks, deterministic=deterministic, **given)

    def pooled(self, ids: ArrayLike, *, mask: ArrayLike | None = None, deterministic: bool = True) -> jax.Array:
        """The mean of the real tokens, `(B, C)`; zeros where there are none."""
        x = self.tokens(ids, mask=mask, deterministic=deterministic)
        if mask is None:
            return x.mean(1)
        real = jnp.asarray(mask)[..., None]
        return jnp.where(real, x, jnp.zeros_like(x)).sum(1) / jnp.maximum(real.sum(1), 1).astype(x.dtype)

    def logits(self, x: ArrayLike, positions: ArrayLike | None = None) -> jax.Array:
        """The head: tokens `(B, N, C)` to float32 logits `(B, N, V)`, or `(B, P, V)` at `positions` `(B, P)`.

        Raises:
          ValueError: for positions that are no `(B, P)`.
        """
        return self._logits(jnp.asarray(x), positions, self.edits().model)

    def _logits(self, x: jax.Array, positions: ArrayLike | None, edits: Edits | None) -> jax.Array:
        if positions is not None:
            if jnp.ndim(positions) != 2 or jnp.shape(positions)[0] != x.shape[0]:
                raise ValueError(f"positions must be (B, P) with B = {x.shape[0]}, got {jnp.shape(positions)}")
            x = jax.vmap(lambda rows, at: table_rows(rows, at, "positions"))(x, jnp.asarray(positions))
        x = self.transform_norm(gelu(self.transform(x)))
        wide = at_least_float32(x.dtype)
        table = self.items[...].astype(x.dtype)
        scores = jnp.einsum("bnc,vc->bnv", x, table, preferred_element_type=wide)
        return visit(self, edits, "logits", scores + self.bias[...].astype(wide))
