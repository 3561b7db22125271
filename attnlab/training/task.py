"""What a model is trained for: the loss of a batch, and the numbers to report.

A task gives sums over examples, never means, because sums over micro-batches, batches and devices simply add; `metrics`
turns the sums of any number of batches into what is reported. Whatever has `weight` 0 in the batch counts nowhere.
"""

import dataclasses
import inspect
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Protocol

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from attnlab.objectives.fast_adversarial import fast_adversarial, random_quarter_turns, random_start
from attnlab.objectives.focal_region import focal_region_loss

Sums = dict[str, jax.Array]


class Task(Protocol):
    """What the training loop asks of a task.

    Attributes:
      arrays: names of the arrays that a batch must hold.
      unit: what a rate counts, "examples" or "tokens".
      best: name of the evaluation metric by which the best checkpoint is chosen.
      best_mode: whether the best is the largest or the smallest.
    """

    arrays: ClassVar[tuple[str, ...]]
    unit: ClassVar[str]
    best: ClassVar[str]
    best_mode: ClassVar[Literal["max", "min"]]

    def data_options(self) -> dict[str, Any]:
        """Keyword arguments for the `train` and `eval` of the data."""

    def units_per_example(self) -> int:
        """How many units one example has."""

    def sums(self, model: nnx.Module, batch: Mapping[str, jax.Array], *, deterministic: bool) -> Sums:
        """Float32 scalars: at least "loss", the sum that is minimised, and "weight", what to divide it by."""

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """What to report, "loss" among it, from sums over one batch or many."""


def _of_known(label: jax.Array, weight: jax.Array, loss: jax.Array, classes: int) -> jax.Array:
    """The loss, finite where nothing counts, and NaN for a label that is none of the classes."""
    loss = jnp.where((label >= 0) & (label < classes), loss, jnp.nan)
    return jnp.where(weight == 0, 0, loss)


@dataclasses.dataclass(frozen=True)
class ClassificationTask:
    """Classes of images: `model(image, deterministic=)` gives logits `(B, classes)`.

    Reports `loss` (softmax cross-entropy in nats; in evaluation without smoothing) and `accuracy`, a fraction.

    Attributes:
      label_smoothing: share of the target that is spread evenly over all classes (Szegedy et al., 2016,
        arXiv:1512.00567).
    """

    label_smoothing: float = 0.0

    arrays: ClassVar = ("image", "label", "weight")
    unit: ClassVar = "examples"
    best: ClassVar = "accuracy"
    best_mode: ClassVar = "max"

    def __post_init__(self):
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must lie in 0..1, 1 excluded, not {self.label_smoothing}")

    def data_options(self) -> dict[str, Any]:
        return {}

    def units_per_example(self) -> int:
        return 1

    def sums(self, model: nnx.Module, batch: Mapping[str, jax.Array], *, deterministic: bool) -> Sums:
        logits = model(batch["image"], deterministic=deterministic).astype(jnp.float32)
        label, weight = batch["label"], batch["weight"].astype(jnp.float32)
        target = jax.nn.one_hot(label, logits.shape[-1])
        if not deterministic:
            target = optax.smooth_labels(target, self.label_smoothing)
        loss = _of_known(label, weight, optax.softmax_cross_entropy(logits, target), logits.shape[-1])
        return {
            "loss": jnp.vdot(weight, loss),
            "correct": jnp.vdot(weight, (logits.argmax(-1) == label).astype(jnp.float32)),
            "weight": weight.sum(),
        }

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        weight = sums["weight"] or 1.0
        return {"loss": sums["loss"] / weight, "accuracy": sums["correct"] / weight}


