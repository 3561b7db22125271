"""What the papers' vision backbones share: the choice of a mixer per block, the pre-norm block, names of models.

A family (`pvt`, `swin`, `cswin`, `deit`) fixes everything around the mixers; a paper's models are a family with a list
of choices, `choices[stage][block]`.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab import registry
from attnlab.contract import Site, TokenMixer
from attnlab.nn.mlp import MLP, DropPath
from attnlab.nn.norms import LayerNorm
from attnlab.suggest import suggestion


@dataclasses.dataclass(frozen=True)
class Choice:
    """Which mixer a block uses.

    Attributes:
      mixer: name of a registered mixer, or its class.
      options: constructor arguments beyond those that the place in the model gives.
    """

    mixer: str | type[TokenMixer]
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def cls(self) -> type[TokenMixer]:
        """The class of the mixer."""
        return registry.get(self.mixer).cls if isinstance(self.mixer, str) else self.mixer

    def build(self, site: Site, *, rngs: nnx.Rngs, **options: Any) -> TokenMixer:
        """The mixer at a place in a model; `options` fill in what the choice leaves open."""
        return self.cls.for_site(site, rngs=rngs, **(options | dict(self.options)))


Choices = Sequence[Sequence[Choice]]


def choices_from_letters(
    letters: str, depths: Sequence[int], mixed: str, choose: Mapping[str, Callable[[int, int], Choice]]
) -> list[list[Choice]]:
    """Choices from the string of letters by which the papers' code names them.

    One letter per stage. The letter `M` mixes two kinds: the first k blocks of the stage are of the first kind of
    `mixed`, the others of the second, where k is the number behind the letters, as in `AAMB2`.

    Args:
      letters: the string.
      depths: blocks per stage.
      mixed: the two letters that `M` stands for.
      choose: for each letter, the choice at (stage, block).

    Raises:
      ValueError: for an unknown letter, a wrong number of them, or `M` without its number.
    """
    kinds, number = letters[: len(depths)], letters[len(depths) :]
    wrong = sorted(set(kinds) - {*choose, "M"})
    if len(kinds) != len(depths) or wrong or (("M" in kinds) != bool(number)) or (number and not number.isdigit()):
        raise ValueError(
            f"attention types must be {len(depths)} letters of {', '.join(choose)} or M, and with M the number of "
            f"{mixed[0]} blocks behind them, got {letters!r}"
        )
    stages = []
    for stage, (kind, depth) in enumerate(zip(kinds, depths, strict=True)):
        blocks = [(mixed[0] if b < int(number) else mixed[1]) if kind == "M" else kind for b in range(depth)]
        stages.append([choose[letter](stage, block) for block, letter in enumerate(blocks)])
    return stages


class PreNormBlock(nnx.Module):
    """x = x + mixer(norm(x));  x = x + mlp(norm(x)), each branch under stochastic depth.

    A mixer with a true `takes_descriptor` is also given the mean of the tokens before the norm, `descriptor` (B, C).

    Args:
      mixer: the token mixer.
      features: channels C.
      mlp_ratio: hidden channels over channels.
      norm_eps: of both norms.
      dropout: rate inside the feed-forward.
      drop_path: probability that a branch is dropped for an example in training.
      dtype: of the computation; that of the input when None.
      param_dtype: of the parameters.
      rngs: streams `params`, and `dropout` if there is any.
    """

    def __init__(
        self,
        mixer: TokenMixer,
        features: int,
        *,
        mlp_ratio: float = 4.0,
        norm_eps: float = 1e-6,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        common = {"param_dtype": param_dtype, "rngs": rngs}
        self.norm1 = LayerNorm(features, eps=norm_eps, **common)
        self.mixer = mixer
        self.norm2 = LayerNorm(features, eps=norm_eps, **common)
        self.mlp = MLP(features, int(features * mlp_ratio), dropout=dropout, dtype=dtype, **common)
        self.drop_path = DropPath(drop_path, rngs=rngs)

    def __call__(self, x: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Tokens in the layout of the mixer to the same."""
        arguments = {}
        if getattr(self.mixer, "takes_descriptor", False):
            mean = x.mean(range(1, x.ndim - 1), dtype=jnp.promote_types(x.dtype, jnp.float32))
            arguments["descriptor"] = mean.astype(x.dtype)
        y = self.mixer(self.norm1(x), deterministic=deterministic, **arguments)
        x = x + self.drop_path(y, deterministic=deterministic)
        y = self.mlp(self.norm2(x), deterministic=deterministic)
        return x + self.drop_path(y, deterministic=deterministic)


def pair(size: int | Sequence[int]) -> tuple[int, int]:
    """One number for both sides, or both."""
    rows, columns = (size, size) if isinstance(size, int) else size
    return rows, columns


def drop_path_rates(rate: float, depth: int) -> list[float]:
    """Rates that rise linearly over the blocks, from 0 to `rate`."""
    return [rate * block / max(depth - 1, 1) for block in range(depth)]


def token_mean(x: jax.Array) -> jax.Array:
    """Mean over all token axes, summed in float32 or wider: `(B, …, C)` to `(B, C)`."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return x.mean(range(1, x.ndim - 1), dtype=wide).astype(x.dtype)


def build_named(
    table: Mapping[str, tuple[type[nnx.Module], Mapping[str, Any]]], name: str, *, rngs: nnx.Rngs, **overrides: Any
) -> nnx.Module:
    """The model of that name in a table of classes and constructor arguments.

    Raises:
      KeyError: with the nearest names, if there is none.
    """
    if name not in table:
        raise KeyError(f"no model is called {name!r}: {suggestion(name, table)}")
    cls, options = table[name]
    return cls(**(dict(options) | overrides), rngs=rngs)
