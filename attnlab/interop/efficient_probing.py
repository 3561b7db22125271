"""Weights of billpsomas/efficient-probing (arXiv:2506.10178): efficient probing and the other poolings of its registry.

    load_pooling(EfficientProbing(768, num_queries=32, rngs=nnx.Rngs(0)), state_dict)

The names below `pooling`, the first entry of a probe's `Sequential(pooling, BatchNorm1d, Linear)`, are those expected.
"""

from collections.abc import Callable, Mapping

from flax import nnx
from jax.typing import ArrayLike

from attnlab.contract import Pooling
from attnlab.interop import official
from attnlab.interop.official import StateDict
from attnlab.nn.mlp import MLP
from attnlab.pooling.abmilp import ABMILPPooling
from attnlab.pooling.aim import AIMPooling
from attnlab.pooling.block import SelfAttentionBlock
from attnlab.pooling.cae import CAEPooling
from attnlab.pooling.cait import CaiTPooling
from attnlab.pooling.cbam import CBAMPooling
from attnlab.pooling.clip import CLIPPooling
from attnlab.pooling.coca import CoCaPooling
from attnlab.pooling.dinovit import DinoViTPooling
from attnlab.pooling.dolg import DOLGPooling
from attnlab.pooling.efficient_probing import EfficientProbing
from attnlab.pooling.jepa import JEPAPooling
from attnlab.pooling.parts import CrossAttention
from attnlab.pooling.siglip import SigLIPPooling
from attnlab.pooling.simpool import ESimPool, SimPool

_UNUSED = ("norm2_cross.*", "norm.beta", "context_norm.beta", "pos_embed")
"""Parameters without effect, biases fixed at zero, and a table that follows from the grid."""


def load_pooling(module: Pooling, arrays: Mapping[str, ArrayLike]) -> None:
    """Loads an official pooling's state dict.

    Args:
      module: the counterpart of the official class, of the same configuration.
      arrays: the official state dict.

    Raises:
      StateDictError: if the two do not fit.
      TypeError: if the pooling is none of that repository.
    """
    if type(module) not in _LOADERS:
        names = ", ".join(cls.__name__ for cls in _LOADERS)
        raise TypeError(f"no weights are known for a {type(module).__name__}; there are some for {names}")
    # The positions of CLIP's pooling are learned: of that name, but loaded.
    with StateDict(arrays, into=module, ignore=_UNUSED) as weights:
        _LOADERS[type(module)](module, weights)


def _qkv(module: CrossAttention, weights: StateDict, name: str = "") -> None:
    official.linears((module.q, module.k, module.v), weights, f"{name}qkv")
    official.linear(module.out, weights, f"{name}proj")


def _q_kv(module: CrossAttention, weights: StateDict, name: str = "") -> None:
    official.linear(module.q, weights, f"{name}q")
    official.linears((module.k, module.v), weights, f"{name}kv")
    official.linear(module.out, weights, f"{name}proj")


def _mlp(module: MLP, weights: StateDict) -> None:
    official.linear(module.fc1, weights, "mlp.fc1")
    official.linear(module.fc2, weights, "mlp.fc2")


def _block(module: SelfAttentionBlock, weights: StateDict) -> None:
    official.norm(module.norm1, weights, "norm1")
    _qkv(module.attention, weights, "attn.")
    official.norm(module.norm2, weights, "norm2")
    _mlp(module.mlp, weights)


def _first(variable: nnx.Variable, weights: StateDict, name: str) -> None:
    """A parameter with a leading batch axis there."""
    official.param(variable, weights, name, lambda a: a[0])


def _efficient_probing(module: EfficientProbing, weights: StateDict) -> None:
    _first(module.queries, weights, "cls_token")
    official.linear(module.value, weights, "v")


def _aim(module: AIMPooling, weights: StateDict) -> None:
    _first(module.queries, weights, "cls_token")
    official.batch_norm(module.norm, weights, "bn")
    official.linear(module.k, weights, "k")
    official.linear(module.v, weights, "v")


def _esimpool(module: ESimPool, weights: StateDict) -> None:
    official.norm(module.norm, weights, "norm_patches")
    if module.beta is not None:
        official.param(module.beta, weights, "beta")


def _simpool(module: SimPool, weights: StateDict) -> None:
    _esimpool(module, weights)
    official.linear(module.q, weights, "wq")
    official.linear(module.k, weights, "wk")


def _siglip(module: SigLIPPooling, weights: StateDict) -> None:
    _first(module.latents, weights, "latent")
    _q_kv(module.attention, weights)
    if module.attention.q_norm is not None:
        official.norm(module.attention.q_norm, weights, "q_norm")
        official.norm(module.attention.k_norm, weights, "k_norm")
    if module.norm is not None:
        official.norm(module.norm, weights, "norm")
    _mlp(module.mlp, weights)


