"""EViT: vision transformers that leave out what their class token does not look at (ICLR 2022, arXiv:2202.07800).

DeiT, some of whose blocks keep the patch tokens that the class token attends to most and fuse the others into one; see
`token_reorganisation` for the block (code: youweiliang/evit). No parameters are new: `reorganised` makes it of a
trained model, and `keep_rate_at` lowers the rate in the course of a training.
"""

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from attnlab.models.blocks import hand_over
from attnlab.models.deit import DeiT
from attnlab.models.staged import Models, StagedBackbone
from attnlab.models.token_reorganisation import COST, SOURCE, TokenReorganisationParts
from attnlab.nn.chain import call
from attnlab.points import Pass, visit
from attnlab.registry import Kind, register

ModelT = TypeVar("ModelT", bound=StagedBackbone)

SHRINKING = (3, 6, 9)
"""The blocks of the authors' twelve that leave tokens out, counted from 0."""


def keep_rate_at(step: float, *, start: float, stop: float, base: float = 0.7) -> float:
    """The keep rate in the course of a training: 1 up to `start`, then along a cosine down to `base` at `stop`.

    It is a number of Python: other rates are other shapes, and each compiles anew.
    """
    if step < start or start >= stop:
        return 1.0 if step < start else base
    passed = min((step - start) / (stop - start), 1.0)
    return base + (1 - base) * (math.cos(math.pi * passed) + 1) / 2


def reorganised(
    model: ModelT, keep_rate: float | Sequence[float] = 0.7, *, layers: Sequence[int] = SHRINKING, fuse: bool = True
) -> ModelT:
    """A trained model of images under token reorganisation, without training.

    Args:
      model: of one stage with a class token and no registers, such as `DeiT`.
      keep_rate: in the blocks `layers`; or of every block.
      layers: blocks that leave tokens out, counted from 0.
      fuse: whether what is left out becomes one token.

    Returns:
      A new structure that holds the same arrays; `model` is unchanged.

    Raises:
      ValueError: for a model of another form, or rates and layers that do not fit it.
      UnsupportedArgument: for a block whose mixer has no attention map.
    """
    model = nnx.clone(model)
    if len(model.stage) != 1 or model.stage[0].prefix is None or model.stage[0].prefix.count != 1:
        raise ValueError("model must have one stage, with a class token and no registers")
    rates = keep_rates(keep_rate, len(model.blocks), layers)
    blocks = [
        TokenReorganisationParts.around(block, keep_rate=rate, fuse_token=fuse)
        for block, rate in zip(model.blocks, rates, strict=True)
    ]
    model.stage[0].blocks = nnx.List(blocks)
    return model


def keep_rates(keep_rate: float | Sequence[float], depth: int, layers: Sequence[int] = SHRINKING) -> tuple[float, ...]:
    """One rate for each of `depth` blocks: that number in `layers` and 1 elsewhere; or a sequence of them as it is.

    Raises:
      ValueError: for another number of rates, or layers that do not exist.
    """
    if isinstance(keep_rate, int | float):
        if any(not 0 <= layer < depth for layer in layers):
            raise ValueError(f"layers must be below the depth {depth}, got {tuple(layers)}")
        return tuple(float(keep_rate) if layer in layers else 1.0 for layer in range(depth))
    if len(keep_rate) != depth:
        raise ValueError(f"keep_rate must be one number, or one for each of {depth} blocks, got {len(keep_rate)}")
    return tuple(keep_rate)


