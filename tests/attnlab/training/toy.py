"""Small models and data for the tests of training; run as a program, it trains and prints what came of it."""

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attnlab.data.dataset import Dataset, Loading
from attnlab.data.images import ArrayImages, Augment, array_dataset
from attnlab.data.text import text_dataset
from attnlab.nn.linear import Linear
from attnlab.training import ClassificationTask, MeshConfig, OptimizerConfig, TrainConfig, load_model, train
from pallas_kernels import dispatch, partition

CLASSES = 4


class Classifier(nnx.Module):
    """Images (B, 4, 4, 1) to logits, with all kinds of state: batch norm, dropout, and parameters with axis names."""

    def __init__(self, *, width: int = 16, dropout: float = 0.3, batch_norm: bool = True, dtype: Any, rngs: nnx.Rngs):
        init = nnx.initializers.lecun_normal()
        # A bias before a batch norm has no gradient but rounding, of which Adam makes whole steps.
        bias, axes = not batch_norm, ("embed", "mlp")
        self.hidden = Linear(16, width, use_bias=bias, axes=axes, kernel_init=init, dtype=dtype, rngs=rngs)
        self.norm = nnx.BatchNorm(width, rngs=rngs) if batch_norm else nnx.data(None)
        self.dropout = nnx.Dropout(dropout, rngs=rngs) if dropout else nnx.data(None)
        self.head = Linear(width, CLASSES, axes=("mlp", None), kernel_init=init, dtype=dtype, rngs=rngs)

    def __call__(self, images: jax.Array, *, deterministic: bool = True) -> jax.Array:
        with dispatch.target("tpu"):  # what a kernel would ask there: over which mesh axes batch and heads are cut
            assert partition.refusal() is None, partition.refusal()
        x = self.hidden(images.reshape(images.shape[0], -1))
        if self.norm is not None:
            x = self.norm(x, use_running_average=deterministic)
        x = nnx.relu(x)
        if self.dropout is not None:
            x = self.dropout(x, deterministic=deterministic)
        return self.head(x)


class Bigram(nnx.Module):
    """Token ids (B, N) to logits that depend on the last token, its place and its segment alone."""

    def __init__(self, vocabulary: int = 260, *, dtype: Any, rngs: nnx.Rngs):
        table = 0.1 * jax.random.normal(rngs.params(), (vocabulary, 8))
        self.embedding = nnx.Param(table, logical_axes=("vocab", "embed"))
        self.head = Linear(8, vocabulary, axes=("embed", "vocab"), dtype=dtype, rngs=rngs)

    def __call__(self, tokens, *, segment_ids=None, positions=None, deterministic=True):
        x = self.embedding[...][tokens]
        for extra in (segment_ids, positions):
            x = x if extra is None else x + extra[..., None].astype(jnp.float32)
        return self.head(x)


def images(train_size: int = 50, eval_size: int = 21) -> Dataset:
    """Images whose brightest row is the class, mirrored at random; sizes that no batch divides."""
    generator = np.random.default_rng(0)

    def split(size: int) -> ArrayImages:
        labels = generator.integers(CLASSES, size=size)
        pixels = generator.uniform(0, 0.5, (size, 4, 4, 1)).astype(np.float32)
        pixels[np.arange(size), labels] += 0.4
        return ArrayImages(pixels, labels)

    splits = {"train": split(train_size), "eval": split(eval_size)}
    return array_dataset(
        "toy", splits, num_classes=CLASSES, augment=Augment(flip=True), scale="unit", loading=Loading()
    )


def text(*, pack: bool = True) -> Dataset:
    documents = [bytes((i * j) % 7 + 97 for j in range(40 + i)) for i in range(1, 9)]
    return text_dataset("toy", {"train": documents, "eval": documents[:2]}, pack=pack, loading=Loading())


