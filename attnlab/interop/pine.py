"""wzq016/PINE: LLaMA's attention with position-invariant inference, prefill and then steps."""

from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx

from attnlab.attention.dense.softmax_attention import SoftmaxAttention
from attnlab.interop.official import Given, Inputs, Official, decode, options
from attnlab.interventions.pine import PositionInvariantCore, document_labels


def _attention(
    features: int, *, prefix: int, documents: Sequence[int], rotary: float = 10000.0, rngs: nnx.Rngs, **sizes: Any
) -> SoftmaxAttention:
    mixer = SoftmaxAttention(features, causal=True, rotary=rotary, **sizes, rngs=rngs)
    labels = document_labels(prefix, documents)
    mixer.set_core(PositionInvariantCore.of(mixer.core, labels, num_documents=len(documents)))
    return mixer


def _decoded(mixer: Any, inputs: Inputs, given: Given) -> jax.Array:
    return decode(mixer, inputs["x"], given["prefix_len"] + sum(given["doc_lens"]) + given["suffix_len"])[0]


OFFICIAL = [
    Official(
        "LlamaAttentionWithPS",
        _attention,
        options(
            hidden_size="features",
            num_attention_heads="num_heads",
            num_key_value_heads="num_kv_heads",
            head_dim="head_dim",
            rope_theta="rotary",
            attention_bias=lambda given: {"qkv_bias": given["attention_bias"], "out_bias": given["attention_bias"]},
            prefix_len="prefix",
            doc_lens="documents",
            suffix_len=None,
            decode_steps=None,
            # They follow from the lengths.
            all_position_ids=None,
        ),
        {ours: f"{ours[0]}_proj" for ours in ("query", "key", "value", "out")},
        call=_decoded,
        defaults={"attention_bias": False},
    )
]
