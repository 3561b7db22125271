"""A vision transformer as an ensemble of paths: those that hinder are pruned, the others weighed (ICCV 2023).

Unrolled, what the last norm of a pre-norm transformer of L layers is given is a sum of 2L + 1 paths (arXiv:2308.06548):

    z_L = z_0 + Σ_l (m_l + f_l),    m_l = attention_l(LN(z_{l-1})),  f_l = MLP_l(LN(z_{l-1} + m_l))

Each path serves the layers behind it and the classifier. The second use is set apart here, the first stays as it is:

    E = Σ_i w_i ⊙ P_i        w_i ∈ {0, 1}: path pruning;    w_i learned, 1 at the start: EnsembleScale
    logits = head(LN(E))

With all w = 1 it is the transformer. Short paths learn from long ones by `attnlab.objectives.exits.prefix_distillation`
of the ensembles of the first paths; `attnlab.analysis.path_ensemble` finds the paths and what removing each of them
does. The sum is algebra, checked against timm's blocks. Where w stands and how it starts are a reading of the paper's
abstract: no code is public.
"""

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from attnlab.contract import Constant, UnsupportedArgument
from attnlab.models.block import Block
from attnlab.models.blocks import Blocks
from attnlab.models.staged import token_mean
from attnlab.models.vit import ViT
from attnlab.nn.chain import call
from attnlab.points import Pass
from attnlab.registry import Cost, Example, Kind, Paper, Source, register
from pallas_kernels.dtypes import at_least_float32

PAPER = Paper(
    "Revisiting Vision Transformer from the View of Path Ensemble",
    "Chang et al.",
    2023,
    arxiv="2308.06548",
    number=42,
)
_SOURCE = {"paper": PAPER, "source": Source.ABSTRACT_ONLY}
MODES = ("none", "prune", "scale", "both")
Mode = Literal["none", "prune", "scale", "both"]
Granularity = Literal["scalar", "channel"]


def _example() -> Example:
    paths = [jax.random.normal(key, (2, 3, 4)) for key in jax.random.split(jax.random.key(0), 3)]
    ensemble = PathEnsemble(4, 3, mode="both", keep_mask=(True, False, True), rngs=nnx.Rngs(0))
    return Example(ensemble, (paths,))


@register(
    "path_ensemble",
    kind=Kind.MODULE,
    cost=Cost(time="O(L·N·C)", memory="O(N·C)"),
    summary="the residual paths of a transformer in sum, some of them pruned and the others weighed",
    small=_example,
    **_SOURCE,
)
class PathEnsemble(nnx.Module):
    """Paths, each `(B, …, C)`, to their weighted sum `(B, …, C)`; see the module docstring.

    Args:
      features: channels C.
      num_paths: how many.
      mode: `"prune"` leaves paths out, `"scale"` has a learned factor for each, `"both"` both, `"none"` neither.
      keep_mask: which paths stay, to prune; all when None.
      granularity: whether a path has a factor for each `"channel"`, or a `"scalar"`.
      param_dtype: of the factors.
      rngs: not drawn from; all factors start at 1.

    Raises:
      ValueError: for another mode or granularity, a mask of another length, or one where nothing is pruned.
    """

    def __init__(
        self,
        features: int,
        num_paths: int,
        *,
        mode: Mode = "scale",
        keep_mask: Sequence[bool] | None = None,
        granularity: Granularity = "channel",
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs | None = None,
    ):
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
        if granularity not in ("scalar", "channel"):
            raise ValueError(f"granularity must be 'scalar' or 'channel', got {granularity!r}")
        if keep_mask is not None and mode not in ("prune", "both"):
            raise ValueError(f"keep_mask is for mode 'prune' or 'both', not for {mode!r}")
        keep = np.ones(num_paths, bool) if keep_mask is None else np.asarray(keep_mask, bool)
        if keep.shape != (num_paths,) or not keep.any():
            raise ValueError(f"keep_mask must keep some of {num_paths} paths, got {keep_mask}")
        self.num_paths, self.mode = num_paths, mode
        self.keep = Constant(jnp.asarray(keep)) if mode in ("prune", "both") else nnx.data(None)
        self.scale = nnx.data(None)
        if mode in ("scale", "both"):
            ones = jnp.ones((num_paths, features if granularity == "channel" else 1), param_dtype)
            self.scale = nnx.Param(ones, logical_axes=(None, "embed" if granularity == "channel" else None),
                                   weight_decay=False)  # fmt: skip

    def weighed(self, paths: Sequence[ArrayLike]) -> list[jax.Array]:
        """Every path times its weight, in float32 (or wider).

        Raises:
          ValueError: for another number of paths.
        """
        if len(paths) != self.num_paths:
            raise ValueError(f"paths must be {self.num_paths}, got {len(paths)}")
        found = []
        for index, path in enumerate(map(jnp.asarray, paths)):
            wide = path.astype(at_least_float32(path.dtype))
            wide = wide if self.scale is None else wide * self.scale[index].astype(wide.dtype)
            found.append(wide if self.keep is None else jnp.where(self.keep[index], wide, 0))
        return found

    def __call__(self, paths: Sequence[ArrayLike]) -> jax.Array:
        """E, in the dtype of the paths, summed in float32 (or wider)."""
        total, *others = self.weighed(paths)
        for path in others:
            total = total + path
        return total.astype(jnp.result_type(paths[0]))


