"""Relative convolutional multi-head attention: hermansh-id/rcmha."""

from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from attnlab.attention.dense.rcmha import RelativeConvolutionalAttention
from attnlab.interop.official import Inputs, Official, Only, options
from attnlab.nn.causal_conv import CausalConv


def _attend(module: RelativeConvolutionalAttention, inputs: Inputs, given: Mapping[str, Any]) -> jax.Array:
    return module.attend(inputs["x"], inputs["mem"]) if "mem" in inputs else module(inputs["x"])


class _Convolution(nnx.Module):
    """The convolution under its official name; it takes any number of heads."""

    def __init__(self, d_k: int, kernel_size: int = 3, *, rngs: nnx.Rngs):
        self.conv = CausalConv((1, d_k), kernel_size, form="shared", use_bias=True, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.conv(x)[0]


OFFICIAL = [
    Official(
        "RelativeMultiHeadAttention",
        RelativeConvolutionalAttention,
        options(
            heads="num_heads",
            d_model="features",
            dropout_prob="attention_dropout",
            P="max_offset",
            conv_kernel="kernel_size",
            causal=Only(True),
        ),
        {
            "query": "query.0.linear",
            "key": "key.0.linear",
            "value": "value.0.linear",
            "query_conv": "query.1.conv",
            "key_conv": "key.1.conv",
            "value_conv": "value.1.conv",
            "core.key_vectors": "key_pos_embeddings",
            "core.key_bias": "key_pos_bias",
            "core.query_bias": "query_pos_bias",
            "out": "output",
        },
        _attend,
    ),
    Official("SpatialDepthWiseConvolution", _Convolution),
]
