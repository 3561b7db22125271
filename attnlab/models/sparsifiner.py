"""Sparsifiner: DeiT whose blocks attend where a learned guess of their attention maps points (CVPR 2023).

    x = x + attention(LN(x));   x = x + MLP(LN(x));   pruned patches of x are 0                            a block

`attnlab.attention.sparse.sparsifiner` describes the attention (arXiv:2303.13755; code: lim142857/Sparsifiner). Trained
in two phases from a trained DeiT as teacher: first the guesses, under full attention (`reconstruct=True`), then all of
it under sparse attention, see `attnlab.objectives.token_distillation`; `with_reconstruction` changes the phase.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from attnlab.attention.sparse.sparsifiner import COST, SOURCE, SparseAttention, SparsifinerAttention, with_zeros
from attnlab.models import staged
from attnlab.models.block import Block
from attnlab.models.staged import Models, Prefix, Stage, StagedBackbone
from attnlab.nn.chain import call
from attnlab.nn.conv import PatchEmbed
from attnlab.nn.heads import redraw_kernels
from attnlab.nn.linear import trunc_normal
from attnlab.nn.mlp import MLP
from attnlab.nn.norms import LayerNorm
from attnlab.nn.positions import PositionTable
from attnlab.points import Edits, Pass, visit
from attnlab.registry import Kind, register


class SparsifinerBlock(Block):
    """A pre-norm block of `SparsifinerAttention`, which hands on which patches are left.

    Args:
      features: channels C.
      num_heads: heads H.
      num_tokens: N, the class token among them.
      mlp_ratio: hidden channels of the feed-forward over C, rounded down.
      norm_eps: of both norms.
      dropout: rate inside the feed-forward and on what the attention returns.
      drop_path: probability that a branch is dropped for an example in training.
      dtype: of the computation; that of the tokens when None.
      param_dtype: of the parameters.
      rngs: streams `params`, and `dropout` if there is any.
      **attention: further arguments of `SparsifinerAttention`.
    """

    hands_options_on = True

    def __init__(
        self,
        features: int,
        *,
        num_heads: int,
        num_tokens: int,
        mlp_ratio: float = 4.0,
        norm_eps: float = 1e-6,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
        **attention: Any,
    ):
        stored = {"param_dtype": param_dtype, "rngs": rngs}
        sizes = {"num_heads": num_heads, "num_tokens": num_tokens, "projection_dropout": dropout}
        super().__init__(
            SparsifinerAttention(features, **sizes, dtype=dtype, **attention, **stored),
            MLP(features, int(features * mlp_ratio), dropout=dropout, dtype=dtype, **stored),
            LayerNorm(features, eps=norm_eps, **stored),
            LayerNorm(features, eps=norm_eps, **stored),
            drop_path=drop_path,
            rngs=rngs,
        )

    def __call__(
        self,
        x: ArrayLike,
        alive: jax.Array | None = None,
        *,
        edits: Edits | None = None,
        deterministic: bool = True,
    ) -> SparseAttention:
        """Tokens `(B, N, C)` to those behind the block, with what the attention made on the way."""

        def mix(tokens: jax.Array) -> tuple[jax.Array, SparseAttention]:
            made = self.mixer(tokens, alive, edits=edits, deterministic=deterministic)
            return made.tokens, made

        x, made = self._through(jnp.asarray(x), mix, edits, deterministic)
        if made.alive is not None and not self.mixer.reconstruct:
            x = with_zeros(x, made.alive)
        return made._replace(tokens=x)


class SparsePass(NamedTuple):
    """All that the losses of a training look at.

    Attributes:
      logits: `(B, num_classes)` in float32; without a head the class token.
      tokens: the patches' tokens behind the last norm, `(B, N - 1, C)`.
      layers: what the attention of each block made.
    """

    logits: jax.Array
    tokens: jax.Array
    layers: tuple[SparseAttention, ...]


@register(
    "sparsifiner.backbone",
    kind=Kind.BACKBONE,
    cost=COST,
    summary="a vision transformer whose blocks attend to a learned share of all pairs, and may prune patches",
    small={"features": 8, "num_heads": 2, "depth": 1, "mlp_ratio": 1.0, "keep_rate": 0.5, "reduce_n_factor": 3}
    | {"token_keep_rates": 0.5, "prune_layers": (0,), "top_coefficients": 2, "basis_threshold": 0.0}
    | {"image_size": 32, "patch_size": 8, "num_classes": 5},
    **SOURCE,
)
class Sparsifiner(StagedBackbone):
    """Images `(B, H, W, channels)` to logits `(B, num_classes)` in float32; the defaults are Sparsifiner-S.

    Args:
      features: channels C.
      num_heads: heads.
      depth: blocks.
      keep_rate: share of all tokens that a row attends to, one for all blocks or each.
      token_keep_rates: share of all patches that is left behind a block that prunes, one for all blocks or each.
      prune_layers: blocks that prune patches, counted from 0.
      reduce_n_factor: tokens over the rank of the guess.
      qkv_bias: whether queries, keys and values have a bias.
      mlp_ratio: hidden channels over channels.
      image_size: pixels on a side, or (rows, columns).
      patch_size: pixels on a side of a patch.
      channels: of the images.
      num_classes: classes; without any the class token is the result.
      norm_eps: of all norms.
      dropout: rate after the positions, inside feed-forwards and on what the attention returns.
      drop_path: stochastic depth rate of the last block; it rises linearly from 0.
      dtype: of the computation; that of the images when None.
      param_dtype: of the parameters.
      rngs: streams `params`, and `dropout` if there is any.
      **attention: further arguments of `SparsifinerAttention` and of its `MaskPredictor`.

    Raises:
      ValueError: if the patches do not tile the image, for rates or layers that do not fit the depth, and as the
        attention.
    """

    hands_options_on = True

    def __init__(
        self,
        features: int = 384,
        *,
        num_heads: int = 6,
        depth: int = 12,
        keep_rate: float | Sequence[float] = 0.25,
        token_keep_rates: float | Sequence[float] = 1.0,
        prune_layers: Sequence[int] = (),
        reduce_n_factor: float = 6,
        qkv_bias: bool = True,
        mlp_ratio: float = 4.0,
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
        **attention: Any,
    ):
        if any(not 0 <= layer < depth for layer in prune_layers):
            raise ValueError(f"prune_layers must be below the depth {depth}, got {tuple(prune_layers)}")
        rates, token_rates = (
            [value] * depth if isinstance(value, int | float) else list(value)
            for value in (keep_rate, token_keep_rates)
        )
        for name, values in {"keep_rate": rates, "token_keep_rates": token_rates}.items():
            if len(values) != depth:
                raise ValueError(f"{name} must be one number, or one for each of {depth} blocks, got {len(values)}")
        stored = {"param_dtype": param_dtype, "rngs": rngs}
        common = {"dtype": dtype, **stored}
        (grid,) = staged.halved_grids(image_size, patch_size, 1)
        tokens = 1 + grid[0] * grid[1]
        blocks = [
            SparsifinerBlock(
                features,
                num_heads=num_heads,
                num_tokens=tokens,
                keep_rate=rates[layer],
                token_keep_rate=token_rates[layer],
                prune_tokens=layer in prune_layers,
                reduce_n_factor=reduce_n_factor,
                qkv_bias=qkv_bias,
                mlp_ratio=mlp_ratio,
                norm_eps=norm_eps,
                dropout=dropout,
                drop_path=drop_path * layer / max(depth - 1, 1),
                **attention,
                **common,
            )
            for layer in range(depth)
        ]
        super().__init__(
            PatchEmbed(channels, features, staged.pair(patch_size), **common),
            [
                Stage(
                    blocks,
                    prefix=Prefix(1, features, **stored),
                    position=PositionTable((tokens,), features, **stored),
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

    def with_layers(self, images: ArrayLike, *, deterministic: bool = True) -> SparsePass:
        """A call with all that the losses of a training look at."""
        edits, layers = self.edits(), []
        x = self._through_stages(self._embedded(images, deterministic), edits, deterministic, None, layers)[1]
        logits = x[:, 0]
        if self.head is not None:
            logits = visit(self, edits.model, "logits", self.head(logits).astype(jnp.float32))
        return SparsePass(logits, x[:, 1:], tuple(layers))

    def _through_stages(
        self,
        x: jax.Array,
        edits: Pass,
        deterministic: bool,
        behind: list[jax.Array] | None = None,
        layers: list[SparseAttention] | None = None,
    ) -> tuple[tuple[jax.Array, ...], jax.Array]:
        stage, grid, alive = self.stage[0], x.shape[:-1], None
        x = stage.placed(x, deterministic=deterministic)
        for block, edit in zip(stage.blocks, stage._each(edits.blocks), strict=True):
            made = block(x, alive, edits=edit, deterministic=deterministic)
            x, alive = made.tokens, made.alive
            if behind is not None:
                behind.append(x)
            if layers is not None:
                layers.append(made)
        return (x[:, 1:].reshape(*grid, -1),), call(self.norm, x, deterministic)


def with_reconstruction(model: Sparsifiner, reconstruct: bool) -> Sparsifiner:
    """The same weights in the other phase of training: a new structure that holds the same arrays."""
    model = nnx.clone(model)
    for block in model.blocks:
        block.mixer.reconstruct = reconstruct
    return model


SPARSIFINERS: Models = {
    "sparsifiner_tiny": (Sparsifiner, {"features": 192, "num_heads": 3}),
    "sparsifiner_small": (Sparsifiner, {}),
    "sparsifiner_base": (Sparsifiner, {"features": 768, "num_heads": 12}),
}
"""For `staged.build_named`, with the released configuration: a quarter of all pairs, guesses of rank 32. To DeiT's
parameters those of the guesses add some 17,000 in each block, whatever the width: 5.9, 22.3 and 86.8 M, as the authors'
class has them. They released the small one's configuration; the paper counts no parameters that could be read."""