def count_paths(blocks: Sequence[Block]) -> int:
    """The number of paths through blocks, the identity among them.

    Raises:
      UnsupportedArgument: for blocks that are no sum of paths: with norms or factors on the stream itself.
    """
    if any(block.order != "pre" or block.scaled != "branch" for block in blocks):
        raise UnsupportedArgument("blocks must be pre-norm, with factors of their branches alone, to be sums of paths")
    parts = ("mixer", "mlp", "before", "before2")
    return 1 + sum(getattr(block, part) is not None for block in blocks for part in parts)


@register(
    "path_ensemble.vit",
    kind=Kind.BACKBONE,
    cost=Cost(time="O(L·N²·H·D)", memory="O(N²·H + L·N·C)"),
    summary="a vision transformer whose classifier sees its residual paths weighed, some of them pruned",
    small={"image_size": (32, 32), "num_classes": 5, "features": 8, "num_heads": 2, "depth": 1, "patch_size": 8}
    | {"mode": "both", "keep_mask": (True, True, False), "mlp_ratio": 1.0},
    **_SOURCE,
)
class PathEnsembleViT(ViT):
    """Images `(B, H, W, channels)` to logits `(B, num_classes)` in float32.

    Args:
      image_size: (H, W) in pixels.
      num_classes: classes; without any the pooled features are the result.
      mode: what is done to paths: see `PathEnsemble`.
      keep_mask: which of the 2·depth + 1 paths stay, to prune: the embedding, then attention and feed-forward of each
        layer; all when None.
      granularity: of the factors: see `PathEnsemble`.
      rngs: streams `params`, and `dropout` if there is any.
      **vit: further arguments of `ViT`.

    Raises:
      ValueError: as `ViT` and `PathEnsemble`, and for `remat`, inside of which paths would be lost.
    """

    def __init__(
        self,
        image_size: Sequence[int],
        num_classes: int | None,
        *,
        mode: Mode = "scale",
        keep_mask: Sequence[bool] | None = None,
        granularity: Granularity = "channel",
        rngs: nnx.Rngs,
        **vit: Any,
    ):
        super().__init__(image_size, num_classes, rngs=rngs, **vit)
        if self.stage[0].remat:
            raise ValueError("remat must be False: what a recomputed block adds to the stream is not kept")
        features = self.norm.scale.shape[0]
        form = {"mode": mode, "keep_mask": keep_mask, "granularity": granularity}
        stored = {"param_dtype": vit.get("param_dtype", jnp.float32), "rngs": rngs}
        self.ensemble = PathEnsemble(features, count_paths(self.blocks), **form, **stored)

    def paths(self, images: ArrayLike, *, deterministic: bool = True) -> list[jax.Array]:
        """The paths, each `(B, …, C)`, before they are weighed."""
        return self._paths(self._embedded(images, deterministic), self.edits(), deterministic)

    def classified(self, ensemble: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Logits of an ensemble E: the norm, pooling and head of the model."""
        x = call(self.norm, ensemble.reshape(ensemble.shape[0], -1, ensemble.shape[-1]), deterministic)
        if self.pool is not None:
            x = call(self.pool, x, deterministic)
        else:
            x = token_mean(x) if self.stage[-1].prefix is None else x[:, 0]
        return x if self.head is None else call(self.head, x, deterministic).astype(jnp.float32)

    def prefix_logits(
        self, images: ArrayLike, *, layers: Sequence[int], deterministic: bool = True
    ) -> tuple[jax.Array, ...]:
        """Logits of the ensembles of all paths up to each of `layers`, counted from 1, and of the whole one, last.

        Raises:
          ValueError: for layers that do not exist.
        """
        depth = len(self.blocks)
        if any(not 1 <= layer <= depth for layer in layers):
            raise ValueError(f"layers must be among 1..{depth}, got {tuple(layers)}")
        paths = self.paths(images, deterministic=deterministic)
        dtype, ends = paths[0].dtype, {count_paths(self.blocks[:layer]): layer for layer in (*layers, depth)}
        found, total = {}, 0.0
        for index, path in enumerate(self.ensemble.weighed(paths), 1):
            total = path if index == 1 else total + path
            if index in ends:
                found[ends[index]] = self.classified(total.astype(dtype), deterministic=deterministic)
        return tuple(found[layer] for layer in (*layers, depth))

    def _paths(
        self, x: jax.Array, edits: Pass, deterministic: bool, behind: list[jax.Array] | None = None
    ) -> list[jax.Array]:
        stage = self.stage[0]
        x = stage.placed(stage.enter(x, deterministic=deterministic), deterministic=deterministic)
        paths: list[jax.Array] = [x]
        some = edits.of(0, len(stage.blocks))
        Blocks.__call__(stage, x, edits=some, behind=behind, deterministic=deterministic, paths=paths)
        if any(path.shape != x.shape for path in paths):
            raise ValueError("an intervention leaves tokens out: paths of different tokens have no sum")
        return paths

    def _through_stages(
        self, x: jax.Array, edits: Pass, deterministic: bool, behind: list[jax.Array] | None = None
    ) -> tuple[tuple[jax.Array, ...], jax.Array]:
        grid, prefix = x.shape[:-1], self.stage[0].prefix
        ensemble = self.ensemble(self._paths(x, edits, deterministic, behind))
        count = 0 if prefix is None else prefix.count
        maps = ensemble[:, count:].reshape(*grid, -1) if count else ensemble
        ensemble = ensemble.reshape(ensemble.shape[0], -1, ensemble.shape[-1])
        return (maps,), call(self.norm, ensemble, deterministic)


def with_mask(model: PathEnsembleViT, keep_mask: Sequence[bool]) -> PathEnsembleViT:
    """The same weights with other paths pruned: a new structure that holds the same arrays.

    Raises:
      ValueError: for a model of a mode without pruning, or a mask of another length or of nothing.
    """
    keep = np.asarray(keep_mask, bool)
    if model.ensemble.keep is None or keep.shape != (model.ensemble.num_paths,) or not keep.any():
        raise ValueError(
            f"a model of mode 'prune' or 'both' takes a mask that keeps some of its {model.ensemble.num_paths} paths"
        )
    model = nnx.clone(model)
    model.ensemble.keep[...] = jnp.asarray(keep)
    return model
