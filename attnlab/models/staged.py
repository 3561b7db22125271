"""The skeleton of backbones of images: stages of blocks, of given parts, into which any mixer goes.

    x = stem(image)
    in each stage    x = down(x);   x = [prefix; x];   x = x + position(x);   dropout;   blocks;   norm
    logits = head(pool(norm(x)))

A family of models (`pvt`, `swin`, `deit`, ...) is a class that builds these parts and hands them over; which mixer a
block has is a choice of `places`, and a paper's models are a family with a list of choices.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from attnlab import registry
from attnlab.contract import Layout, Site, TokenMixer, constructor_parameters
from attnlab.models.block import Block, Order, site_seen_by
from attnlab.models.blocks import Blocks
from attnlab.models.inputs import Images
from attnlab.nn.chain import call
from attnlab.nn.depthwise import DepthwiseConv
from attnlab.nn.linear import Linear, trunc_normal
from attnlab.nn.mlp import MLP, LayerScale
from attnlab.nn.norms import LayerNorm
from attnlab.points import Editable, Edits, Pass, visit
from attnlab.suggest import suggestion
from pallas_kernels.dtypes import at_least_float32
from pallas_kernels.promotion import numpy_ranks


class Prefix(nnx.Module):
    """Class tokens and registers: learned tokens that are put in front of those of a grid.

    Args:
      count: number of tokens.
      features: channels C.
      registers: further tokens behind those, an array of their own.
      param_dtype: of the tokens.
      rngs: stream `params`.
    """

    def __init__(
        self, count: int, features: int, *, registers: int = 0, param_dtype: Any = jnp.float32, rngs: nnx.Rngs
    ):
        def drawn(number: int) -> nnx.Param:
            tokens = trunc_normal(rngs.params(), (number, features), param_dtype)
            return nnx.Param(tokens, logical_axes=(None, "embed"), weight_decay=False)

        self.count = count + registers
        self.tokens = drawn(count) if count else nnx.data(None)
        self.registers = drawn(registers) if registers else nnx.data(None)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`(B, *S, C)` to the sequence `(B, count + N, C)`."""
        batch, features = x.shape[0], x.shape[-1]
        rows = [each[...].astype(x.dtype) for each in (self.tokens, self.registers) if each is not None]
        front = [jnp.broadcast_to(each, (batch, *each.shape)) for each in rows]
        return jnp.concatenate([*front, x.reshape(batch, -1, features)], 1)


