"""Hedgehog's feature maps of HazyResearch/lolcats and of fla-org/flash-linear-attention, and LoLCATs' loss."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab.attention.linear.hedgehog import HedgehogFeatureMap
from attnlab.interop.names import Mapped, Squeezed
from attnlab.interop.official import Given, Inputs, Official, options
from attnlab.nn.linear_mixer import linear_attention_map
from attnlab.objectives.attention_distillation import attention_distillation
from pallas_kernels.linear_attention import linear_attention


class _Maps(nnx.Module):
    """The maps of queries and keys: two, or one `tied` for both."""

    def __init__(self, *, tied: bool = False, rngs: nnx.Rngs, **options: Any):
        self.feature_map_q = HedgehogFeatureMap(**options, rngs=rngs)
        self.feature_map_k = nnx.data(None) if tied else HedgehogFeatureMap(**options, rngs=rngs)

    def __call__(self, q: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
        return self.feature_map_q(q), (self.feature_map_q if self.feature_map_k is None else self.feature_map_k)(k)


def _lolcats(maps: _Maps, inputs: Inputs, given: Given) -> dict[str, jax.Array]:
    q, k = maps(inputs["q"], inputs["k"])
    choice = {"causal": given["causal"], "normalize": True}
    y = linear_attention(q, k, inputs["v"], **choice)
    return {"y": y, "attn": linear_attention_map(q, k, **choice), "phi_q": q, "phi_k": k}


def _fla(maps: _Maps, inputs: Inputs, given: Given) -> dict[str, jax.Array]:
    q, k = maps(inputs["q"], inputs["k"])
    scale = maps.feature_map_q.out_features**-0.5
    return {"y": linear_attention(q, k, inputs["v"], scale=scale, normalize=given["normalize"]), "phi_q": q}


def _distillation(loss: Any, inputs: Inputs, given: Given) -> dict[str, jax.Array]:
    layers = range(given["layers"])
    parts = ([inputs[f"{kind}{layer}"] for layer in layers] for kind in ("attn_pred", "attn_true", "y_pred", "y_true"))
    return {"loss": loss(*parts).mean()[None]}


_LOLCATS = "FeatureMap(FeatureMapMLP)+quadratic_attention"
_CONFIG = options("num_heads", "head_dim", "feature_dim", "skip_connection", "eps", "zero_init", causal=None)
_CONFIG |= options(feature_map="activation", fullspace="full_space", bias="use_bias", tie_qk_kernels=None)
_NAMES = {"feature_map_*.kernel": "feature_map_*.mlp.layer"}
_NAMES |= {"feature_map_*.bias": Squeezed("feature_map_*.mlp.bias", 0, 2)}
_FLA = {"feature_map_*.kernel": Mapped("feature_map_*.layer.weight", jnp.transpose, jnp.transpose)}
_FLA |= {"feature_map_*.bias": "feature_map_*.layer.bias"}
_FLA_MAP = {"num_heads": 1, "shared": True, "activation": "softmax_joint", "use_bias": True}
_TIED = {False: lambda given: not given.get("tie_qk_kernels"), True: lambda given: given.get("tie_qk_kernels", True)}

OFFICIAL = [
    *(
        Official(_LOLCATS, _Maps, _CONFIG, _NAMES, _lolcats, {}, {"tied": tied}, when=when)
        for tied, when in _TIED.items()
    ),
    Official("HedgehogFeatureMap+naive_chunk_linear_attn", _Maps, {"normalize": None}, _FLA, _fla, always=_FLA_MAP),
    Official("OurTrainer.compute_loss", attention_distillation, {"layers": None}, call=_distillation),
]