def _clip(module: CLIPPooling, weights: StateDict) -> None:
    official.param(module.positions, weights, "pos_embed")
    official.norm(module.norm, weights, "norm")
    _qkv(module.attention, weights)


def _cait(module: CaiTPooling, weights: StateDict) -> None:
    official.param(module.cls, weights, "cls_token", lambda a: a[0, 0])
    official.norm(module.norm, weights, "norm")
    for i, block in enumerate(module.blocks):
        there = weights.sub(f"blocks_token_only.{i}")
        official.norm(block.norm1, there, "norm1")
        for name in ("q", "k", "v"):
            official.linear(getattr(block.attention, name), there, f"attn.{name}")
        official.linear(block.attention.out, there, "attn.proj")
        official.param(block.scale1.scale, there, "gamma_1")
        official.norm(block.norm2, there, "norm2")
        _mlp(block.mlp, there)
        official.param(block.scale2.scale, there, "gamma_2")


def _jepa(module: JEPAPooling, weights: StateDict) -> None:
    _first(module.queries, weights, "query_tokens")
    there = weights.sub("cross_attention_block")
    if module.mlp is None:
        _q_kv(module.attention, there)
    else:
        official.norm(module.norm1, there, "norm1")
        _q_kv(module.attention, there, "xattn.")
        official.norm(module.norm2, there, "norm2")
        _mlp(module.mlp, there)
    for i, block in enumerate(module.blocks):
        _block(block, weights.sub(f"blocks.{i}"))


def _cae(module: CAEPooling, weights: StateDict) -> None:
    official.param(module.query, weights, "query_token", lambda a: a[0, 0])
    for name in ("q", "k", "v"):
        official.norm(getattr(module, f"norm_{name}"), weights, f"norm1_{name}")
        linear = getattr(module.attention, name)
        official.linear(linear, weights, "cross_attn", weight=f"{name}.weight", bias=f"{name}_bias")
    official.linear(module.attention.out, weights, "cross_attn.proj")


def _coca(module: CoCaPooling, weights: StateDict) -> None:
    official.param(module.queries, weights, "img_queries")
    official.param(module.norm.scale, weights, "norm.gamma")
    if module.context_norm is not None:
        official.param(module.context_norm.scale, weights, "context_norm.gamma")
    official.linear(module.q, weights, "to_q")
    official.linear(module.kv, weights, "to_kv")
    official.linear(module.out, weights, "to_out")
    if module.mlp_in is not None:
        official.linear(module.mlp_in, weights, "ff.0")
        official.linear(module.mlp_out, weights, "ff.2")


def _abmilp(module: ABMILPPooling, weights: StateDict) -> None:
    if module.attention is not None:
        _qkv(module.attention, weights, "self_attn.")
    for i, layer in enumerate(module.layers):
        official.linear(layer, weights, f"attention_predictor.{2 * i}")


def _dolg(module: DOLGPooling, weights: StateDict) -> None:
    if module.context is not None:
        official.linear(module.context.mean, weights, "aspp.im_pool.1")
        official.linear(module.context.point, weights, "aspp.aspp.0")
        for i, conv in enumerate(module.context.dilated, 1):
            official.conv(conv, weights, f"aspp.aspp.{i}")
        official.linear(module.context.mix, weights, "aspp.conv_after.0")
    official.linear(module.map, weights, "conv1")
    official.batch_norm(module.norm, weights, "bn")
    official.linear(module.gate, weights, "conv2")


def _cbam(module: CBAMPooling, weights: StateDict) -> None:
    official.linear(module.channel_in, weights, "channel.fc1")
    official.linear(module.channel_out, weights, "channel.fc2")
    official.conv(module.location, weights, "spatial.conv.conv")
    official.batch_norm(module.norm, weights, "spatial.conv.bn")


def _dinovit(module: DinoViTPooling, weights: StateDict) -> None:
    _block(module.block, weights.sub("dino_block"))


_LOADERS: dict[type[Pooling], Callable[[Pooling, StateDict], None]] = {
    EfficientProbing: _efficient_probing,
    AIMPooling: _aim,
    SimPool: _simpool,
    ESimPool: _esimpool,
    SigLIPPooling: _siglip,
    CLIPPooling: _clip,
    CaiTPooling: _cait,
    JEPAPooling: _jepa,
    CAEPooling: _cae,
    CoCaPooling: _coca,
    ABMILPPooling: _abmilp,
    DOLGPooling: _dolg,
    CBAMPooling: _cbam,
    DinoViTPooling: _dinovit,
}
