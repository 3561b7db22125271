"""GuoTianYu2000/Active-Dormant-Attention, of the folder BBM: attention, transformer, task and risk."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab.attention.dense.relu_attention import ReluAttention
from attnlab.attention.dense.softmax_attention import SoftmaxAttention
from attnlab.interop.official import Given, Inputs, Official, Only, options
from attnlab.models.active_dormant import BackcopyTransformer
from attnlab.tasks.bigram_backcopy import START, chain, oracle_risk

_ATTENTION = {"query": "wq", "key": "wk", "value": "wv", "out": "wo"}
_CONFIG = options("causal", dim="features", n_heads="num_heads", attn_use_relu=None)
_PLAIN = {"qkv_bias": False, "out_bias": False}
_BLOCK = "blocks.blocks.*"
_NAMES = {f"{_BLOCK}.mixer.{ours}": f"layers.*.attention.{theirs}" for ours, theirs in _ATTENTION.items()}
_NAMES |= {f"{_BLOCK}.mlp.fc1": "layers.*.ff.w1", f"{_BLOCK}.mlp.fc2": "layers.*.ff.w2"}
_NAMES |= {f"{_BLOCK}.norm1": "layers.*.attention_norm", f"{_BLOCK}.norm2": "layers.*.ff_norm"}
_NAMES |= {"embedding": "tok_embeddings.weight", "position": "pos_embeddings.weight", "head": "output"}
_MODEL = options(
    "vocab_size",
    "max_length",
    n_layers="depth",
    dim="features",
    n_heads="num_heads",
    attn_use_relu="relu",
    pre_norm=Only(True),
    no_attn="no_attention",
    no_ffn="no_mlp",
    no_attn_norm="no_attention_norm",
    no_ffn_norm="no_mlp_norm",
    linear_ffn="linear_mlp",
)


def _relu(given: Given) -> bool:
    return bool(given["attn_use_relu"])


def _attend(mixer: Any, inputs: Inputs, given: Given) -> dict[str, jax.Array]:
    y, seen = nnx.capture(nnx.clone(mixer), nnx.Intermediate)(inputs["x"])
    return {"y": y, "scores": seen["attention"][0]}


def _model(model: BackcopyTransformer, inputs: Inputs, given: Given) -> dict[str, jax.Array]:
    logits = model(inputs["idx"])
    likelihood = jnp.take_along_axis(jax.nn.log_softmax(logits), inputs["targets"][..., None], axis=-1)
    return {"logits": logits, "loss": -likelihood.mean()}


def _task(task: Any, inputs: Inputs, given: Given) -> dict[str, jax.Array]:
    found = task(inputs["bigram_counts"], inputs["unigram_counts"])
    names = {"marginal": found.frequencies, "cond": found.bigrams, "triggers": found.triggers}
    return names | {"first_token_dist": found.first, "bos": jnp.asarray([START])}


def _risk(risk: Any, inputs: Inputs, given: Given) -> dict[str, jax.Array]:
    found = risk(inputs["x"], inputs["logits"])
    return {
        "oracle": found.oracle,
        "risk": found.risk,
        "icl_risk": found.copies,
        "markov_risk": found.bigrams,
        "trigger_positions": found.triggered,
    }


OFFICIAL = [
    Official("Attention", ReluAttention, _CONFIG, _ATTENTION, _attend, always=_PLAIN, when=_relu),
    Official(
        "Attention", SoftmaxAttention, _CONFIG, _ATTENTION, _attend, {"attn_use_relu": False, "causal": True}, _PLAIN
    ),
    Official("Transformer", BackcopyTransformer, _MODEL, _NAMES, _model),
    Official("bbm", chain, {"seq_length": None, "bos_num": Only(1), "delimiter_p": Only(0, 0.0)}, call=_task),
    Official("risk", oracle_risk, call=_risk),
]
