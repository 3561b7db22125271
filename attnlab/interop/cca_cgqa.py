"""Compressed convolutional attention: the Zaya layer of transformers."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from attnlab.attention.dense.cca_cgqa import CompressedConvolutionalAttention
from attnlab.contract import Given as Arguments
from attnlab.interop.official import Given, Inputs, Official, Only, decode, options
from attnlab.nn.rotary import Rotary
from pallas_kernels.masks import SlidingWindow


def _rotary(given: Given) -> dict[str, Any]:
    turning = int(given["head_dim"] * given["partial_rotary_factor"])
    return {"rotary": Rotary(given["rope_theta"], channels=turning)}


def _window(given: Given) -> dict[str, Any]:
    window = given["sliding_window"]
    return {"structural_mask": None if window is None else SlidingWindow(window - 1, 0)}


def _sizes(given: Given) -> dict[str, Any]:
    return {"kernel_sizes": (given["cca_time0"], given["cca_time1"])}


def _attend(module: CompressedConvolutionalAttention, inputs: Inputs, given: Mapping[str, Any]) -> dict[str, jax.Array]:
    x, mask = inputs["x"], None
    if "conv_mask" in inputs:
        # Padding stays there, as zeros that see themselves alone.
        real = jnp.asarray(inputs["conv_mask"], bool)
        x = x * real[..., None]
        mask = (real[:, None, None, :] | jnp.eye(x.shape[1], dtype=bool)).astype(bool)
    q, k, v, _ = module.latents(x, Arguments())
    outputs = {"y": module(x, mask=mask), "q_latent": q, "k_latent": k, "v_latent": v}
    if mask is not None:
        return outputs
    y, state = decode(module, x, x.shape[1] // 2)
    last = jnp.concatenate([state.carry.q, state.carry.k], axis=2)
    return outputs | {
        "y_decode": y,
        "conv_state": jnp.swapaxes(last.reshape(*last.shape[:2], -1), 1, 2),
        "v_state": jnp.split(state.carry.v.reshape(x.shape[0], -1), 2, axis=1)[1],
    }


OFFICIAL = [
    Official(
        "ZayaAttention",
        CompressedConvolutionalAttention,
        options(
            "head_dim",
            hidden_size="features",
            num_attention_heads="num_heads",
            num_key_value_heads="num_kv_heads",
            cca_time0=_sizes,
            cca_time1=None,
            attention_bias="use_bias",
            rope_theta=_rotary,
            partial_rotary_factor=None,
            sliding_window=_window,
            clamp_temp="clamp_temperature",
            causal=Only(True),
            positions=Only("0..N-1"),
            attention_dropout=None,
        ),
        {
            "query": "qkv_proj.q_proj",
            "key": "qkv_proj.k_proj",
            "value": ("qkv_proj.v_proj_current", "qkv_proj.v_proj_delayed"),
            ("query_conv", "key_conv"): "qkv_proj.conv_qk_depthwise",
            ("query_head_conv", "key_head_conv"): "qkv_proj.conv_qk_grouped",
            "temperature": "qk_norm.temp",
            "out": "o_proj",
        },
        _attend,
        defaults={"rope_theta": 5e6, "partial_rotary_factor": 0.5, "head_dim": 128, "cca_time0": 2, "cca_time1": 2},
    )
]