class BehindPrefix(nnx.Module):
    """A pooling of the tokens behind a prefix alone; their mean when None is given.

    Args:
      count: tokens of the prefix.
      pool: maps tokens `(B, N, C)` to one vector.
    """

    def __init__(self, count: int, pool: nnx.Module | None = None):
        self.count, self.pool = count, nnx.data(None) if pool is None else pool

    def __call__(self, x: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """`(B, count + N, C)` to `(B, C')`."""
        x = x[:, self.count :]
        return token_mean(x) if self.pool is None else call(self.pool, x, deterministic)


class Stage(Blocks):
    """Blocks on tokens of one grid, and what leads to that grid.

    Args:
      blocks: of the stage.
      down: what makes this stage's tokens from those of the stage before: a strided convolution, patch merging.
      prefix: class tokens and registers; of the last stage alone.
      position: module whose result is added in front of the blocks: a table of all tokens, a depthwise convolution.
      dropout: behind the positions.
      norm: of what the blocks return.
      remat: recompute each block in the backward pass instead of keeping what is inside.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        *,
        down: nnx.Module | None = None,
        prefix: Prefix | None = None,
        position: nnx.Module | None = None,
        dropout: nnx.Dropout | None = None,
        norm: nnx.Module | None = None,
        remat: bool = False,
    ):
        super().__init__(blocks, remat=remat)
        parts = {"down": down, "prefix": prefix, "position": position, "dropout": dropout, "norm": norm}
        for name, part in parts.items():
            setattr(self, name, nnx.data(None) if part is None else part)

    def enter(self, x: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """The stage before's tokens `(B, H, W, C)` to this stage's, in front of its blocks and without a prefix."""
        return x if self.down is None else call(self.down, x, deterministic)

    def placed(self, x: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """What `enter` made with prefix, positions and dropout: what the first block is given."""
        # Positions of tokens behind a prefix, which are a sequence, are told the grid.
        grid = {"grid": x.shape[1:-1]} if getattr(self.position, "prefix", 0) else {}
        x = x if self.prefix is None else self.prefix(x)
        x = x if self.position is None else x + call(self.position, x, deterministic, **grid)
        return x if self.dropout is None else self.dropout(x, deterministic=deterministic)

    def __call__(
        self,
        x: jax.Array,
        *,
        edits: Sequence[Edits | None] | None = None,
        behind: list[jax.Array] | None = None,
        deterministic: bool = True,
        **arguments: Any,
    ) -> jax.Array:
        """What `enter` made to the same shape, or with a prefix to `(B, prefix + N, C)`."""
        x = self.placed(x, deterministic=deterministic)
        x = super().__call__(x, edits=edits, behind=behind, deterministic=deterministic, **arguments)
        return x if self.norm is None else call(self.norm, x, deterministic)


class StagedBackbone(Editable):
    """Images `(B, H, W, channels)` to logits `(B, classes)` in float32, of given parts.

    Args:
      stem: makes the first stage's tokens of images.
      stages: the stages.
      norm: of the last stage's tokens, or with `norm_first=False` of the vector that they are pooled to.
      norm_first: whether `norm` stands in front of the pooling.
      pool: maps tokens `(B, N, C)` to one vector; None takes the first token of a prefix, or the mean of all.
      head: maps the vector to logits; without it the pooled features are the result.
      image_size: (rows, columns) of the images; None where any will do that the parts take.
      channels: of the images.
      dtype: of the computation; that of the images when None.

    Raises:
      ValueError: without stages, or for a prefix in front of the last one.
    """

    inputs: ClassVar[Images] = Images()
    model_points = frozenset({"logits"})

    def __init__(
        self,
        stem: nnx.Module,
        stages: Sequence[Stage],
        *,
        norm: nnx.Module | None = None,
        norm_first: bool = True,
        pool: nnx.Module | None = None,
        head: nnx.Module | None = None,
        image_size: Sequence[int] | None = None,
        channels: int = 3,
        dtype: Any = None,
    ):
        if not stages or any(stage.prefix is not None for stage in stages[:-1]):
            raise ValueError("stages must be at least one, and only the last may have a prefix")
        self.image_shape = (*((None, None) if image_size is None else image_size), channels)
        self.dtype, self.norm_first = dtype, norm_first
        self.stem, self.stage = stem, nnx.List(stages)
        for name, part in {"norm": norm, "pool": pool, "head": head}.items():
            setattr(self, name, nnx.data(None) if part is None else part)

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The blocks of all stages, in the order of the pass."""
        return tuple(block for stage in self.stage for block in stage.blocks)

    @numpy_ranks()
    def stages(self, images: ArrayLike, *, deterministic: bool = True) -> tuple[jax.Array, ...]:
        """The map `(B, Hh, Ww, C)` that each stage leaves, for dense prediction; without the tokens of a prefix.

        Raises:
          ValueError: for images of another shape than the model was built for, or under an intervention that leaves
            tokens out, without which there is no map.
        """
        maps = self._through(images, self.edits(), deterministic)[0]
        if any(x.ndim != 4 for x in maps):
            raise ValueError("an intervention leaves tokens out: there is no map of what is left")
        return maps

    @numpy_ranks()
    def features(
        self, images: ArrayLike, *, layers: Sequence[int] | None = None, deterministic: bool = True
    ) -> tuple[jax.Array, ...]:
        """The stream behind chosen blocks, each as that block leaves it, prefix included and without the last norm.

        Args:
          images: `(B, H, W, channels)`.
          layers: indices of the blocks through all stages, in any order; negative ones count from the last. All when
            None.
          deterministic: False in training.

        Raises:
          ValueError: for layers that do not exist, or images as `stages` refuses them.
        """
        behind: list[jax.Array] = []
        self._through(images, self.edits(), deterministic, behind)
        chosen = range(len(behind)) if layers is None else layers
        if any(not -len(behind) <= layer < len(behind) for layer in chosen):
            raise ValueError(f"layers must be among the {len(behind)} of the model, got {list(chosen)}")
        return tuple(behind[layer] for layer in chosen)

    @numpy_ranks()
    def tokens(self, images: ArrayLike, *, deterministic: bool = True) -> jax.Array:
        """The last stage's tokens `(B, prefix + N, C)`, normed unless the norm stands behind the pooling."""
        return self._through(images, self.edits(), deterministic)[1]

    @numpy_ranks()
    def pooled(self, images: ArrayLike, *, deterministic: bool = True) -> jax.Array:
        """What is classified: one vector `(B, C)` for each image."""
        return self._pooled(images, self.edits(), deterministic)

    @numpy_ranks()
    def __call__(self, images: ArrayLike, *, deterministic: bool = True) -> jax.Array:
        """Logits, or without a head what `pooled` gives."""
        edits = self.edits()
        x = self._pooled(images, edits, deterministic)
        if self.head is None:
            return x
        return visit(self, edits.model, "logits", call(self.head, x, deterministic).astype(jnp.float32))

    def _through(
        self, images: ArrayLike, edits: Pass, deterministic: bool, behind: list[jax.Array] | None = None
    ) -> tuple[tuple[jax.Array, ...], jax.Array]:
        return self._through_stages(self._embedded(images, deterministic), edits, deterministic, behind)

    def _embedded(self, images: ArrayLike, deterministic: bool) -> jax.Array:
        """The first stage's tokens."""
        x = jnp.asarray(images, self.dtype)
        if x.ndim != 4 or any(size not in (None, n) for size, n in zip(self.image_shape, x.shape[1:], strict=True)):
            sizes = zip(("H", "W", "C"), self.image_shape, strict=True)
            wanted = ", ".join(name if size is None else str(size) for name, size in sizes)
            raise ValueError(f"images must be (B, {wanted}), got {x.shape}")
        return call(self.stem, x, deterministic)

    def _through_stages(
        self, x: jax.Array, edits: Pass, deterministic: bool, behind: list[jax.Array] | None = None
    ) -> tuple[tuple[jax.Array, ...], jax.Array]:
        maps, first = [], 0
        for index, stage in enumerate(self.stage):
            if index and x.ndim != 4:
                raise ValueError(f"tokens were left out in stage {index - 1}: only the last stage can do without some")
            x = stage.enter(x, deterministic=deterministic)
            grid, last = x.shape[:-1], first + len(stage.blocks)
            x = stage(x, edits=edits.of(first, last), behind=behind, deterministic=deterministic)
            count, first = 0 if stage.prefix is None else stage.prefix.count, last
            whole = x.ndim == 4 or x.shape[1] == count + math.prod(grid[1:])
            maps.append(x[:, count:].reshape(*grid, -1) if count and whole else x)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        return tuple(maps), call(self.norm, x, deterministic) if self.norm is not None and self.norm_first else x

    def _pooled(self, images: ArrayLike, edits: Pass, deterministic: bool) -> jax.Array:
        x = self._through(images, edits, deterministic)[1]
        if self.pool is not None:
            x = call(self.pool, x, deterministic)
        else:
            x = token_mean(x) if self.stage[-1].prefix is None else x[:, 0]
        return x if self.norm is None or self.norm_first else call(self.norm, x, deterministic)


# Which mixer stands where

Builder = Callable[..., nnx.Module]
"""Builds a block's mixer: `build(site, index, *, rngs, **shared)`, `index` counting the blocks of a stage and `shared`
what the family gives to all its mixers, of which each takes what it has."""

Mixers = str | Builder | Sequence[str | Builder | None] | None
"""For all stages or each: a registered mixer's name, a builder, or None for the family's own."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """A builder by class.

    Attributes:
      mixer: name of a registered mixer, or its class.
      options: constructor arguments beyond those that the place in the model gives.
    """

    mixer: str | type[TokenMixer]
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def options_at(self, site: Site, index: int) -> Mapping[str, Any]:
        """The options for a block."""
        return self.options

    def __call__(self, site: Site, index: int = 0, *, rngs: nnx.Rngs, **shared: Any) -> nnx.Module:
        cls = registry.get(self.mixer).cls if isinstance(self.mixer, str) else self.mixer
        known = constructor_parameters(cls)
        fitting = {name: value for name, value in shared.items() if name in known}
        return cls.for_site(site_seen_by(cls, site), rngs=rngs, **(fitting | dict(self.options_at(site, index))))


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a block stands, and what it is built with.

    Attributes:
      site: of its mixer.
      index: of the block in its stage.
      mixer: builds its mixer.
      drop_path: its stochastic depth rate.
    """

    site: Site
    index: int
    mixer: Builder
    drop_path: float


def places(
    features: Sequence[int],
    grids: Sequence[tuple[int, int] | None],
    *,
    num_heads: Sequence[int],
    depths: Sequence[int],
    own: Sequence[Builder],
    mixers: Mixers = None,
    replaced: Sequence[int | None] | None = None,
    drop_path: float = 0.0,
    prefix: int = 0,
) -> list[list[Place]]:
    """The places of all blocks of a model, stage by stage.

    Args:
      features: channels of each stage.
      grids: rows and columns of tokens in each stage, None where the model does not fix them.
      num_heads: of each stage.
      depths: blocks of each stage.
      own: the family's own mixer in each stage.
      mixers: what takes its place.
      replaced: how many of the first blocks of each stage have it; all where it is None.
      drop_path: stochastic depth rate of the last block; it rises linearly from 0.
      prefix: class tokens and registers.

    Raises:
      ValueError: for lists of different lengths.
    """
    stages = len(depths)
    mixers = [mixers] * stages if mixers is None or isinstance(mixers, str) or callable(mixers) else mixers
    replaced = [None] * stages if replaced is None else replaced
    per_stage(stages, features=features, num_heads=num_heads, mixers=mixers, replaced=replaced)
    layers, layer, result = sum(depths), 0, []
    for stage, depth in enumerate(depths):
        mixer, count = mixers[stage], depth if replaced[stage] is None else replaced[stage]
        mixer = Choice(mixer) if isinstance(mixer, str) else own[stage] if mixer is None else mixer
        result.append([])
        for index in range(depth):
            site = Site(features[stage], num_heads[stage], Layout.IMAGE, False, grids[stage], prefix, layer, layers)
            rate = drop_path * layer / max(layers - 1, 1)
            result[-1].append(Place(site, index, mixer if index < count else own[stage], rate))
            layer += 1
    return result


def transformer_block(
    place: Place,
    *,
    mlp_ratio: float = 4.0,
    norm_eps: float = 1e-6,
    dropout: float = 0.0,
    shared: Mapping[str, Any] | None = None,
    position_side: int = 0,
    position_activation: Callable[[jax.Array], jax.Array] | None = None,
    position_twice: bool = True,
    before2: Callable[..., nnx.Module] | None = None,
    mlp: Mapping[str, Any] | None = None,
    layer_scale: float | None = None,
    mlp_scale: float | None = None,
    scale_bias: bool = False,
    scaled: Literal["branch", "skip"] = "branch",
    order: Order = "pre",
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
    rngs: nnx.Rngs,
) -> Block:
    """The pre-norm block with LayerNorm and GELU that most families have.

    A mixer that says `norms_its_input` has the first norm inside.

    Args:
      place: where it stands.
      mlp_ratio: hidden channels over channels, rounded down; 0 for no feed-forward.
      norm_eps: of both norms.
      dropout: rate inside the feed-forward.
      shared: options for the mixer, which takes those that it has.
      position_side: of the kernel of a depthwise convolution that is added in front of either branch; 0 for none.
      position_activation: of these convolutions; none when None.
      position_twice: whether the feed-forward's branch has one too.
      before2: builds what stands there instead, as `Block` has it: `before2(features, drop_path=…, dtype=…, …)`.
      mlp: further options of the feed-forward.
      layer_scale: factors of the channels of both branches at the start; None for no factors.
      mlp_scale: the same for the feed-forward's branch alone.
      scale_bias: whether these factors have a bias.
      scaled: what they are factors of, as `Block` has it.
      order: as `Block` has it.
      dtype: of the computation; that of the input when None.
      param_dtype: of the parameters.
      rngs: streams `params`, and `dropout` if there is any.
    """
    features, stored = place.site.features, {"param_dtype": param_dtype, "rngs": rngs}
    norm, common = {"eps": norm_eps, **stored}, {"dtype": dtype, **stored}
    mixer = place.mixer(place.site, place.index, **common, **(shared or {}))
    sides = (position_side, position_side)
    convs = (1 if before2 is not None or not position_twice else 2) if position_side else 0
    before = [DepthwiseConv(features, sides, activation=position_activation, **common) for _ in range(convs)]
    second = before[1] if convs > 1 else None
    if before2 is not None:
        second = before2(features, drop_path=place.drop_path, **common)
    inits = (layer_scale, layer_scale if mlp_scale is None else mlp_scale)
    scales = [
        None if init is None else LayerScale(features, init=init, use_bias=scale_bias, **stored) for init in inits
    ]
    hidden = int(features * mlp_ratio)
    return Block(
        mixer=mixer,
        mlp=MLP(features, hidden, dropout=dropout, **(mlp or {}), **common) if mlp_ratio else None,
        norm1=None if getattr(mixer, "norms_its_input", False) else LayerNorm(features, **norm),
        norm2=LayerNorm(features, **norm) if mlp_ratio else None,
        scale1=scales[0],
        scale2=scales[1] if mlp_ratio else None,
        before=before[0] if convs else None,
        before2=second,
        order=order,
        scaled=scaled,
        drop_path=place.drop_path,
        rngs=rngs,
    )


# Small parts of families


def per_stage(stages: int, **lists: Sequence[Any]) -> None:
    """Raises `ValueError` for a list that has not one entry for each stage."""
    for name, values in lists.items():
        if len(values) != stages:
            raise ValueError(f"{name} must have one entry for each of {stages} stages, got {len(values)}")


def pair(size: int | Sequence[int]) -> tuple[int, int]:
    """One number for both sides, or both."""
    rows, columns = (size, size) if isinstance(size, int) else size
    return rows, columns


def halved_grids(
    image_size: int | Sequence[int], patch_size: int | Sequence[int], stages: int
) -> list[tuple[int, int]]:
    """Rows and columns of tokens in each stage, where patches are cut first and sides halved between stages.

    Raises:
      ValueError: if patches do not tile the image, or a side cannot be halved between stages.
    """
    image, patch = pair(image_size), pair(patch_size)
    multiple = tuple(side * 2 ** (stages - 1) for side in patch)
    if any(side % m for side, m in zip(image, multiple, strict=True)):
        raise ValueError(f"image_size must be a multiple of {multiple}, got {image}")
    rows, columns = image[0] // patch[0], image[1] // patch[1]
    return [(rows >> stage, columns >> stage) for stage in range(stages)]


def classifier(features: int, num_classes: int | None, **common: Any) -> Linear | None:
    """A linear map to logits; None for no classes."""
    return Linear(features, num_classes, axes=("embed", None), **common) if num_classes else None


def dropout_or_none(rate: float, rngs: nnx.Rngs) -> nnx.Dropout | None:
    """Dropout, if there is any."""
    return nnx.Dropout(rate, rngs=rngs) if rate > 0 else None


def token_mean(x: jax.Array) -> jax.Array:
    """Mean over all token axes, summed in float32 or wider: `(B, …, C)` to `(B, C)`."""
    wide = at_least_float32(x.dtype)
    return x.mean(range(1, x.ndim - 1), dtype=wide).astype(x.dtype)


# Models of papers by name

Models = Mapping[str, tuple[type[Any], Mapping[str, Any]]]
"""A class of backbones, such as a `StagedBackbone`, and its constructor arguments for each name."""


def build_named(table: Models, name: str, *, rngs: nnx.Rngs, **overrides: Any) -> Any:
    """The model of that name in a table; `overrides` replace its constructor arguments.

    Raises:
      KeyError: with the nearest names, if there is none.
    """
    if name not in table:
        raise KeyError(f"no model is called {name!r}: {suggestion(name, table)}")
    cls, options = table[name]
    return cls(**(dict(options) | overrides), rngs=rngs)
