"""Landmark attention: epfml/landmark-attention, the models of its language modelling benchmark."""

from typing import Any

import jax
import jax.numpy as jnp

from attnlab.attention.sparse.landmark_attention import LandmarkAttention, Landmarks
from attnlab.contract import View
from attnlab.interop.official import Given, Inputs, Official, Only, options
from attnlab.models.landmark_gpt import LandmarkGPT
from attnlab.nn.landmarks import landmark_grouped_softmax

SOFTMAXES = {"mem_opt": "grouped", "nomem": "plain", "ignore_mem": "tokens"}


def _softmax(given: Given) -> dict[str, Any]:
    return {"softmax": SOFTMAXES[given["softmax_func"]]}


def _attend(mixer: LandmarkAttention, inputs: Inputs, given: Given) -> jax.Array:
    x, start = inputs["x"], given["start_index"]
    positions = jnp.broadcast_to(jnp.arange(x.shape[1])[None] + start, x.shape[:2])
    view = View(rule=Landmarks(), q_labels=inputs["is_mem"].astype(jnp.int32))
    return mixer(x, mask=view, positions=positions)


def _probs(softmax: Any, inputs: Inputs, given: Given) -> dict[str, jax.Array]:
    return {"probs": softmax(inputs["scores"], inputs["is_mem"])}


def _model(model: LandmarkGPT, inputs: Inputs, given: Given) -> dict[str, jax.Array]:
    """Logits, and the loss if there are targets; with a cache read in runs of `mid_length` tokens."""
    ids = inputs["idx"].astype(jnp.int32)
    if given["use_cache"]:
        length, memory, found = given["mid_length"] or ids.shape[1], model.init_memory(ids.shape[0]), []
        extend = jax.jit(lambda run, memory: model.extend(run, memory))
        for first in range(0, ids.shape[1], length):
            logits, memory = extend(ids[:, first : first + length], memory)
            found.append(logits)
        logits = jnp.concatenate(found, 1)
    else:
        logits = model(ids)
    if "targets" not in inputs:
        return {"logits": logits}
    targets = inputs["targets"].astype(jnp.int32)
    there = targets != -1
    likelihood = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.where(there, targets, 0)[..., None], axis=-1)
    loss = -jnp.where(there, likelihood[..., 0], 0).sum() / there.sum()
    return {"logits": logits, "loss": loss}


_SHARED = options(
    n_embd="features",
    n_head="num_heads",
    softmax_func=_softmax,
    positional_encoder=Only("rotary"),
    pos_jump_on_mem=Only(None, 0),
    group_dropout=Only(None),
    # Bounds over there: of the sequence, and of groups, of which there are as many as it takes here.
    sequence_length=None,
    max_groups_for_softmax=None,
)
_FREQS = "rotary.freqs"

OFFICIAL = [
    Official("landmark_grouped_softmax", landmark_grouped_softmax, options(max_mem_cnt=None), call=_probs),
    Official(
        "CausalSelfAttention",
        LandmarkAttention,
        _SHARED | options(start_index=None, bias=lambda given: {"qkv_bias": given["bias"], "out_bias": given["bias"]}),
        {("query", "key", "value"): "c_attn", "out": "c_proj"},
        _attend,
        defaults={"bias": False, "start_index": 0},
        always={"rotary": 10000.0},
        ignore=("bias", _FREQS),
    ),
    Official(
        "GPTBase",
        LandmarkGPT,
        _SHARED
        | options(
            "vocab_size",
            "landmark_id",
            "bias",
            n_layer="depth",
            mem_freq=None,  # of the data
            mem_cache_size="memory_blocks",
            mem_cache_freq="frequency",
            cache_topk="topk",
            cache_selection_method="selection",
            lm_cache=None,
            use_cache=None,
            mid_length=None,
            batch_size=None,
        ),
        {
            "embedding": "transformer.wte.weight",
            "blocks.blocks.*.norm1": "transformer.h.*.ln_1",
            ("blocks.blocks.*.mixer.query", "blocks.blocks.*.mixer.key", "blocks.blocks.*.mixer.value"): (
                "transformer.h.*.attn.c_attn"
            ),
            "blocks.blocks.*.mixer.out": "transformer.h.*.attn.c_proj",
            "blocks.blocks.*.norm2": "transformer.h.*.ln_2",
            "blocks.blocks.*.mlp.fc1": "transformer.h.*.mlp.c_fc",
            "blocks.blocks.*.mlp.fc2": "transformer.h.*.mlp.c_proj",
            "norm": "transformer.ln_f",
        },
        _model,
        defaults={"use_cache": False, "mid_length": None, "landmark_id": 50260},
        ignore=("attn.bias", "wpe.freqs", "lm_head.weight"),
    ),
]
