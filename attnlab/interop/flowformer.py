"""Flowformer: thuml/Flowformer, the core code, and that for time series and for images.

model = staged.build_named(FLOWFORMERS, "flowformer", rngs=nnx.Rngs(0))
attnlab.interop.load(model, "flowformer.pth", key="model")
"""

import jax
from flax import nnx

from attnlab.attention.linear.flowformer import FlowAttention, flow_attention
from attnlab.contract import Site
from attnlab.interop.names import Flattened, Part
from attnlab.interop.official import Official, Only, options, plain
from attnlab.models.block import Block
from attnlab.models.flowformer import IMAGES, Flowformer
from attnlab.models.staged import Place, transformer_block
from attnlab.nn.heads import FromHeads, ToHeads


class Projected(nnx.Module):
    """Flow-Attention of queries, keys and values that are three different inputs, to other channels than theirs."""

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        *,
        d_input: int | None = None,
        d_output: int | None = None,
        d_keys: int | None = None,
        d_values: int | None = None,
        causal: bool = False,
        clip: float | None = 1.0,
        eps: float = 1e-6,
        rngs: nnx.Rngs,
    ):
        self.causal, self.clip, self.eps = causal, clip, eps
        source, out = (d_model if size is None else size for size in (d_input, d_output))
        key_size, value_size = (d_model // n_heads if size is None else size for size in (d_keys, d_values))
        self.query = ToHeads(source, n_heads, key_size, rngs=rngs)
        self.key = ToHeads(source, n_heads, key_size, rngs=rngs)
        self.value = ToHeads(source, n_heads, value_size, rngs=rngs)
        self.out = FromHeads(n_heads, value_size, out, rngs=rngs)

    def __call__(self, queries: jax.Array, keys: jax.Array, values: jax.Array) -> jax.Array:
        q, k, v = jax.nn.sigmoid(self.query(queries)), jax.nn.sigmoid(self.key(keys)), self.value(values)
        return self.out(flow_attention(q, k, v, causal=self.causal, clip=self.clip, eps=self.eps))


def block(features: int, *, mlp_ratio: float = 4.0, mlp_scale: float = 1e-5, rngs: nnx.Rngs) -> Block:
    """A block of the model for images, alone, of tokens `(B, N, C)`."""
    place = Place(Site(features, 12), 0, IMAGES, 0.0)
    return transformer_block(place, mlp_ratio=mlp_ratio, mlp_scale=mlp_scale, norm_eps=1e-5, rngs=rngs)


_APART = {name: f"{name}_projection" for name in ("query", "key", "value", "out")}
_CORE = dict.fromkeys(("drop_out", "dropout"))
_IMAGES = {("query", "key", "value"): "qkv", "out": "proj"}
_BLOCK = {"scale2": "gamma", "mixer": Part("attn", _IMAGES)}
_NET = options("num_classes", embed_dim="features", depth="depths", img_size="image_size", init_values="mlp_scale")
_NET |= options("mlp_ratio", drop_rate="dropout", drop_path_rate="drop_path", patch_size=Only(4), dropcls=None)
_NAMES = {"stem.conv": "patch_embed.0.proj", "stage.*.down.conv": "patch_embed.*.proj"}
_NAMES |= {"stage.0.position.table": Flattened("pos_embed")}
_NAMES |= {"stage.*.blocks.*": lambda i, j: Part(f"blocks.{i}.{j}", _BLOCK)}
_DIMS = {"dim": "features"}

OFFICIAL = [
    Official("Flow_Attention", Projected, _CORE, _APART, when="d_input"),
    Official("Flow_Attention_Causal", Projected, _CORE, _APART, always={"causal": True}),
    Official("AttentionLayer(Flow_Attention)", Projected, _CORE, _APART, always={"clip": None}),
    Official("AttentionLayer", Projected, _CORE, _APART, always={"clip": None}),
    Official(
        "Flow_Attention", FlowAttention, _DIMS, _IMAGES, plain, {"num_heads": 12}, always={"flow_eps": 1e-6}, when="dim"
    ),
    Official("My_BlockLayerScale", block, _DIMS | {"init_values": "mlp_scale"}, _BLOCK),
    Official("Flowformer", Flowformer, _NET, _NAMES, defaults={"embed_dim": [64, 128, 256, 512]}),
]
