"""Golden adapter of `tnl`."""

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab.attention.linear.tnl import NormLinearAttention, TnlAttention, initial_theta, lrpe
from attnlab.interop.linear_attention import (
    load_norm_linear_attention,
    load_sglu,
    load_tnl_attention,
    load_transnormer,
)
from attnlab.interop.official import StateDict
from attnlab.models.block import MLPS
from attnlab.models.tnl import TransNormerLLM
from attnlab.nn.norms import rms_norm


def run(meta, param, inputs):
    return CLASSES[meta["class"]](meta["config"], meta["call"], param, inputs)


def srms_norm(config, call, param, inputs):
    return {"y": rms_norm(inputs["x"], eps=config["eps"])}


def relative_positions(config, call, param, inputs):
    positions = jnp.arange(inputs["x"].shape[1])[None] + call.get("offset", 0)
    theta = initial_theta(config["num_heads"], config["embed_dim"])
    return {"y": lrpe(inputs["x"], param["theta"][:, 0], positions), "theta_init": theta[:, None]}


def sglu(config, call, param, inputs):
    module = MLPS["sglu"](config["n_embd"], config["hidden"], use_bias=config["bias"], rngs=nnx.Rngs(0))
    with StateDict(param, into=module) as weights:
        load_sglu(module, weights)
    return {"y": module(inputs["x"])}


def norm_linear_attention(config, call, param, inputs):
    module = NormLinearAttention(
        config["n_embd"],
        num_heads=config["n_head"],
        use_bias=config["bias"],
        lrpe_layers=(call["layer_idx"],) if config["use_lrpe"] else (),
        layer=call["layer_idx"],
        num_layers=call["num_layers"],
        rngs=nnx.Rngs(0),
    )
    with StateDict(param, into=module) as weights:
        load_norm_linear_attention(module, weights)
    mask = inputs.get("attn_padding_mask")
    return {"y": module(inputs["x"], mask=None if mask is None else mask > 0)}


def tnl_attention(config, call, param, inputs):
    module = TnlAttention(
        config["embed_dim"],
        num_heads=config["num_heads"],
        use_bias=config["bias"],
        layer=config["layer_idx"],
        num_layers=config["num_layers"],
        rngs=nnx.Rngs(0),
    )
    with StateDict(param, into=module, ignore=("slope_rate",)) as weights:
        load_tnl_attention(module, weights)
    return {"y": module(inputs["x"])}


def transnormer(config, call, param, inputs):
    model = TransNormerLLM(
        config["vocab_size"],
        features=config["n_embd"],
        depth=config["n_layer"],
        num_heads=config["n_head"],
        use_bias=config["bias"],
        lrpe_layers=[layer for layer, on in enumerate(config["lrpe_layers"]) if on],
        embed_scale=1.0,
        rngs=nnx.Rngs(0),
    )
    load_transnormer(model, param)
    logits = model(inputs["idx"])
    likelihood = jnp.take_along_axis(jax.nn.log_softmax(logits), inputs["targets"][..., None], axis=-1)
    return {"logits": logits, "loss": -likelihood.mean()}


CLASSES = {
    "SimpleRMSNormTorch": srms_norm,
    "Lrpe": relative_positions,
    "SGLU": sglu,
    "NormLinearAttention": norm_linear_attention,
    "TnlAttention": tnl_attention,
    "TransNormer": transnormer,
}
