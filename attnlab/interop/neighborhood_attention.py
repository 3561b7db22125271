"""Weights of NATTEN's modules `NeighborhoodAttention1D`, `2D` and `3D`, of any version."""

from attnlab.attention.local.neighborhood_attention import NeighborhoodAttention
from attnlab.interop import official
from attnlab.interop.official import StateDict


def load_neighborhood_attention(module: NeighborhoodAttention, weights: StateDict) -> None:
    """Loads `qkv`, `proj` and, where the module has a relative position bias, `rpb`."""
    official.linear(module.query_key_value, weights, "qkv")
    official.linear(module.projection, weights, "proj")
    if module.bias is not None:
        official.param(module.bias, weights, "rpb")
