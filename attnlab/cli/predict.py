"""`attnlab predict`: what a classifier sees in images."""

import dataclasses
from pathlib import Path

import numpy as np
import tyro

from attnlab.cli.classifier import ClassifierOptions, classifier, read


@dataclasses.dataclass(frozen=True)
class PredictOptions(ClassifierOptions):
    """Print the likeliest classes of images, with their probabilities.

    A file that cannot be read is named, the others are classified all the same, and the exit code is 1.

    Attributes:
      labels: a file with the name of each class on a line, in the order of the logits.
      top: how many classes of each image.
    """

    labels: str | None = None
    top: int = 5


def run(arguments: list[str]) -> int:
    """Runs the command; see `attnlab predict --help`."""
    options = tyro.cli(PredictOptions, args=arguments, prog="attnlab predict")
    if options.top < 1:
        raise ValueError(f"--top must be at least 1, got {options.top}")
    import jax
    from flax import nnx

    from attnlab.cli import qualify

    labels = None if options.labels is None else Path(options.labels).read_text(encoding="utf-8").splitlines()
    qualify.on_new_device()
    found = classifier(options)
    names = found.class_names if labels is None else labels
    graph, state = nnx.split(found.model)
    probabilities = jax.jit(lambda state, x: jax.nn.softmax(nnx.merge(graph, state)(x)))
    seen = 0
    for path, _, image in read(options, found.preprocess):
        values = np.asarray(probabilities(state, image[None])[0])
        if labels is not None and len(labels) != len(values):
            raise ValueError(f"--labels must name {len(values)} classes, {options.labels} names {len(labels)}")
        seen += 1
        print(path)
        for index in np.argsort(-values, kind="stable")[: options.top]:
            print(f"  {values[index]:6.1%}  {names[index] if len(names) else f'class {index}'}")
    return int(seen < len(options.images))
