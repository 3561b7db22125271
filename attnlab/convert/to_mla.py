"""Softmax attention becomes multi-head latent attention (X-EcoMLA, 2025, arXiv:2503.11132).

The maps of every softmax layer are cut into those of latent attention by a singular value decomposition, see
`attnlab.interop.mla_upcycling`; nothing is trained before the fine-tuning. A token's cache falls from 2·G·D numbers a
layer to `kv_rank` + `rope_dim`.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flax import nnx

from attnlab.convert.carry_over import carry_over
from attnlab.convert.runner import Converted, ConvertOptions, Given
from attnlab.experiment import ModelConfig
from attnlab.interop.mla_upcycling import latent_attention
from attnlab.models.block import mixers_per_layer

OLD, NEW = "softmax_attention", "mla"
# Of the options of softmax attention: those that its latent form takes up, and those that end with the training.
IMITATED = ("num_kv_heads", "head_dim", "rotary", "scale", "qkv_bias", "out_bias", "block_size")
DROPPED = ("attention_dropout", "projection_dropout")


@dataclasses.dataclass(frozen=True)
class Options(ConvertOptions):
    """Make the softmax attention of a trained language model multi-head latent attention, whose cache is small.

    The weights are cut by a singular value decomposition, then trained further on the text. Prints the quality before,
    after conversion and after fine-tuning, and writes a run for `attnlab generate` and `attnlab train`.

    Attributes:
      kv_rank: channels of the latent of keys and values, rounded up to a multiple of 8; the head size when None.
      query_rank: channels of the latent of queries; as many as the model has, which loses nothing, when None.
      rope_dim: rotated channels of a head; half of the head size when None.
      nope_dim: other channels of a head; the head size without `rope_dim` when None.
    """

    to: str = NEW
    kv_rank: int | None = None
    query_rank: int | None = None
    rope_dim: int | None = None
    nope_dim: int | None = None


def convert(given: Given, options: Options, directory: Path) -> Converted:
    """Builds the model with latent attention.

    Raises:
      ValueError: if no layer is softmax attention, or one has what latent attention lacks.
    """
    before = given.experiment.model
    names = mixers_per_layer(before.mixer, before.depth)
    layers = tuple(i for i, name in enumerate(names) if name == OLD)
    if not layers:
        raise ValueError(f"no layer is {OLD}; the mixers are {', '.join(dict.fromkeys(names))}")
    sizes = {name: getattr(options, name) for name in ("query_rank", "rope_dim", "nope_dim")}
    old = {layer: given.model.blocks.blocks[layer].mixer for layer in layers}
    mixers = {
        layer: latent_attention(mixer, kv_rank=options.kv_rank or mixer.sizes.key_size, **sizes)
        for layer, mixer in old.items()
    }
    config = new_config(before, mixers[layers[0]])
    model = config.build(given.dataset.info, dtype=given.model.dtype, rngs=nnx.Rngs(given.experiment.train.seed))

    def converted(path: tuple[Any, ...]) -> bool:
        return "mixer" in path and path[2] in layers

    model = carry_over(given.model, model, new=converted, gone=converted)
    for layer, mixer in mixers.items():
        there = model.blocks.blocks[layer].mixer
        if there.core.rotary != mixer.core.rotary:
            raise ValueError(f"layer {layer} rotates by {mixer.core.rotary}, the new one by {there.core.rotary}")
        nnx.update(there, nnx.state(mixer, nnx.Param))
    return Converted(config, model)


def new_config(config: ModelConfig, mixer: Any) -> ModelConfig:
    """The configuration with latent attention as `mixer` has it in place of every softmax attention.

    Raises:
      ValueError: if softmax attention has an option that latent attention lacks.
    """
    before: Mapping[str, Any] = dict(config.mixer_options)
    for name, value in before.get(OLD, {}).items():
        if name not in IMITATED + DROPPED:
            raise ValueError(f"{OLD} has {name}={value!r}, and latent attention no such option")
    core = mixer.core
    chosen = {
        "rank": core.rank,
        "query_rank": mixer.query.in_features,
        "rope_dim": core.rope_dim,
        "nope_dim": core.key.head_dim,
        "value_dim": core.value.head_dim,
        "latent_norm": False,
        "interleaved": False,
        "scale": core.scale,
        "use_bias": mixer.out.bias is not None,
    }
    chosen |= {name: value for name, value in before.get(OLD, {}).items() if name == "block_size"}
    names = mixers_per_layer(config.mixer, config.depth)
    mixers = tuple(NEW if name == OLD else name for name in names)
    others = {name: value for name, value in before.items() if name != OLD}
    return dataclasses.replace(
        config,
        mixer=mixers[0] if len(set(mixers)) == 1 else mixers,
        mixer_options=others | {NEW: chosen},
    )
