"""Language models whose attention looks elsewhere, and plans of which layers do (2025, arXiv:2510.11602).

In a variant layer queries and keys are made of another stream s, values of the tokens themselves (paper text; sections
3 and 4.4; what it leaves open is said to be our reading):

    static      s = the embeddings of the input's own tokens, in every layer
    random      s = the same blocks on noise ε, drawn once, the same for all inputs: weights do not depend on the input
    fixed       s = the same blocks on one fixed sequence of tokens

The second stream of the last two is a row in front of the batch: its attention uses its own queries, keys and values,
as every layer's would (our reading), and gradients go through it too. s passes the norm of the block that reads it, and
queries and keys are rotated like others' (our reading). ε has the deviation of the embeddings unless given.

`layer_plan` says which layers are standard, for these and for the paper's other variants (`deconstructed_attention.…`):

    LanguageModel(256, depth=6, mixer=layer_plan("deconstructed_attention.approximate", 6, "hybrid"), rngs=rngs)
"""

from collections.abc import Collection, Sequence
from typing import Any, Literal, TypeVar, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from attnlab.attention.dense.softmax_attention import SoftmaxAttention
from attnlab.attention.linear.deconstructed_attention import PAPER
from attnlab.contract import Constant, Given, UnsupportedArgument, View
from attnlab.models.block import Block
from attnlab.models.language_model import LanguageModel, LanguageState
from attnlab.nn.dense_mixer import Heads
from attnlab.points import Edits
from attnlab.registry import Cost, Kind, Source, register

Plan = Literal["uniform", "hybrid", "odd", "top", "middle", "bottom", "quarter", "first", "last", "bilateral"]
ModelT = TypeVar("ModelT", bound=LanguageModel)


def standard_layers(plan: Plan, depth: int) -> frozenset[int]:
    """Which of the layers 0..depth - 1 keep standard attention.

    The paper's plans of 24 layers, counted from 1 there: "uniform" none; "hybrid" the even ones, "odd" the odd ones;
    "top" the first half, "bottom" the last, "middle" the first and the last quarter; "quarter" every fourth; "first",
    "last", and "bilateral" both of these.

    Raises:
      ValueError: for another plan.
    """
    numbers = range(1, depth + 1)
    chosen = {
        "uniform": [],
        "hybrid": [n for n in numbers if n % 2 == 0],
        "odd": [n for n in numbers if n % 2],
        "top": [n for n in numbers if 2 * n <= depth],
        "middle": [n for n in numbers if 4 * n <= depth or 4 * n > 3 * depth],
        "bottom": [n for n in numbers if 2 * n > depth],
        "quarter": [n for n in numbers if n % 4 == 0],
        "first": [1],
        "last": [depth],
        "bilateral": [1, depth],
    }
    if plan not in chosen:
        raise ValueError(f"plan must be one of {', '.join(chosen)}, got {plan!r}")
    return frozenset(n - 1 for n in chosen[plan])


def layer_plan(
    variant: str, depth: int, plan: Plan = "uniform", *, standard: str = "softmax_attention"
) -> tuple[str, ...]:
    """A mixer's name for each layer, as `LanguageModel` takes them: `variant`, but for the `standard_layers`."""
    kept = standard_layers(plan, depth)
    return tuple(standard if layer in kept else variant for layer in range(depth))


def without_layers(model: ModelT, layers: Collection[int]) -> ModelT:
    """A copy of a trained model that skips layers, as the paper does with the variant layers of a hybrid.

    Raises:
      ValueError: for layers that the model does not have.
    """
    model = nnx.clone(model)
    blocks = list(model.blocks.blocks)
    if not set(layers) <= set(range(len(blocks))):
        raise ValueError(f"layers must be among 0..{len(blocks) - 1}, got {sorted(layers)}")
    model.blocks.blocks = nnx.List([block for layer, block in enumerate(blocks) if layer not in layers])
    return model


