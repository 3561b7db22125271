"""DependencyViT: a vision transformer of reversed attention, without its leaves (CVPR 2023, arXiv:2304.03282).

    x, m = x + γ_1 ⊙ reversed_attention(LN(x), m);   [x, m of the largest m];   x = x + γ_2 ⊙ MLP(LN(x))      a block
    logits = W mean(m ⊙ LN(x))                                                                       no class token

m is handed from block to block, 1 in front of the first. The lite models keep, in the t-th of their pruning blocks,
⌊p N⌋ tokens, p = (1 - t ρ) / (1 - (t-1) ρ), the largest m first. Checked against the implementation of a third party
(see `attnlab.attention.dense.dependencyvit`); that m scores what is pruned and scales the last tokens is its reading.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from attnlab.attention.dense.dependencyvit import COST, SOURCE, Dependent, ReversedAttention
from attnlab.contract import record
from attnlab.models import staged
from attnlab.models.block import Block
from attnlab.models.staged import Models, Stage, StagedBackbone
from attnlab.nn.chain import call
from attnlab.nn.conv import PatchEmbed
from attnlab.nn.heads import redraw_kernels
from attnlab.nn.linear import trunc_normal
from attnlab.nn.mlp import MLP, LayerScale
from attnlab.nn.norms import LayerNorm
from attnlab.nn.positions import PositionTable
from attnlab.nn.token_selection import select_top
from attnlab.points import Edits, Pass, visit
from attnlab.registry import Example, Kind, register


def kept_tokens(tokens: int, ratio: float, index: int) -> int:
    """How many of `tokens` the pruning of that number, counted from 1, leaves: of all that came in, ratio fewer each.

    Raises:
      ValueError: if none would be left.
    """
    kept = math.floor((1 - index * ratio) / (1 - (index - 1) * ratio) * tokens)
    if kept < 1:
        raise ValueError(f"pruning {index} by {ratio} leaves none of {tokens} tokens")
    return kept


def _example() -> Example:
    keys = jax.random.split(jax.random.key(0), 2)
    block = DependencyBlock(8, num_heads=2, mlp_ratio=1.0, layer_scale=0.5, prune=(0.4, 1), rngs=nnx.Rngs(0))
    x, message = jax.random.normal(keys[0], (2, 5, 8)), jax.random.uniform(keys[1], (2, 5))
    return Example(block, (x, message), {}, (0, 1), (0, 1))


@register(
    "dependencyvit.block",
    kind=Kind.MODULE,
    cost=COST,
    kernel="block_sparse_attention",
    summary="a transformer block of reversed attention that may leave out the tokens that send least",
    small=_example,
    **SOURCE,
)
class DependencyBlock(Block):
    """Tokens `(B, N, C)` and messages `(B, N)` to the same, of fewer tokens where it prunes.

    Args:
      features: channels C.
      num_heads: heads H.
      mlp_ratio: hidden channels of the feed-forward over C, rounded down.
      layer_scale: γ at the start; None for none.
      qkv_bias: whether queries, keys and values have a bias.
      qk_norm: whether queries and keys are normed.
      kernel: of `ReversedAttention`.
      prune: (ρ, t), which pruning of the model this block has; None for none.
      norm_eps: of all norms.
      dropout: rate inside the feed-forward and on what the attention returns.
      drop_path: probability that a branch is dropped for an example in training.
      dtype: of the computation; that of the tokens when None.
      param_dtype: of the parameters.
      rngs: streams `params`, and `dropout` if there is any.
    """

    def __init__(
        self,
        features: int,
        *,
        num_heads: int,
        mlp_ratio: float = 4.0,
        layer_scale: float | None = 1e-6,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        kernel: str | None = None,
        prune: tuple[float, int] | None = None,
        norm_eps: float = 1e-6,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        stored = {"param_dtype": param_dtype, "rngs": rngs}
        inner = {"num_heads": num_heads, "norm_eps": norm_eps, "projection_dropout": dropout}
        inner |= {"qkv_bias": qkv_bias, "qk_norm": qk_norm, "kernel": kernel}
        mixer = ReversedAttention(features, **inner, dtype=dtype, **stored)
        mlp = MLP(features, int(features * mlp_ratio), dropout=dropout, dtype=dtype, **stored)
        norms = [LayerNorm(features, eps=norm_eps, **stored) for _ in range(2)]
        scales: dict[str, Any] = {}
        if layer_scale is not None:
            scales = {name: LayerScale(features, init=layer_scale, **stored) for name in ("scale1", "scale2")}
        super().__init__(mixer, mlp, *norms, **scales, drop_path=drop_path, rngs=rngs)
        self.prune = None if prune is None else tuple(prune)

    def __call__(
        self,
        x: ArrayLike,
        message: ArrayLike | None = None,
        *,
        edits: Edits | None = None,
        deterministic: bool = True,
    ) -> Dependent:
        """Arguments as `ReversedAttention`; what is left stands by descending message where the block prunes.

        It records, as `"kept"` `(B, k)`, the places of what is left among the tokens that came in.
        """

        def mixed(tokens: jax.Array) -> jax.Array:
            nonlocal message
            y, message = self.mixer(
                visit(self, edits, "normed", tokens), message, edits=edits, deterministic=deterministic
            )
            return visit(self, edits, "mixed", y)

        def fed(tokens: jax.Array) -> jax.Array:
            return visit(self, edits, "mlp", call(self.mlp, tokens, deterministic))

        x = visit(self, edits, "stream", jnp.asarray(x))
        x = self._branch(x, mixed, self.norm1, self.scale1, True, deterministic)
        if self.prune is not None:
            chosen = select_top(message, kept_tokens(x.shape[1], *self.prune), by_score=True)
            record(self, "kept", lambda: chosen.kept)
            x, message = chosen.keep(x), chosen.keep(message[..., None])[..., 0]
        x = visit(self, edits, "middle", x)
        return Dependent(self._branch(x, fed, self.norm2, self.scale2, True, deterministic), message)


@register(
    "dependencyvit.backbone",
    kind=Kind.BACKBONE,
    cost=COST,
    kernel="block_sparse_attention",
    summary="a vision transformer of reversed attention, whose lite form leaves out what sends least",
    small={"features": 8, "num_heads": 2, "depth": 2, "mlp_ratio": 1.0, "layer_scale": 0.5, "prune_layers": (1,)}
    | {"prune_ratio": 0.4, "image_size": 32, "patch_size": 8, "num_classes": 5},
    **SOURCE,
)
class DependencyViT(StagedBackbone):
    """Images `(B, H, W, channels)` to logits `(B, num_classes)` in float32; the defaults are DependencyViT-Ti.

    Args:
      features: channels C.
      num_heads: heads.
      depth: blocks.
      prune_layers: blocks that leave tokens out, counted from 1; none when None.
      prune_ratio: ρ, the share of all tokens that each of them leaves out.
      qkv_bias: whether queries, keys and values have a bias.
      qk_norm: whether queries and keys are normed.
      kernel: of `ReversedAttention`.
      mlp_ratio: hidden channels over channels.
      layer_scale: γ at the start; None for none.
      image_size: pixels on a side, or (rows, columns).
      patch_size: pixels on a side of a patch.
      channels: of the images.
      num_classes: classes; without any the pooled features are the result.
      norm_eps: of all norms.
      dropout: rate after the positions, inside feed-forwards and on what the attention returns.
      drop_path: stochastic depth rate of the last block; it rises linearly from 0.
      dtype: of the computation; that of the images when None.
      param_dtype: of the parameters.
      rngs: streams `params`, and `dropout` if there is any.

    Raises:
      ValueError: if the patches do not tile the image, for pruning without a ratio, or layers that do not exist.
    """

    def __init__(
        self,
        features: int = 192,
        *,
        num_heads: int = 12,
        depth: int = 12,
        prune_layers: Sequence[int] | None = None,
        prune_ratio: float | None = None,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        kernel: str | None = None,
        mlp_ratio: float = 4.0,
        layer_scale: float | None = 1e-6,
        image_size: int | Sequence[int] = 224,
        patch_size: int | Sequence[int] = 16,
        channels: int = 3,
        num_classes: int | None = 1000,
        norm_eps: float = 1e-6,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        pruning = sorted(prune_layers or ())
        if any(not 1 <= layer <= depth for layer in pruning) or len(set(pruning)) != len(pruning):
            raise ValueError(f"prune_layers must be among 1..{depth}, each once, got {prune_layers}")
        if (prune_ratio is None) != (not pruning) or (pruning and not 0 < len(pruning) * prune_ratio < 1):
            raise ValueError(f"prune_ratio must be positive and leave tokens after {pruning}, got {prune_ratio}")
        stored = {"param_dtype": param_dtype, "rngs": rngs}
        common = {"dtype": dtype, **stored}
        (grid,) = staged.halved_grids(image_size, patch_size, 1)
        blocks = [
            DependencyBlock(
                features,
                num_heads=num_heads,
                mlp_ratio=mlp_ratio,
                layer_scale=layer_scale,
                prune=(prune_ratio, 1 + pruning.index(layer)) if layer in pruning else None,
                norm_eps=norm_eps,
                dropout=dropout,
                drop_path=drop_path * (layer - 1) / max(depth - 1, 1),
                qkv_bias=qkv_bias,
                qk_norm=qk_norm,
                kernel=kernel,
                **common,
            )
            for layer in range(1, depth + 1)
        ]
        super().__init__(
            PatchEmbed(channels, features, staged.pair(patch_size), **common),
            [
                Stage(
                    blocks,
                    position=PositionTable(grid, features, **stored),
                    dropout=staged.dropout_or_none(dropout, rngs),
                )
            ],
            norm=LayerNorm(features, eps=norm_eps, **stored),
            head=staged.classifier(features, num_classes, **common),
            image_size=staged.pair(image_size),
            channels=channels,
            dtype=dtype,
        )
        redraw_kernels(self, trunc_normal, rngs=rngs)

    def messages(self, images: ArrayLike, *, deterministic: bool = True) -> tuple[jax.Array, ...]:
        """m `(B, N)` behind each block, of the tokens that are left there: how much each of them still sends."""
        found: list[jax.Array] = []
        self._through_stages(self._embedded(images, deterministic), self.edits(), deterministic, None, found)
        return tuple(found)

    def stages(self, images: ArrayLike, *, deterministic: bool = True) -> tuple[jax.Array, ...]:
        """The map `(B, Hh, Ww, C)` of all tokens, without the last norm.

        Raises:
          ValueError: if tokens are left out, without which there is no map; `tokens` gives those that are left.
        """
        (x,) = self._through(images, self.edits(), deterministic)[0]
        if x.ndim != 4:
            raise ValueError("tokens are left out (prune_layers): there is no map of what is left; tokens() gives it")
        return (x,)

    def _through_stages(
        self,
        x: jax.Array,
        edits: Pass,
        deterministic: bool,
        behind: list[jax.Array] | None = None,
        messages: list[jax.Array] | None = None,
    ) -> tuple[tuple[jax.Array, ...], jax.Array]:
        """The map, and tokens normed and scaled by their messages."""
        stage, grid, message = self.stage[0], x.shape, None
        x = stage.placed(x, deterministic=deterministic).reshape(x.shape[0], -1, x.shape[-1])
        for block, edit in zip(
            stage.blocks, edits.of(0, len(stage.blocks)) or (None,) * len(stage.blocks), strict=True
        ):
            x, message = block(x, message, edits=edit, deterministic=deterministic)
            if behind is not None:
                behind.append(x)
            if messages is not None:
                messages.append(message)
        tokens = call(self.norm, x, deterministic)
        tokens = tokens if message is None else (tokens * message[..., None].astype(tokens.dtype))
        return (x.reshape(grid) if x.shape[1] == grid[1] * grid[2] else x,), tokens


_LITE = {"prune_layers": (2, 5, 8, 11), "prune_ratio": 0.16}
DEPENDENCYVITS: Models = {
    "dependencyvit_tiny": (DependencyViT, {}),
    "dependencyvit_small": (DependencyViT, {"features": 384}),
    "dependencyvit_lite_tiny": (DependencyViT, _LITE),
    "dependencyvit_lite_small": (DependencyViT, {"features": 384} | _LITE),
}
"""For `staged.build_named`, with 12 heads; pruning has no parameters. Those of ViT without a class token, and in each
block C H of the head selector and C²/2 + C/2 of the message controller more. The authors released no code, and what
their paper counts could not be read: the tests hold these to that sum."""