@dataclasses.dataclass(frozen=True)
class AdversarialTask(ClassificationTask):
    """Classes of images in [0, 1], turned by quarters and perturbed against the model: `objectives.fast_adversarial`.

    Reports `loss` and `accuracy` of what is trained on; in evaluation of the images as they are, and `robust_accuracy`
    under a perturbation that starts from zero.

    Attributes:
      epsilon: greatest change of a channel, in [0, 1].
      step: of the perturbation, along the signs of the gradient.
      turns: whether training images, which must be square then, are turned by 90° and by 180°, each with probability
        1/2.
    """

    epsilon: float = 2 / 255
    step: float = 2.5 / 255
    turns: bool = True

    def __post_init__(self):
        super().__post_init__()
        for name in ("epsilon", "step"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in 0..1, 0 excluded, not {getattr(self, name)}")

    def sums(self, model: nnx.Module, batch: Mapping[str, jax.Array], *, deterministic: bool) -> Sums:
        images = jnp.asarray(batch["image"])
        start = jnp.zeros_like(images)
        if not deterministic:
            turn, noise = jax.random.split(_key_of(images))
            images = random_quarter_turns(turn, images) if self.turns else images
            start = random_start(noise, images.shape, epsilon=self.epsilon)
        # Copies, so that counters and statistics are those of one pass; constants, since nothing flows through them.
        graph, state = nnx.split(model)
        state = jax.lax.stop_gradient(state)

        def sums(images: jax.Array) -> Sums:
            copy = nnx.merge(graph, state, copy=True)
            return ClassificationTask.sums(self, copy, {**batch, "image": images}, deterministic=deterministic)

        bounds = {"epsilon": self.epsilon, "step": self.step}
        perturbed = fast_adversarial(lambda images: sums(images)["loss"], images, start, **bounds)
        if deterministic:
            return super().sums(model, batch, deterministic=True) | {"robust": sums(perturbed)["correct"]}
        return super().sums(model, {**batch, "image": perturbed}, deterministic=False)

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        robust = {"robust_accuracy": sums["robust"] / (sums["weight"] or 1.0)} if "robust" in sums else {}
        return super().metrics(sums) | robust


def _key_of(images: jax.Array) -> jax.Array:
    """A key that follows from a batch, so that a run that goes on after a stop makes the same numbers."""
    bits = jax.lax.bitcast_convert_type(images.astype(jnp.float32), jnp.uint32)
    return jax.random.key(bits.sum(dtype=jnp.uint32))


@dataclasses.dataclass(frozen=True)
class RegressionTask:
    """Numbers: `model(inputs, deterministic=)` gives predictions `(B, R)` from vectors `(B, N, F)`.

    Reports `loss`, the squared error, summed over the R numbers.
    """

    arrays: ClassVar = ("inputs", "targets", "weight")
    unit: ClassVar = "examples"
    best: ClassVar = "loss"
    best_mode: ClassVar = "min"

    def data_options(self) -> dict[str, Any]:
        return {}

    def units_per_example(self) -> int:
        return 1

    def sums(self, model: nnx.Module, batch: Mapping[str, jax.Array], *, deterministic: bool) -> Sums:
        found = model(batch["inputs"], deterministic=deterministic).astype(jnp.float32)
        weight = batch["weight"].astype(jnp.float32)
        error = jnp.square(found - batch["targets"]).sum(-1)
        return {"loss": jnp.vdot(weight, error), "weight": weight.sum()}

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        return {"loss": sums["loss"] / (sums["weight"] or 1.0)}


@dataclasses.dataclass(frozen=True)
class RestorationTask:
    """Images from degraded ones: `model(image, deterministic=)` gives `(B, H, W, C)`, values from 0 to 1.

    A model whose call takes `labels` is given those of the batch, where it holds any. Reports `loss` (the error that is
    minimised, averaged over the entries of an image) and `psnr`, 10 log10(1 / mean squared error) in dB, at most 100,
    averaged over images.

    Attributes:
      loss: "l1" for the absolute error, "l2" for the squared one.
      focal: β of `attnlab.objectives.focal_region`, which stresses the regions of large error; 0 for none, else with
        "l1" and with labels in the batch.
      border: pixels on each side that do not count in the PSNR.

    Raises:
      ValueError: for another loss, a negative number, or `focal` with "l2".
    """

    loss: Literal["l1", "l2"] = "l1"
    focal: float = 0.0
    border: int = 0

    arrays: ClassVar = ("image", "target", "weight")
    unit: ClassVar = "examples"
    best: ClassVar = "psnr"
    best_mode: ClassVar = "max"

    def __post_init__(self):
        if self.loss not in ("l1", "l2"):
            raise ValueError(f"loss must be 'l1' or 'l2', not {self.loss!r}")
        if self.focal < 0 or self.border < 0 or (self.focal and self.loss != "l1"):
            raise ValueError(f"focal and border must be at least 0, and focal is for 'l1': {self.focal}, {self.border}")

    def data_options(self) -> dict[str, Any]:
        return {}

    def units_per_example(self) -> int:
        return 1

    def sums(self, model: nnx.Module, batch: Mapping[str, jax.Array], *, deterministic: bool) -> Sums:
        takes = "labels" in inspect.signature(type(model).__call__).parameters
        labels = {"labels": batch["labels"]} if takes and "labels" in batch else {}
        made = model(batch["image"], **labels, deterministic=deterministic).astype(jnp.float32)
        weight, target = batch["weight"].astype(jnp.float32), batch["target"].astype(jnp.float32)
        error = made - target
        if self.focal:
            counts = (weight > 0).astype(jnp.float32)[:, None, None, None]
            loss = focal_region_loss(made, target, batch["labels"], beta=self.focal, weight=counts)
        else:
            loss = (jnp.abs(error) if self.loss == "l1" else jnp.square(error)).mean((1, 2, 3))
        inner = slice(self.border, -self.border or None)
        squared = jnp.square(error[:, inner, inner]).mean((1, 2, 3))
        psnr = -10 * jnp.log10(jnp.maximum(squared, 1e-10))
        return {"loss": jnp.vdot(weight, loss), "psnr": jnp.vdot(weight, psnr), "weight": weight.sum()}

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        weight = sums["weight"] or 1.0
        return {"loss": sums["loss"] / weight, "psnr": sums["psnr"] / weight}


@dataclasses.dataclass(frozen=True)
class LanguageTask:
    """The next token: `model(inputs, segment_ids=, positions=, deterministic=)` gives logits `(B, N, vocabulary)`.

    `segment_ids` and `positions` are passed when the batch holds them. Reports `loss` (nats per token), `perplexity`
    (its exponential), `bits_per_byte`, and `accuracy`, the fraction of targets that are the likeliest token.

    Attributes:
      sequence_length: tokens N of an example.
      bytes_per_token: mean number of bytes that a token stands for; 1 where tokens are bytes.
      positions: whether `positions` are passed; False for a model whose mixers would refuse them because they do not
        depend on them.
    """

    sequence_length: int = 256
    bytes_per_token: float = 1.0
    positions: bool = True

    arrays: ClassVar = ("inputs", "targets", "weight")
    unit: ClassVar = "tokens"
    best: ClassVar = "loss"
    best_mode: ClassVar = "min"

    def __post_init__(self):
        if self.sequence_length < 1:
            raise ValueError(f"sequence_length must be at least 1, not {self.sequence_length}")
        if not self.bytes_per_token > 0:
            raise ValueError(f"bytes_per_token must be more than 0, not {self.bytes_per_token}")

    def data_options(self) -> dict[str, Any]:
        return {"sequence_length": self.sequence_length}

    def units_per_example(self) -> int:
        return self.sequence_length

    def sums(self, model: nnx.Module, batch: Mapping[str, jax.Array], *, deterministic: bool) -> Sums:
        names = ("segment_ids", "positions") if self.positions else ("segment_ids",)
        arguments = {name: batch[name] for name in names if name in batch}
        logits = model(batch["inputs"], **arguments, deterministic=deterministic).astype(jnp.float32)
        weight = batch["weight"].astype(jnp.float32)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
        loss = _of_known(batch["targets"], weight, loss, logits.shape[-1])
        right = (logits.argmax(-1) == batch["targets"]).astype(jnp.float32)
        return {"loss": jnp.vdot(weight, loss), "weight": weight.sum(), "correct": jnp.vdot(weight, right)}

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        weight = sums["weight"] or 1.0
        loss = sums["loss"] / weight
        return {
            "loss": loss,
            "perplexity": math.exp(loss) if loss < 700 else math.inf,
            "bits_per_byte": loss / math.log(2) / self.bytes_per_token,
            "accuracy": sums["correct"] / weight,
        }
