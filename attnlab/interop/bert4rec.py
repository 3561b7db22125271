"""BERT4Rec: BertForMaskedLM of `transformers`, the same network as FeiSun/BERT4Rec."""

from collections.abc import Mapping
from typing import Any

import jax

from attnlab.interop.official import ConfigError, Given, Inputs, Official, Only, options
from attnlab.models.bert4rec import BERT4Rec
from attnlab.objectives.cloze import batch_cloze_loss


def _call(model: BERT4Rec, inputs: Inputs, given: Given) -> dict[str, jax.Array]:
    mask = inputs["input_mask"] > 0 if "input_mask" in inputs else None
    x = model.tokens(inputs["input_ids"], mask=mask)
    out = {"sequence": x, "logits": model.logits(x, inputs.get("masked_positions"))}
    if "masked_ids" in inputs:  # the mean, as `transformers` has it
        loss = batch_cloze_loss(out["logits"], inputs["masked_ids"], weight=inputs.get("weights"), eps=0.0)
        out["loss_mean"] = loss
    return out


def _dropout(given: Given) -> Mapping[str, Any]:
    rates = {given[name] for name in ("hidden_dropout_prob", "attention_probs_dropout_prob") if name in given}
    if len(rates) > 1:
        raise ConfigError(f"dropout is one rate here, of hidden channels and of weights, got {sorted(rates)}")
    return {"dropout": rates.pop()}


_PARTS = {
    "mixer.query": "attention.self.query",
    "mixer.key": "attention.self.key",
    "mixer.value": "attention.self.value",
    "mixer.out": "attention.output.dense",
    "norm1": "attention.output.LayerNorm",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
    "norm2": "output.LayerNorm",
}

OFFICIAL = [
    Official(
        "BertForMaskedLM",
        BERT4Rec,
        options(
            "vocab_size",
            hidden_size="features",
            num_hidden_layers="depth",
            num_attention_heads="num_heads",
            intermediate_size="hidden_features",
            max_position_embeddings="max_length",
            type_vocab_size="num_types",
            layer_norm_eps="eps",
            hidden_act=Only("gelu"),
            token_type_ids=Only("zeros", None),
            hidden_dropout_prob=_dropout,
            attention_probs_dropout_prob=_dropout,
            position_embedding_type=Only("absolute"),
            tie_word_embeddings=Only(True),
            is_decoder="causal",
            add_cross_attention=Only(False),
            pad_token_id="pad_id",
            initializer_range=None,
            use_cache=None,
        ),
        {
            "items": "bert.embeddings.word_embeddings.weight",
            "places": "bert.embeddings.position_embeddings.weight",
            "types": "bert.embeddings.token_type_embeddings.weight",
            "embedding_norm": "bert.embeddings.LayerNorm",
            **{f"blocks.blocks.*.{ours}": f"bert.encoder.layer.*.{theirs}" for ours, theirs in _PARTS.items()},
            "transform": "cls.predictions.transform.dense",
            "transform_norm": "cls.predictions.transform.LayerNorm",
            "bias": "cls.predictions.bias",
        },
        _call,
        defaults={"max_position_embeddings": 512},
        # The map to logits, which is the table of items, and what is not used.
        ignore=("cls.predictions.decoder.*", "position_ids", "bert.pooler.*"),
    ),
]
