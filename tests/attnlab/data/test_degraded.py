"""Pairs of images: what is degraded and how, and a task that trains on them."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import data
from attnlab.training import RestorationTask

ALL = ("noise", "downscale", "haze", "rain", "snow", "weather")


def first(**settings) -> dict[str, np.ndarray]:
    return next(data.open("degraded", **settings).eval(4))


@pytest.mark.parametrize("degradation", ALL)
def test_pairs_are_images_and_what_is_left_of_them(degradation):
    dataset = data.open("degraded", degradation=degradation, strength=0.6)
    batch, plain = next(dataset.eval(4)), next(data.open("digits").eval(4))
    side = 4 if degradation == "downscale" else 8
    np.testing.assert_array_equal(batch["target"], plain["image"])
    assert batch["image"].shape == (4, side, side, 1) and dataset.info.image_shape == (side, side, 1)
    assert dataset.info.upscale == 8 // side and batch["image"].dtype == np.float32
    np.testing.assert_array_equal(first(degradation=degradation, strength=0.6)["image"], batch["image"])
    if side == 8:
        assert (batch["image"] != batch["target"]).any((1, 2, 3)).all()
    trained = next(dataset.train(4, seed=0))
    assert trained["weight"].all() and trained["image"].shape == batch["image"].shape


def test_strength_regions_and_seeds():
    light, heavy = (
        np.square(np.subtract(b["image"], b["target"])).mean() for b in (first(strength=s) for s in (0.1, 0.3))
    )
    assert abs(heavy / light - 9) < 0.1 and abs(light - 0.01) < 2e-3
    assert not np.array_equal(first(seed=1)["image"], first()["image"])
    labels = first(degradation="haze", regions=4)["labels"]
    assert labels.dtype == np.int32 and labels.shape == (4, 8, 8) and set(np.unique(labels)) <= set(range(4))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"degradation": "fog"}, "no degradation is called 'fog'"),
        ({"strength": 2.0}, "strength must lie"),
        ({"degradation": "downscale", "factor": 3}, "factor must divide the images"),
        ({"images": data.Digits(scale="symmetric")}, "values from 0 to 1"),
        ({"images": data.TaskData(task="multi_query_recall")}, "must be a source of images"),
    ],
)
def test_what_does_not_fit_is_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        data.open("degraded", **settings)


class Darker(nnx.Module):
    """Takes a constant from every pixel."""

    def __init__(self, by: float):
        self.by = by

    def __call__(self, image, labels=None, *, deterministic=True):
        return image - self.by * (1 if labels is None else labels[..., None])


def test_the_task_reports_error_and_decibels_of_what_counts():
    image = jnp.zeros((3, 4, 4, 1))
    batch = {"image": image, "target": image, "weight": jnp.asarray([1.0, 1.0, 0.0])}
    task = RestorationTask()
    sums = {name: float(value) for name, value in task.sums(Darker(0.1), batch, deterministic=True).items()}
    assert task.metrics(sums) == pytest.approx({"loss": 0.1, "psnr": 20})
    squared = RestorationTask("l2").sums(Darker(0.1), batch, deterministic=True)
    assert float(squared["loss"]) == pytest.approx(0.02)
    perfect = task.sums(Darker(0.0), batch, deterministic=True)
    assert float(perfect["psnr"]) == pytest.approx(200)
    edge = batch | {"labels": jnp.zeros((3, 4, 4), jnp.int32).at[:, 0].set(1)}
    assert float(RestorationTask(border=1).sums(Darker(0.1), edge, deterministic=True)["psnr"]) == pytest.approx(200)
    stressed = RestorationTask(focal=1.0).sums(Darker(0.1), edge, deterministic=True)
    assert float(stressed["loss"]) == pytest.approx(2 * 0.1 / 4 * 2)
    with pytest.raises(ValueError, match="focal is for 'l1'"):
        RestorationTask("l2", focal=1.0)