class Interposed:
    """A dataset that does something as it hands out the training batch of a step: `act(step, batch)` returns it."""

    def __init__(self, data: Dataset, act):
        self.data, self.act = data, act

    def train(self, *args, **kwargs):
        outer, inner = self, self.data.train(*args, **kwargs)

        class Batches(Iterator):
            count = 0

            def __next__(self):
                self.count += 1
                return outer.act(self.count, next(inner))

            def get_state(self):
                return {"count": self.count, "inner": inner.get_state()}

            def set_state(self, state):
                self.count = state["count"]
                inner.set_state(state["inner"])

        return Batches()

    def eval(self, *args, **kwargs):
        return self.data.eval(*args, **kwargs)


def signal_at(step: int, number: signal.Signals):
    def act(count, batch):
        if count == step:
            os.kill(os.getpid(), number)
        return batch

    return act


def config(**changes) -> TrainConfig:
    """Ten steps of 8 images, every loss logged."""
    # The learning rate changes from step to step, but not with the number of steps, which saves compilations.
    optimizer = OptimizerConfig(learning_rate=1e-2, schedule="constant", warmup_steps=4)
    usual = {"steps": 10, "batch_size": 8, "log_every": 1, "eval_every": 4, "checkpoint_every": 5, "ema": 0.9}
    return TrainConfig(**(usual | {"tensorboard": False, "optimizer": optimizer} | changes))


def losses(history) -> dict[int, float]:
    return {record["step"]: record["values"]["loss"] for record in history if record["split"] == "train"}


def main(directory: str, mode: str, address: str = "", process: str = "") -> None:
    """Modes: `slow` trains so slowly that it can be interrupted; `devices` on meshes of 1, 4 and 8 devices.

    `process` and `stopped_process` train in two processes that meet at `address`.
    """
    if mode.endswith("process"):
        _train_in_two_processes(directory, mode, address, int(process))
        return
    if mode == "slow":
        import time

        def act(count, batch):
            time.sleep(0.2)
            print("batch", count, flush=True)
            return batch

        result = train(Classifier, ClassificationTask(), Interposed(images(), act), config(steps=8), directory)
        print(json.dumps({"losses": losses(result.history)}))
        return
    assert mode == "devices"
    results = {}
    for name, mesh, count in (("1", MeshConfig(), 1), ("8", MeshConfig(2, -1, 2), 8)):
        results[name] = _train_on(mesh, count, f"{directory}/{name}", steps=10)
    # Begun on eight devices, gone on with four and then one.
    results["moved"] = _train_on(MeshConfig(2, -1, 2), 8, f"{directory}/moved", steps=4)
    results["moved"] = _train_on(MeshConfig(1, 2, 2), 4, f"{directory}/moved", steps=7)
    results["moved"] = _train_on(MeshConfig(), 1, f"{directory}/moved", steps=10)
    # A loaded module, which stands on one device, trained on eight.
    start = load_model(Classifier, f"{directory}/1")
    results["loaded"] = _train_on(MeshConfig(2, -1, 2), 8, f"{directory}/loaded", steps=4, model=start)
    print(json.dumps(results))


def _train_on(mesh: MeshConfig, count: int, directory: str, steps: int, model: Any = Classifier) -> dict[str, Any]:
    from attnlab.training import mesh_from

    devices = mesh_from(mesh, jax.devices()[:count])
    result = train(model, ClassificationTask(), images(), config(steps=steps, mesh=mesh), directory, mesh=devices)
    kernel = result.model.hidden.kernel[...]
    shard = kernel.addressable_shards[0].data.shape
    return {"losses": losses(result.history), "eval": result.metrics["eval"]["loss"], "shard": shard}


def _train_in_two_processes(directory: str, mode: str, address: str, process: int) -> None:
    from attnlab.training import read_metrics

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, num_processes=2, process_id=process)
    stops = mode == "stopped_process" and process == 1
    act = signal_at(6, signal.SIGTERM) if stops else lambda _, batch: batch
    resumed = max(losses(read_metrics(Path(directory) / "metrics.jsonl")), default=0) if mode == "process" else 0
    result = train(Classifier, ClassificationTask(), Interposed(images(), act), config(), directory)
    print(json.dumps({"losses": losses(result.history), "resumed": resumed}))


if __name__ == "__main__":
    Path(sys.argv[1]).mkdir(parents=True, exist_ok=True)
    main(*sys.argv[1:])
