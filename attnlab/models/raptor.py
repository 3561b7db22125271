"""Raptor: a deep vision transformer as few blocks, each applied many times (2025, arXiv:2512.19941).

A transformer of L layers, a_0 → … → a_L, falls into k phases of layers, in each of which one block is applied again and
again, told the number t = 1..L of the layer (code: KempnerInstitute/raptor):

    (s_1, s_2, s_3) = 1 + W_2 silu(W_1 t)            per channel; t is the number itself
    x = x + s_1 ⊙ γ_1 ⊙ attention(LN(x));   x = x + s_2 ⊙ γ_2 ⊙ MLP(LN(x));   x_t = s_3 ⊙ x

s_3 scales the stream as a whole. W_2 starts near 0, γ at 1e-5, LN has an eps of 1e-5. Layer t takes the first block
whose threshold is at least t, the last block beyond all of them. The phases are found by
`attnlab.analysis.depth_phases`, the blocks trained by `attnlab.objectives.layer_imitation`.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from attnlab.attention.dense.softmax_attention import SoftmaxAttention
from attnlab.models.block import Block
from attnlab.models.vit import ViT
from attnlab.nn.linear import Linear
from attnlab.nn.mlp import MLP, GatedMLP, LayerScale
from attnlab.nn.norms import LayerNorm
from attnlab.registry import Cost, Example, Kind, Paper, Source, register
from pallas_kernels.dtypes import at_least_float32

PAPER = Paper("Block-Recurrent Dynamics in Vision Transformers", "Jacobs et al.", 2025, arxiv="2512.19941", number=24)
_REPOSITORY = "KempnerInstitute/raptor"
_COST = Cost(time="O(L·N²·H·D)", memory="O(N²·H)")


class RecurrentBlock(nnx.Module):
    """A pre-norm block that knows which layer it stands in for; see the module docstring for the equations.

    Args:
      features: channels C.
      num_heads: heads H.
      mlp_ratio: hidden channels of the feed-forward over C, rounded down.
      layer_scale: γ at the start; None for none.
      time_scale: whether there are factors s of the layer's number.
      swiglu: whether the feed-forward is gated.
      time_features: hidden channels of the map of the layer's number.
      dtype: of the computation; that of the tokens when None.
      param_dtype: of the parameters.
      rngs: stream `params`.
    """

    def __init__(
        self,
        features: int,
        *,
        num_heads: int,
        mlp_ratio: float = 4.0,
        layer_scale: float | None = 1e-5,
        time_scale: bool = True,
        swiglu: bool = False,
        time_features: int = 16,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.dtype = dtype
        stored = {"param_dtype": param_dtype, "rngs": rngs}
        common, hidden = {"dtype": dtype, **stored}, int(features * mlp_ratio)
        self.norm1, self.norm2 = (LayerNorm(features, eps=1e-5, **stored) for _ in range(2))
        self.mixer = SoftmaxAttention(features, num_heads=num_heads, **common)
        if swiglu:
            self.mlp = GatedMLP(features, hidden, use_bias=True, **common)
        else:
            self.mlp = MLP(features, hidden, **common)
        self.scale1, self.scale2 = (
            nnx.data(None) if layer_scale is None else LayerScale(features, init=layer_scale, **stored)
            for _ in range(2)
        )
        self.time_in = self.time_out = nnx.data(None)
        if time_scale:
            small = nnx.initializers.normal(1e-4)
            maps = {"dtype": at_least_float32(param_dtype), **stored}
            self.time_in = Linear(1, time_features, axes=(None, None), **maps)
            options = {"kernel_init": small, "bias_init": small, **maps}
            self.time_out = Linear(time_features, 3 * features, axes=(None, "embed"), **options)

    def __call__(self, x: ArrayLike, t: ArrayLike | None = None) -> jax.Array:
        """Tokens `(B, N, C)` of layer t - 1 to those of layer t, a number or one of each example `(B,)`.

        Raises:
          ValueError: if the block has factors of the layer's number and there is none.
        """
        x = jnp.asarray(x, self.dtype)
        scales: Sequence[jax.Array | None] = (None, None, None)
        if self.time_in is not None:
            if t is None:
                raise ValueError("t is missing: the block has factors of the layer's number")
            number = jnp.broadcast_to(jnp.asarray(t, self.time_in.dtype), x.shape[:1])[:, None, None]
            factors = 1 + self.time_out(jax.nn.silu(self.time_in(number)))
            scales = jnp.split(factors.astype(x.dtype), 3, axis=-1)
        x = x + _scaled(self.mixer(self.norm1(x)), self.scale1, scales[0])
        x = x + _scaled(self.mlp(self.norm2(x)), self.scale2, scales[1])
        return _scaled(x, None, scales[2])


def _scaled(y: jax.Array, learned: LayerScale | None, factor: jax.Array | None) -> jax.Array:
    y = y if learned is None else learned(y)
    return y if factor is None else y * factor


def _example() -> Example:
    raptor = Raptor(8, num_heads=2, layers=5, thresholds=(2,), layer_scale=0.5, rngs=nnx.Rngs(0))
    return Example(raptor, (jax.random.normal(jax.random.key(0), (2, 6, 8)),))


@register(
    "raptor",
    kind=Kind.MODULE,
    paper=PAPER,
    source=Source.AUTHORS_CODE,
    repository=_REPOSITORY,
    cost=_COST,
    summary="few blocks, each applied to several layers in turn, in place of the layers of a vision transformer",
    small=_example,
)
class Raptor(nnx.Module):
    """Tokens `(B, N, C)` in front of the layers to those behind every one of them, `(B, L, N, C)`.

    Args:
      features: channels C.
      num_heads: heads H.
      layers: L.
      thresholds: last layer of each phase but the last, rising; one block more than these.
      rngs: stream `params`.
      **block: further arguments of `RecurrentBlock`.

    Raises:
      ValueError: for thresholds that do not rise inside 1..L - 1.
    """

    def __init__(
        self,
        features: int,
        *,
        num_heads: int,
        layers: int = 12,
        thresholds: Sequence[int] = (7,),
        rngs: nnx.Rngs,
        **block: Any,
    ):
        bounds = (0, *thresholds, layers)
        if any(first >= last for first, last in itertools.pairwise(bounds)):
            raise ValueError(f"thresholds must rise inside 1..{layers - 1} for {layers} layers, got {thresholds}")
        self.layers, self.thresholds = layers, tuple(thresholds)
        self.blocks = nnx.List(
            RecurrentBlock(features, num_heads=num_heads, **block, rngs=rngs) for _ in range(len(thresholds) + 1)
        )

    def __call__(self, x: ArrayLike) -> jax.Array:
        x = jnp.asarray(x, self.blocks[0].dtype)
        states = []
        for block, first, last in zip(self.blocks, (0, *self.thresholds), (*self.thresholds, self.layers), strict=True):
            numbers = jnp.arange(first + 1, last + 1)

            def layer(x: jax.Array, t: jax.Array, block: RecurrentBlock = block) -> tuple[jax.Array, jax.Array]:
                y = block(x, t)
                return y, y

            if hasattr(self, "__captures__"):  # what is recorded inside a scan cannot leave it
                for t in numbers:
                    x, _ = layer(x, t)
                    states.append(x[None])
            else:
                x, phase = jax.lax.scan(layer, x, numbers)
                states.append(phase)
        return jnp.moveaxis(jnp.concatenate(states), 0, 1)

    def step(self, x: ArrayLike, t: int) -> jax.Array:
        """One layer: tokens `(B, N, C)` of layer t - 1 to those of layer t, a Python number."""
        index = next((i for i, last in enumerate(self.thresholds) if t <= last), len(self.blocks) - 1)
        return self.blocks[index](x, t)


class Surrogate(nnx.Module):
    """What the layers of a vision transformer add to its stream, by `Raptor`; it stands as the mixer of one block."""

    accepts: frozenset[str] = frozenset()

    def __init__(self, raptor: Raptor):
        self.raptor = raptor

    def __call__(self, x: jax.Array) -> jax.Array:
        tokens = x.reshape(x.shape[0], -1, x.shape[-1])
        return self.raptor(tokens)[:, -1].reshape(x.shape) - x


@register(
    "raptor.vit",
    kind=Kind.BACKBONE,
    paper=PAPER,
    source=Source.AUTHORS_CODE,
    repository=_REPOSITORY,
    cost=_COST,
    summary="a vision transformer whose layers are a few blocks, each applied several times",
    small={"image_size": (32, 32), "num_classes": 5, "features": 12, "num_heads": 2, "layers": 4, "thresholds": (2,)}
    | {"patch_size": 8, "layer_scale": 0.5},
)
class RaptorViT(ViT):
    """Images `(B, H, W, channels)` to logits `(B, num_classes)` in float32. To interventions it is one layer.

    Args:
      image_size: (H, W) in pixels.
      num_classes: classes; without any the pooled features are the result.
      features: channels C of the tokens.
      num_heads: heads.
      layers: L.
      thresholds: last layer of each phase but the last.
      mlp_ratio: hidden channels of feed-forwards over C.
      layer_scale: γ at the start; None for none.
      time_scale: whether blocks have factors of the layer's number.
      swiglu: whether feed-forwards are gated.
      dtype: of the computation; that of the images when None.
      param_dtype: of the parameters.
      rngs: streams `params`, and `dropout` if there is any.
      **vit: further arguments of `ViT`, but for those of its blocks.

    Raises:
      ValueError: as `ViT` and `Raptor`.
    """

    def __init__(
        self,
        image_size: Sequence[int],
        num_classes: int | None,
        *,
        features: int = 768,
        num_heads: int = 12,
        layers: int = 12,
        thresholds: Sequence[int] = (7,),
        mlp_ratio: float = 4.0,
        layer_scale: float | None = 1e-5,
        time_scale: bool = True,
        swiglu: bool = False,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
        **vit: Any,
    ):
        common = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        sizes = {"features": features, "num_heads": num_heads, "depth": 1}
        super().__init__(image_size, num_classes, **sizes, **common, **vit)
        options = {"mlp_ratio": mlp_ratio, "layer_scale": layer_scale, "time_scale": time_scale, "swiglu": swiglu}
        raptor = Raptor(features, num_heads=num_heads, layers=layers, thresholds=thresholds, **options, **common)
        self.stage[0].blocks = nnx.List([Block(Surrogate(raptor), None, None, None)])


def surrogate_of(teacher: ViT, raptor: Raptor) -> ViT:
    """A copy of a vision transformer in which `raptor` stands in the place of all layers."""
    model = nnx.clone(teacher)
    model.stage[0].blocks = nnx.List([Block(Surrogate(nnx.clone(raptor)), None, None, None)])
    return model