@register(
    "evit.backbone",
    kind=Kind.BACKBONE,
    cost=COST,
    summary="a vision transformer that leaves out, block by block, what its class token does not look at",
    small={"features": 8, "num_heads": 2, "depth": 2, "keep_rate": 0.5, "layers": (0,), "mlp_ratio": 1.0}
    | {"image_size": 32, "patch_size": 8, "num_classes": 5},
    **SOURCE,
)
class EViT(DeiT):
    """Images `(B, H, W, channels)` to logits `(B, num_classes)` in float32; the defaults are DeiT-Ti's.

    Images of other sizes get a table of positions by bicubic interpolation.

    Args:
      features: channels C.
      num_heads: heads.
      depth: blocks.
      keep_rate: of the patch tokens in the blocks `layers`, in (0, 1]; or one for every block.
      layers: blocks that leave tokens out, counted from 0; without effect where every block has its rate.
      fuse_token: whether what is left out becomes one token.
      **family: further arguments of `DeiT`.

    Raises:
      ValueError: for rates and layers that do not fit the depth.
    """

    def __init__(
        self,
        features: int = 192,
        *,
        num_heads: int = 3,
        depth: int = 12,
        keep_rate: float | Sequence[float] = 0.7,
        layers: Sequence[int] = SHRINKING,
        fuse_token: bool = True,
        rngs: nnx.Rngs,
        **family: Any,
    ):
        rates = keep_rates(keep_rate, depth, layers)
        super().__init__(features, num_heads=num_heads, depth=depth, rngs=rngs, **family)
        stage, form = self.stage[0], {"fuse_token": fuse_token}
        pairs = zip(stage.blocks, rates, strict=True)
        stage.blocks = nnx.List([TokenReorganisationParts.around(b, keep_rate=r, **form) for b, r in pairs])
        rows, columns = (side // patch for side, patch in zip(self.image_shape, self.stem.patch_size, strict=False))
        position = stage.position
        position.grid, position.placed, position.prefix, position.resize = (rows, columns), 1, 1, "bicubic"
        self.image_shape = (None, None, self.image_shape[2])

    def __call__(
        self,
        images: ArrayLike,
        *,
        keep_rate: float | Sequence[float | None] | None = None,
        count: int | Sequence[int | None] | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """Logits, or without a head the class token.

        Args:
          images: `(B, H, W, channels)`.
          keep_rate: in place of the blocks' own, one for all or for each; a block that was built with 1 keeps all.
          count: how many patch tokens stay in a block, in place of a rate; one number for all or for each.
          deterministic: False in training.

        Raises:
          ValueError: for lists of another length than the depth, or numbers of tokens that cannot stay.
        """
        return self.with_kept(images, keep_rate=keep_rate, count=count, deterministic=deterministic)[0]

    def with_kept(
        self,
        images: ArrayLike,
        *,
        keep_rate: float | Sequence[float | None] | None = None,
        count: int | Sequence[int | None] | None = None,
        deterministic: bool = True,
    ) -> tuple[jax.Array, tuple[jax.Array | None, ...]]:
        """What a call gives, and of each block the places `(B, k)` of the patch tokens that it kept; None for all."""
        edits, kept = self.edits(), []
        plan = {"keep_rate": self._each("keep_rate", keep_rate), "count": self._each("count", count)}
        x = self._through(images, edits, deterministic, None, plan, kept)[1][:, 0]
        if self.head is not None:
            x = visit(self, edits.model, "logits", call(self.head, x, deterministic).astype(jnp.float32))
        return x, tuple(kept)

    def _each(self, name: str, value: Any) -> Sequence[Any]:
        values = value if isinstance(value, list | tuple) else [value] * len(self.blocks)
        if len(values) != len(self.blocks):
            raise ValueError(f"{name} must be one number, or one for each of {len(self.blocks)}, got {len(values)}")
        return values

    def _through(
        self,
        images: ArrayLike,
        edits: Pass,
        deterministic: bool,
        behind: list[jax.Array] | None = None,
        plan: dict[str, Sequence[Any]] | None = None,
        kept: list[jax.Array | None] | None = None,
    ) -> tuple[tuple[jax.Array, ...], jax.Array]:
        x, given, whole = self._embedded(images, deterministic), {}, True
        grid, stage = x.shape[:-1], self.stage[0]
        x = stage.placed(x, deterministic=deterministic)
        for layer, (block, edit) in enumerate(zip(stage.blocks, stage._each(edits.blocks), strict=True)):
            here = {} if plan is None else {name: values[layer] for name, values in plan.items()}
            tokens = x.shape[1]
            x, index = block.reorganise(x, edits=edit, deterministic=deterministic, **here, **given)
            x, given = hand_over(block, edit, x, given)
            whole = whole and index is None and x.shape[1] == tokens
            if behind is not None:
                behind.append(x)
            if kept is not None:
                kept.append(index)
        return (x[:, 1:].reshape(*grid, -1) if whole else x,), call(self.norm, x, deterministic)

    def stages(self, images: ArrayLike, *, deterministic: bool = True) -> tuple[jax.Array, ...]:
        """The map `(B, Hh, Ww, C)` of the patch tokens, where all of them stay.

        Raises:
          ValueError: if tokens are left out, without which there is no map; `tokens` gives those that are left.
        """
        (x,) = self._through(images, self.edits(), deterministic)[0]
        if x.ndim != 4:
            raise ValueError("tokens are left out (keep_rate): there is no map of what is left; tokens() gives it")
        return (x,)


_SMALL = {"features": 384, "num_heads": 6}
EVITS: Models = {
    "evit_small": (EViT, _SMALL),
    "evit_base": (EViT, {"features": 768, "num_heads": 12}),
}
"""For `staged.build_named`, keep rate 0.7 with a fused token: DeiT-S with 22.1 M parameters, at 79.5 % on ImageNet with
3.0 in place of 4.6 GMAC, and DeiT-B with 86.6 M."""
