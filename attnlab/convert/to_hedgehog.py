"""Softmax attention becomes Hedgehog's linear attention (Zhang et al., 2024, arXiv:2402.04347).

Every softmax layer keeps its projections and gets feature maps of queries and keys, which are trained alone: in each
layer the cross-entropy of the linear attention's weights under those of the softmax attention, on the tokens that the
trained model hands to that layer, so that layers learn apart from each other. The maps begin as the identity. Then the
whole is fine-tuned by low-rank changes of the projections, as LoLCATs does it (Zhang et al., 2024, arXiv:2410.10254):
see `runner`. Where the softmax attention had dropout there is none any more.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab.convert.carry_over import carry_over
from attnlab.convert.runner import Converted, ConvertOptions, Given
from attnlab.experiment import ModelConfig
from attnlab.experiment import Options as MixerOptions
from attnlab.measure import watch
from attnlab.models.block import mixers_per_layer
from attnlab.objectives.attention_distillation import weights_cross_entropy
from attnlab.training import train
from attnlab.training.task import Sums

OLD, NEW = "softmax_attention", "hedgehog"
MAPS = ("query_map", "key_map")
# Of the options of softmax attention: those that Hedgehog has too, and those whose effect its maps learn or that end
# with the training.
SHARED = ("num_kv_heads", "head_dim", "rotary")
IMITATED = ("scale", "softcap", "block_size", "attention_dropout", "projection_dropout", "qkv_bias", "out_bias")


@dataclasses.dataclass(frozen=True)
class Options(ConvertOptions):
    """Make the softmax attention of a trained language model Hedgehog's linear attention.

    First the feature maps are trained to give the weights of the softmax attention, then low-rank changes of the
    projections are trained on the text. Prints the quality before, after conversion and after fine-tuning, and writes
    a run for `attnlab generate` and `attnlab train`.

    Attributes:
      distill_steps: steps of training of the feature maps.
      distill_learning_rate: at its peak.
      mixer_options: constructor options of Hedgehog's attention, such as '{"feature_dim": 32}'.
    """

    distill_steps: int = 300
    distill_learning_rate: float = 1e-2
    mixer_options: MixerOptions = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.distill_steps < 1:
            raise ValueError(f"distill_steps must be at least 1, got {self.distill_steps}")


class Maps(nnx.Module):
    """What is trained: the model whose weights are imitated, and the mixers that imitate them.

    Args:
      teacher: a language model.
      students: the mixers that take the place of some of its layers.
      layers: which layers.
    """

    def __init__(self, teacher: nnx.Module, students: list[nnx.Module], layers: tuple[int, ...]):
        self.teacher, self.students, self.layers = teacher, nnx.List(students), layers

    def __call__(self, tokens: jax.Array, **arguments: Any) -> tuple[jax.Array, jax.Array]:
        """Cross-entropy and the softmax attention's own entropy of each example, means over queries and layers.

        Args:
          tokens: `(B, N)`.
          **arguments: `segment_ids` and `positions`, where there are any.

        Returns:
          Two arrays `(B,)` float32, in nats.
        """
        _, seen = watch(self.teacher, tokens, layers=self.layers, **arguments)
        losses, entropies = [], []
        for student, x, wanted in zip(self.students, seen["normed"], seen["attention"], strict=True):
            given = {name: value for name, value in arguments.items() if name in student.accepts}
            _, found = nnx.capture(nnx.clone(student), nnx.Intermediate)(x, **given)
            losses.append(weights_cross_entropy(found["attention"][0], wanted))
            entropies.append(jax.scipy.special.entr(wanted).sum(-1).mean((1, 2)))
        return jnp.mean(jnp.stack(losses), 0), jnp.mean(jnp.stack(entropies), 0)


@dataclasses.dataclass(frozen=True)
class MapsTask:
    """Attention distillation on text. Reports `loss`, the cross-entropy, and `divergence`, what it is above its least.

    Attributes:
      sequence_length: tokens N of an example.
      positions: whether `positions` are passed.
    """

    sequence_length: int
    positions: bool = True

    arrays: ClassVar = ("inputs", "weight")
    unit: ClassVar = "tokens"
    best: ClassVar = "loss"
    best_mode: ClassVar = "min"

    def data_options(self) -> dict[str, Any]:
        return {"sequence_length": self.sequence_length}

    def units_per_example(self) -> int:
        return self.sequence_length

    def sums(self, model: Maps, batch: Mapping[str, jax.Array], *, deterministic: bool) -> Sums:
        names = ("segment_ids", "positions") if self.positions else ("segment_ids",)
        loss, entropy = model(batch["inputs"], **{name: batch[name] for name in names if name in batch})
        weight = (batch["weight"].sum(1) > 0).astype(jnp.float32)
        return {"loss": jnp.vdot(weight, loss), "entropy": jnp.vdot(weight, entropy), "weight": weight.sum()}

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        weight = sums["weight"] or 1.0
        return {"loss": sums["loss"] / weight, "divergence": (sums["loss"] - sums["entropy"]) / weight}


def convert(given: Given, options: Options, directory: Path) -> Converted:
    """Builds the linear model, and trains its feature maps.

    Raises:
      ValueError: if no layer is softmax attention, or one has what Hedgehog's attention lacks.
    """
    before = given.experiment.model
    config = new_config(before, given.model, options.mixer_options)
    model = config.build(given.dataset.info, dtype=given.model.dtype, rngs=nnx.Rngs(given.experiment.train.seed))
    layers = tuple(i for i, name in enumerate(mixers_per_layer(before.mixer, before.depth)) if name == OLD)
    model = carry_over(given.model, model, new=lambda path: _of_maps(path) and _layer(path) in layers)
    old, new = ([block.mixer for block in m.blocks.blocks] for m in (given.model, model))
    for layer in layers:
        if old[layer].core.rotary != new[layer].rotary:
            raise ValueError(f"layer {layer} rotates by {old[layer].core.rotary}, Hedgehog by {new[layer].rotary}")
    task = given.experiment.task_for(given.model)
    result = train(
        Maps(given.model, [nnx.clone(new[layer]) for layer in layers], layers),
        MapsTask(task.sequence_length, task.positions),
        given.dataset,
        given.training(options.distill_steps, options.distill_learning_rate, options.batch_size),
        directory / "distill",
        experiment={name: getattr(options, name) for name in ("run_dir", "step", "mixer_options")},
        trainable=lambda path, value: path[0] == "students" and _of_maps(path),
        progress=given.progress,
    )
    for layer, student in zip(layers, result.model.students, strict=True):
        nnx.update(model.blocks.blocks[layer].mixer, nnx.state(student, nnx.Param))
    return Converted(config, model)


def new_config(config: ModelConfig, model: nnx.Module, options: Mapping[str, Any]) -> ModelConfig:
    """The configuration with Hedgehog's attention in place of every softmax attention.

    Raises:
      ValueError: if there is none, or it has an option that Hedgehog's attention lacks.
    """
    names = mixers_per_layer(config.mixer, config.depth)
    if OLD not in names:
        raise ValueError(f"no layer is {OLD}; the mixers are {', '.join(dict.fromkeys(names))}")
    before = dict(config.mixer_options)
    of_old = dict(before.pop(OLD, {}))
    for name, value in of_old.items():
        if name not in SHARED + IMITATED:
            raise ValueError(f"{OLD} has {name}={value!r}, and Hedgehog's attention no such option")
    mixer = next(block.mixer for block, name in zip(model.blocks.blocks, names, strict=True) if name == OLD)
    shared = {name: value for name, value in of_old.items() if name in SHARED}
    shared |= {"qkv_bias": mixer.query.bias is not None, "out_bias": mixer.out.bias is not None, "zero_init": True}
    mixers = tuple(NEW if name == OLD else name for name in names)
    of_new = shared | dict(before.get(NEW, {})) | dict(options)
    return dataclasses.replace(
        config,
        mixer=mixers[0] if len(set(mixers)) == 1 else mixers,
        mixer_options=before | {NEW: of_new},
    )


def _layer(path: tuple[Any, ...]) -> Any:
    """The layer of a parameter of a model, None of what is in no layer."""
    return path[2] if path[:2] == ("blocks", "blocks") else None


def _of_maps(path: tuple[Any, ...]) -> bool:
    """Whether a parameter is one of a feature map."""
    return any(name in path for name in MAPS)
