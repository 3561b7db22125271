"""The block of EViT: between attention and feed-forward tokens are left out (ICLR 2022, arXiv:2202.07800).

Of the N patch tokens the k stay that the class token attends to most, in descending order; the others are dropped, or
become one token (code: youweiliang/evit):

    x = x + attention(LN(x))
    c_j = mean over heads of softmax(q_cls K^T / √D)_j        j over the patches; the class token's own weight left out
    x = [x_cls, x_j for the k largest c_j, Σ c_j x_j over the others]        k = ⌈rate · N⌉; weights are not normalised
    x = x + MLP(LN(x))

A fused token is a token like any other in later blocks. The choice has no gradient, the weights c of the sum have. At
keep rate 1 a block leaves all tokens where they are.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from attnlab.attention.dense.softmax_attention import SoftmaxAttention
from attnlab.contract import Given, UnsupportedArgument, View, record
from attnlab.models.block import Block
from attnlab.nn.chain import call
from attnlab.nn.dense_mixer import DenseMixer
from attnlab.nn.mlp import MLP
from attnlab.nn.norms import LayerNorm
from attnlab.nn.softmax import weighted_values
from attnlab.nn.softmax_core import ProductCore
from attnlab.nn.token_selection import select_top
from attnlab.points import Edits, visit
from attnlab.registry import Cost, Example, Kind, Paper, Source, register

PAPER = Paper(
    "Not All Patches are What You Need: Expediting Vision Transformers via Token Reorganizations",
    "Liang et al.",
    2022,
    arxiv="2202.07800",
    number=71,
)
SOURCE = {"paper": PAPER, "source": Source.AUTHORS_CODE, "repository": "youweiliang/evit"}
COST = Cost(time="O(N²·H·D), of the N tokens that are left", memory="O(N²·H)")


class Kept(NamedTuple):
    """Tokens that stay.

    Attributes:
      tokens: `(B, N', C)`, the class token in front.
      index: `(B, k)` int32, their places among the patch tokens that came in, by descending score; None where all stay.
    """

    tokens: jax.Array
    index: jax.Array | None


def _keep_example() -> Example:
    keys = jax.random.split(jax.random.key(0), 2)
    x, scores = jax.random.normal(keys[0], (2, 7, 8)), jax.random.uniform(keys[1], (2, 6))
    return Example(keep_tokens, (x, scores), {"count": 3}, (0, 1), (0, 1))


@register(
    "evit.keep_tokens",
    kind=Kind.FUNCTION,
    cost=Cost(time="O(N·C + N·log N)", memory="O(N·C)"),
    summary="the tokens of the highest scores behind a class token, and the others as one weighted sum",
    small=_keep_example,
    **SOURCE,
)
def keep_tokens(x: ArrayLike, scores: ArrayLike, count: int, *, fuse: bool = True) -> Kept:
    """The class token and the patch tokens of the highest scores, by descending score.

    Args:
      x: tokens `(B, 1 + N, C)`, the class token in front.
      scores: of the patch tokens, `(B, N)`.
      count: how many of them stay.
      fuse: whether the others become one more token, their sum with the scores as weights.

    Raises:
      ValueError: for scores that are not of the patch tokens, or a count that is not in 0..N.
    """
    x, scores = jnp.asarray(x), jnp.asarray(scores)
    if x.ndim != 3 or scores.shape != (x.shape[0], x.shape[1] - 1):
        raise ValueError(f"scores must be (B, N) of tokens (B, 1 + N, C), got {scores.shape} of {x.shape}")
    chosen = select_top(scores, count, by_score=True)
    parts = [x[:, :1], chosen.keep(x[:, 1:])]
    if fuse:
        parts.append(chosen.fuse(x[:, 1:], scores))
    return Kept(jnp.concatenate(parts, 1), chosen.kept)


class TokenReorganisationParts(Block):
    """`Block` that may leave tokens out between its two branches: see the module docstring.

    Args:
      mixer: dense attention by products of queries and keys, such as `SoftmaxAttention`.
      mlp: feed-forward.
      norm1: of the attention's branch.
      norm2: of the feed-forward's branch.
      keep_rate: of the patch tokens, in (0, 1]; at 1 a call can only name a count.
      fuse_token: whether the others become one token.
      **block: further arguments of `Block`.

    Raises:
      ValueError: for a rate out of its range.
      UnsupportedArgument: for a mixer that has no attention map, or norms behind the branches.
    """

    def __init__(
        self,
        mixer: nnx.Module,
        mlp: nnx.Module | None,
        norm1: nnx.Module | None,
        norm2: nnx.Module | None,
        *,
        keep_rate: float = 1.0,
        fuse_token: bool = False,
        **block: Any,
    ):
        super().__init__(mixer, mlp, norm1, norm2, **block)
        if not 0 < keep_rate <= 1:
            raise ValueError(f"keep_rate must be in (0, 1], got {keep_rate}")
        if not isinstance(mixer, DenseMixer) or not isinstance(mixer.core, ProductCore) or self.order != "pre":
            raise UnsupportedArgument(
                f"tokens are kept by the attention map of a dense mixer in a pre-norm block, got "
                f"{type(mixer).__name__} in a {self.order}-norm block"
            )
        self.keep_rate, self.fuse_token = keep_rate, fuse_token

    @classmethod
    def around(cls, block: Block, *, keep_rate: float, fuse_token: bool) -> "TokenReorganisationParts":
        """The same block, of the same parts."""
        if block.before is not None or block.before2 is not None:
            raise UnsupportedArgument("a block with a convolution of its grid cannot leave tokens out")
        parts = (block.mixer, block.mlp, block.norm1, block.norm2)
        scales = {"scale1": block.scale1, "scale2": block.scale2, "order": block.order, "scaled": block.scaled}
        made = TokenReorganisationParts(*parts, keep_rate=keep_rate, fuse_token=fuse_token, **scales)
        made.drop_path = block.drop_path
        return made

    def count(self, tokens: int, keep_rate: float | None = None, count: int | None = None) -> int:
        """How many of `tokens` patch tokens stay; arguments as `reorganise`.

        Raises:
          ValueError: for a number that is not in 1..tokens.
        """
        rate = self.keep_rate if keep_rate is None else keep_rate
        if count is None:
            count = math.ceil(rate * tokens) if self.keep_rate < 1 and rate < 1 else tokens
        if not 1 <= count <= tokens:
            raise ValueError(f"of {tokens} tokens 1 to {tokens} can stay, got {count}")
        return count

    def __call__(
        self,
        x: jax.Array,
        *,
        edits: Edits | None = None,
        keep_rate: float | None = None,
        count: int | None = None,
        positions: jax.Array | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """What `reorganise` gives, without the places."""
        given = {"keep_rate": keep_rate, "count": count, "positions": positions, "deterministic": deterministic}
        return self.reorganise(x, edits=edits, **given).tokens

    def reorganise(
        self,
        x: jax.Array,
        *,
        edits: Edits | None = None,
        keep_rate: float | None = None,
        count: int | None = None,
        positions: jax.Array | None = None,
        deterministic: bool = True,
    ) -> Kept:
        """Tokens `(B, 1 + N, C)`, the class token in front, to those that are left.

        It records, as `"kept"`, the places of what is left among the tokens that came in, -1 for the fused one.

        Args:
          x: tokens.
          edits: interventions on this layer of this call.
          keep_rate: in place of the block's own; without effect on a block that was built with 1.
          count: how many patch tokens stay, in place of a rate.
          positions: of the tokens, for a mixer that looks at them.
          deterministic: False in training.

        Raises:
          ValueError: for a number of tokens that cannot stay.
          UnsupportedArgument: for a mixer that looks at positions, where tokens are left out.
        """
        left = self.count(x.shape[1] - 1, keep_rate, count)
        if left == x.shape[1] - 1:
            given = {} if positions is None else {"positions": positions}
            return Kept(super().__call__(x, edits=edits, deterministic=deterministic, **given), None)
        if self.looks_at_positions:
            raise UnsupportedArgument("kept tokens stand in another order: mixers that look at positions are not taken")
        scores = None

        def mixed(tokens: jax.Array) -> jax.Array:
            nonlocal scores
            y, weights = _attend(self.mixer, visit(self, edits, "normed", tokens), edits, deterministic)
            scores = weights[:, :, 0, 1:].mean(1)
            return visit(self, edits, "mixed", y)

        def fed(tokens: jax.Array) -> jax.Array:
            return visit(self, edits, "mlp", call(self.mlp, tokens, deterministic))

        x = visit(self, edits, "stream", x)
        x = self._branch(x, mixed, self.norm1, self.scale1, True, deterministic)
        x, index = keep_tokens(x, scores, left, fuse=self.fuse_token)
        record(self, "kept", lambda: self._stood(index))
        x = visit(self, edits, "middle", x)
        x = x if self.mlp is None else self._branch(x, fed, self.norm2, self.scale2, True, deterministic)
        return Kept(x, index)

    def _stood(self, index: jax.Array) -> jax.Array:
        """Where all tokens that are left stood, from where patch tokens stood among those."""
        class_token, fused = jnp.zeros_like(index[:, :1]), jnp.full_like(index[:, :1], -1)
        return jnp.concatenate([class_token, index + 1, *([fused] if self.fuse_token else [])], 1)


def _attend(mixer: DenseMixer, x: jax.Array, edits: Edits | None, deterministic: bool) -> tuple[jax.Array, jax.Array]:
    """What a mixer makes of tokens, and the weights by which it does, as they are after all edits."""
    heads = visit(mixer, edits, "qkv", mixer.project(x, x, Given()))
    order = np.arange(x.shape[1], dtype=np.int32)[None]
    q, k, v, view, _ = mixer.core.placed(heads, View(q_at=order, k_at=order, q_idx=order, k_idx=order), None)
    weights = mixer.core.weights(q, k, view, edits=edits, owner=mixer)
    weights = mixer.core.edited(edits, mixer, "attention", weights, view=view, q=q, k=k, v=v)
    y = weighted_values(mixer.core.drop(weights, deterministic), v)
    return mixer.merge(visit(mixer, edits, "heads", y), x, deterministic=deterministic), weights


def _example() -> Example:
    block = TokenReorganisationBlock(8, num_heads=2, keep_rate=0.5, fuse_token=True, mlp_ratio=1.0, rngs=nnx.Rngs(0))
    return Example(block, (3 * jax.random.normal(jax.random.key(1), (2, 6, 8)),))


@register(
    "evit",
    kind=Kind.MODULE,
    cost=COST,
    summary="a transformer block that keeps the tokens its class token attends to and fuses the others",
    small=_example,
    **SOURCE,
)
class TokenReorganisationBlock(TokenReorganisationParts):
    """Tokens `(B, 1 + N, C)`, the class token in front, to `(B, 1 + k, C)`, or `(B, 2 + k, C)` with a fused one.

    Args:
      features: channels C.
      num_heads: heads H.
      keep_rate: of the patch tokens, in (0, 1]; at 1 a call can only name a count.
      fuse_token: whether the others become one token.
      mlp_ratio: hidden channels of the feed-forward over C, rounded down.
      qkv_bias: whether queries, keys and values have a bias.
      scale: of the scores; D^-1/2 when None.
      norm_eps: of both norms.
      attention_dropout: rate on attention weights.
      dropout: rate inside the feed-forward and on what the attention returns.
      drop_path: probability that a branch is dropped for an example in training.
      dtype: of the computation; that of the tokens when None.
      param_dtype: of the parameters.
      rngs: streams `params`, and `dropout` if there is any.

    Raises:
      ValueError: for a rate out of its range.
    """

    def __init__(
        self,
        features: int,
        *,
        num_heads: int,
        keep_rate: float = 0.7,
        fuse_token: bool = True,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        scale: float | None = None,
        norm_eps: float = 1e-6,
        attention_dropout: float = 0.0,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        stored = {"param_dtype": param_dtype, "rngs": rngs}
        drops = {"attention_dropout": attention_dropout, "projection_dropout": dropout}
        attention = {"num_heads": num_heads, "qkv_bias": qkv_bias, "scale": scale, **drops}
        super().__init__(
            SoftmaxAttention(features, **attention, dtype=dtype, **stored),
            MLP(features, int(features * mlp_ratio), dropout=dropout, dtype=dtype, **stored),
            LayerNorm(features, eps=norm_eps, **stored),
            LayerNorm(features, eps=norm_eps, **stored),
            keep_rate=keep_rate,
            fuse_token=fuse_token,
            drop_path=drop_path,
            rngs=rngs,
        )