class ForeignAttention(SoftmaxAttention):
    """Softmax attention whose queries and keys are those of the rows in front of a batch.

    Args:
      features: channels C.
      each: whether every example has a row of its own in front, and the batch is twice as large; else one row for all.
      **options: those of `SoftmaxAttention`.
    """

    def __init__(self, features: int, *, each: bool, **options: Any):
        super().__init__(features, **options)
        self.each = each

    def project(self, x: jax.Array, source: jax.Array, given: Given) -> Heads:
        front = x[: x.shape[0] // 2 if self.each else 1]
        heads = super().project(front, front, given)
        q, k = (
            jnp.concatenate([part] * 2) if self.each else jnp.broadcast_to(part, (x.shape[0], *part.shape[1:]))
            for part in heads[:2]
        )
        return Heads(q, k, self.value(source))


class HeldBlock(Block):
    """A block that leaves the first half of its batch as it is."""

    sums_branches = False

    def _through(self, x: jax.Array, mix: Any, edits: Edits | None, deterministic: bool) -> tuple[jax.Array, Any]:
        y, new = super()._through(x, mix, edits, deterministic)
        half = x.shape[0] // 2
        return jnp.concatenate([x[:half], y[half:]]), new


@register(
    "deconstructed_attention.foreign",
    kind=Kind.BACKBONE,
    paper=PAPER,
    source=Source.PAPER_TEXT,
    cost=Cost(time="O(N²·H·D)", memory="O(N²·H)", state="N·H·(D+E)"),
    summary="a language model whose queries and keys come from embeddings, noise or one fixed text",
    small={"vocab_size": 11, "source": "random", "max_source": 16, "features": 8, "depth": 2, "num_heads": 2},
)
class ForeignLanguageModel(LanguageModel):
    """Token ids `(B, N)` to logits `(B, N, vocab_size)` in float32.

    Args:
      vocab_size: number of token ids.
      source: of queries and keys: "static", "random" or "fixed".
      plan: which layers keep standard attention, see `standard_layers`.
      max_source: tokens of noise; sequences are no longer.
      sequence: token ids of the fixed text; sequences are no longer.
      sigma: deviation of the noise; C^-1/2, that of the embeddings, when None.
      features: channels C.
      depth: number of blocks.
      num_heads: heads.
      rotary_base: base of the rotary positions; None for none.
      dtype: of the computation, float32 when None.
      param_dtype: of the parameters.
      rngs: stream `params`, which also draws the noise.
      **model: further arguments of `LanguageModel`, but for those of mixers and positions.

    Raises:
      ValueError: for another source, or without what it needs.
    """

    def __init__(
        self,
        vocab_size: int,
        *,
        source: Literal["static", "random", "fixed"],
        plan: Plan = "uniform",
        max_source: int | None = None,
        sequence: Sequence[int] | None = None,
        sigma: float | None = None,
        features: int = 512,
        depth: int = 8,
        num_heads: int = 8,
        rotary_base: float | None = 10000.0,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
        **model: Any,
    ):
        needs = {"static": (), "random": ("max_source",), "fixed": ("sequence",)}
        if source not in needs:
            raise ValueError(f"source must be one of {', '.join(needs)}, got {source!r}")
        for name, value in (("max_source", max_source), ("sequence", sequence), ("sigma", sigma)):
            optional = name == "sigma" and source == "random"
            if (value is not None) != (name in needs[source]) and not optional:
                raise ValueError(
                    f"{name} goes with source={'fixed' if name == 'sequence' else 'random'!r}, got {value}"
                )
        common = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        place = {"position": "none"} if rotary_base is None else {"position": "rotary", "rotary_base": rotary_base}
        super().__init__(vocab_size, features=features, depth=depth, num_heads=num_heads, **place, **common, **model)
        self.each, self.noise, self.text = source == "static", nnx.data(None), nnx.data(None)
        if source == "random":
            deviation = features**-0.5 if sigma is None else sigma
            self.noise = Constant(deviation * jax.random.normal(rngs.params(), (max_source, features), param_dtype))
        if sequence is not None:
            self.text = Constant(jnp.asarray(sequence, jnp.int32))
        kept = standard_layers(plan, depth)
        for layer, block in enumerate(self.blocks.blocks):
            if layer not in kept:
                options = {"num_heads": num_heads, "causal": self.causal, "rotary": rotary_base}
                block.mixer = ForeignAttention(features, each=self.each, **options, **common)
        if self.each:
            self.blocks.blocks = nnx.List([_held(block) for block in self.blocks.blocks])

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
        """Logits of every position; arguments as in `LanguageModel`.

        Raises:
          UnsupportedArgument: for a `View`, or a mask of pairs.
          ValueError: for a sequence longer than the noise or the text.
        """
        rows = self._rows(tokens, embeddings)
        front = self._front(rows, jnp.zeros((), jnp.int32))
        if isinstance(mask, View) or (mask is not None and jnp.ndim(mask) != 2):
            raise UnsupportedArgument("a mask here is one of tokens, (B, N): rows stand in front of the batch")
        given = {"mask": mask, "segment_ids": segment_ids, "positions": positions}
        more = {name: self._extended(name, jnp.asarray(value)) for name, value in given.items() if value is not None}
        whole = jnp.concatenate([front, rows])
        y = super().__call__(embeddings=whole, **more, deterministic=deterministic)
        return y[len(front) :]

    def init_state(self, batch_size: int, max_length: int | None = None, *, dtype: Any = None) -> LanguageState:
        """State before the first token, of the rows in front too."""
        return super().init_state(2 * batch_size if self.each else batch_size + 1, max_length, dtype=dtype)

    def prefill(
        self,
        tokens: ArrayLike | None,
        state: LanguageState,
        *,
        embeddings: ArrayLike | None = None,
        mask: ArrayLike | View | None = None,
        positions: ArrayLike | None = None,
    ) -> tuple[jax.Array, LanguageState]:
        """Logits of a run of tokens and the state after it; prompts of one length, whose positions go on.

        Raises:
          UnsupportedArgument: for a mask or positions: weights are those of the places in the second stream.
        """
        for name, value in (("mask", mask), ("positions", positions)):
            if value is not None:
                raise UnsupportedArgument(f"{name}: all examples of a batch stand where the second stream does")
        rows = self._rows(tokens, embeddings)
        front = self._front(rows, state.length[0])
        y, state = super().prefill(None, state, embeddings=jnp.concatenate([front, rows]))
        return y[len(front) :], state

    def step(
        self, token: ArrayLike | None, state: LanguageState, *, embeddings: ArrayLike | None = None
    ) -> tuple[jax.Array, LanguageState]:
        """Logits after one more token, and the new state."""
        rows = self._rows(token, embeddings)
        front = self._front(rows[:, None], state.length[0])[:, 0]
        y, state = super().step(None, state, embeddings=jnp.concatenate([front, rows]))
        return y[len(front) :], state

    def _front(self, rows: jax.Array, start: jax.Array) -> jax.Array:
        """The second stream beside tokens `(B, N, C)` that come after `start` others."""
        if self.each:
            return rows
        whole = self.noise[...] if self.text is None else self.embed(self.text[...])
        if rows.shape[1] > whole.shape[0]:
            raise ValueError(f"{rows.shape[1]} tokens are more than the {whole.shape[0]} of the second stream")
        return jax.lax.dynamic_slice_in_dim(whole, start, rows.shape[1])[None].astype(rows.dtype)

    def _extended(self, name: str, value: jax.Array) -> jax.Array:
        """An argument `(B, N)` with rows for the second stream: all tokens there, one segment, from 0 on."""
        if self.each:
            return jnp.concatenate([value, value])
        first = {"mask": jnp.ones, "segment_ids": jnp.zeros}.get(name)
        row = jnp.arange(value.shape[1])[None] if first is None else first((1, value.shape[1]))
        return jnp.concatenate([row.astype(value.dtype), value])


def _held(block: Block) -> HeldBlock:
    held = HeldBlock(block.mixer, block.mlp, block.norm1, block.norm2, order=block.order)
    held.drop_path = block.drop_path
    return cast(HeldBlock, held)
