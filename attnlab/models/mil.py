"""Classifiers of bags of instances by ACMIL (Zhang et al., ECCV 2024, arXiv:2311.07125), and by ABMIL.

    h = relu(x W);   branches' logits: W_k f_k + b_k;   the bag's: W f + b          f of `attnlab.pooling.acmil`

A bag is a slide, its instances are features of patches. The loss of training is the cross-entropy of the bag's logits,
with several branches also the mean of theirs, and `attnlab.objectives.attention_diversity`, all with weight 1.
Code: dazhangyu123/ACMIL.
"""

from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.typing import ArrayLike

from attnlab.nn.activations import relu
from attnlab.nn.linear import Linear, uniform_init
from attnlab.objectives.attention_diversity import attention_diversity
from attnlab.pooling.acmil import (
    COST,
    PAPER,
    REPOSITORY,
    GatedABMILPooling,
    MultiBranchHeadsPooling,
    MultiBranchPooling,
)
from attnlab.registry import Example, Kind, Source, register

Attention = Literal["gated", "heads"]


class BagLogits(NamedTuple):
    """What a bag is classified as.

    Attributes:
      branches: logits of the branches `(B, K, classes)`, in float32.
      bag: logits of the bag `(B, classes)`, in float32.
      scores: of the instances before the softmax, `(B, K, N)`, with heads `(B, H, K, N)`.
    """

    branches: jax.Array
    bag: jax.Array
    scores: jax.Array

    def loss(self, labels: ArrayLike, *, mask: ArrayLike | None = None) -> jax.Array:
        """The loss of training for labels `(B,)`, `(B,)` float32; `mask` `(B, N)` says which instances exist."""
        entropy = optax.softmax_cross_entropy_with_integer_labels
        labels = jnp.asarray(labels)
        loss = entropy(self.bag, labels)
        if self.branches.shape[1] > 1:
            each = entropy(self.branches, jnp.broadcast_to(labels[:, None], self.branches.shape[:2]))
            loss = loss + each.mean(1) + attention_diversity(self.scores, mask=mask)
        return loss


def _linear(features: int, out: int, *, use_bias: bool = True, **common: Any) -> Linear:
    init = uniform_init(features)
    axes = ("embed", None) if use_bias else (None, "embed")
    return Linear(features, out, use_bias=use_bias, axes=axes, kernel_init=init, bias_init=init, **common)


def _example() -> Example:
    module = ACMIL(6, 8, 3, num_branches=2, hidden_features=4, rngs=nnx.Rngs(0))
    return Example(module, (np.random.default_rng(0).standard_normal((2, 7, 6)).astype(np.float32),))


@register(
    "acmil.classifier",
    kind=Kind.MODULE,
    paper=PAPER,
    source=Source.AUTHORS_CODE,
    repository=REPOSITORY,
    cost=COST,
    summary="a classifier of bags with one head for each branch of attention and one for their mean",
    small=_example,
)
class ACMIL(nnx.Module):
    """Bags `(B, N, F)` to `BagLogits`; see the module docstring.

    Args:
      in_features: channels F of the instances.
      features: channels C that they are mapped to.
      num_classes: classes.
      attention: "gated", or "heads" for an attention by a learned query in each branch.
      num_branches: K.
      num_heads: heads of "heads".
      hidden_features: of the gated scores.
      masked: favourites of which some are masked in training; 0 for none.
      share: of them that is.
      dropout: rate in front of the classifiers.
      head_dropout: rate inside the attention of "heads"; the authors' code has 0.1.
      dtype: of the computation; that of the bags when None.
      param_dtype: of the parameters.
      rngs: streams `params`, and `dropout` if anything is drawn.

    Raises:
      ValueError: for another attention, or as the poolings.
    """

    def __init__(
        self,
        in_features: int,
        features: int,
        num_classes: int,
        *,
        attention: Attention = "gated",
        num_branches: int = 5,
        num_heads: int = 8,
        hidden_features: int = 128,
        masked: int = 0,
        share: float = 0.6,
        dropout: float = 0.0,
        head_dropout: float = 0.0,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if attention not in get_args(Attention):
            raise ValueError(f"attention must be one of {', '.join(get_args(Attention))}, got {attention!r}")
        common: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        several: dict[str, Any] = {"num_branches": num_branches, "masked": masked, "share": share, **common}
        self.dtype = dtype
        self.reduce = _linear(in_features, features, use_bias=False, **common)
        if attention == "gated":
            self.pooling: Any = MultiBranchPooling(features, hidden_features=hidden_features, **several)
        else:
            heads: dict[str, Any] = {"num_heads": num_heads, "dropout": head_dropout, "auxiliary": True}
            self.pooling = MultiBranchHeadsPooling(features, **heads, **several)
        self.heads = nnx.List(_linear(features, num_classes, **common) for _ in range(num_branches))
        self.head = _linear(features, num_classes, **common)
        self.dropout = nnx.Dropout(dropout, rngs=rngs) if dropout > 0 else nnx.data(None)

    def __call__(
        self,
        x: ArrayLike,
        *,
        mask: ArrayLike | None = None,
        draws: ArrayLike | None = None,
        deterministic: bool = True,
    ) -> BagLogits:
        """Classifies bags.

        Args:
          x: `(B, N, F)`.
          mask: `(B, N)` boolean, which instances exist.
          draws: uniform numbers for the masking, `(B, K, m)` or with heads `(B, H, K, m)`: it acts where they are
            given, and in training, where they are drawn.
          deterministic: False in training.

        Raises:
          ValueError: for bags of another shape, or a mask that is not `(B, N)`.
        """
        x = jnp.asarray(x, self.dtype)
        h, _, there = self.pooling.check_call(relu(self.reduce(x)), mask=mask)
        scores = self.pooling.scores(h, there, draws=draws, deterministic=deterministic)
        branches, bag = self.pooling.read(h, scores, there, deterministic=deterministic)
        if self.dropout is not None:
            branches, bag = (self.dropout(part, deterministic=deterministic) for part in (branches, bag))
        each = jnp.stack([head(branches[:, k]) for k, head in enumerate(self.heads)], 1)
        return BagLogits(each.astype(jnp.float32), self.head(bag).astype(jnp.float32), scores)


class ABMIL(nnx.Module):
    """Bags `(B, N, F)` to logits `(B, num_classes)` in float32, by gated attention alone.

    Args:
      in_features: channels F of the instances.
      features: channels C that they are mapped to.
      num_classes: classes.
      hidden_features: of the gated scores.
      dropout: rate in front of the classifier.
      dtype: of the computation; that of the bags when None.
      param_dtype: of the parameters.
      rngs: stream `params`, and `dropout` if there is any.
    """

    def __init__(
        self,
        in_features: int,
        features: int,
        num_classes: int,
        *,
        hidden_features: int = 128,
        dropout: float = 0.0,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        common: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.dtype = dtype
        self.reduce = _linear(in_features, features, use_bias=False, **common)
        self.pooling = GatedABMILPooling(features, hidden_features=hidden_features, **common)
        self.head = _linear(features, num_classes, **common)
        self.dropout = nnx.Dropout(dropout, rngs=rngs) if dropout > 0 else nnx.data(None)

    def __call__(self, x: ArrayLike, *, mask: ArrayLike | None = None, deterministic: bool = True) -> jax.Array:
        h = relu(self.reduce(jnp.asarray(x, self.dtype)))
        bag = self.pooling(h, mask=mask, deterministic=deterministic)
        bag = bag if self.dropout is None else self.dropout(bag, deterministic=deterministic)
        return self.head(bag).astype(jnp.float32)
