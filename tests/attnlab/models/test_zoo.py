"""Models of the papers by name."""

import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from attnlab.interop import export
from attnlab.interop.names import StateDictError
from attnlab.models import create, named_models

SMALL = {"features": (8, 12, 16), "partial": (4, 4, 4), "key_dim": (4, 4, 4), "depths": (1, 1, 1), "image_size": 64}


def test_names_are_in_order_and_lead_to_constructors():
    assert list(named_models()) == sorted(named_models())
    assert {"davit_tiny", "biformer_tiny", "shvit_s1", "ravlt_tiny"} <= named_models().keys()


def test_weights_give_the_same_logits_and_features(tmp_path):
    images = np.random.default_rng(0).normal(size=(1, 64, 64, 3)).astype(np.float32)
    model = create("shvit_s1", num_classes=5, rngs=nnx.Rngs(7), **SMALL)
    export(model, tmp_path / "small.safetensors")
    options = {"num_classes": 5, "weights": tmp_path / "small.safetensors", **SMALL}
    np.testing.assert_allclose(create("shvit_s1", **options)(images), model(images), atol=1e-6)
    features = create("shvit_s1", features_only=True, **options)
    assert features.backbone.head is None
    for got, want in zip(features(images), model.stages(images), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-6)

    arrays = safetensors.numpy.load_file(tmp_path / "small.safetensors")
    arrays["head.other"] = arrays.pop("head.l.bias")
    with pytest.raises(StateDictError, match=r"head\.l\.bias(.|\n)*head\.other"):
        create("shvit_s1", **options | {"weights": arrays})


def test_what_there_is_not_is_named():
    with pytest.raises(KeyError, match="davit_tiny"):
        create("davit_tinny", num_classes=3)
    with pytest.raises(ValueError, match=r"davit_tiny has no option 'windows'.*window"):
        create("davit_tiny", num_classes=3, windows=7)


@pytest.mark.slow
@pytest.mark.parametrize("name", named_models())
def test_every_size_has_stages(name):
    """Of images of its own size, from fine to coarse, and logits; nothing is computed."""

    def shapes():
        model = create(name, num_classes=7)
        rows, columns, channels = model.image_shape
        images = np.zeros((1, rows or 224, columns or 224, channels), np.float32)
        return model(images), model.stages(images)

    logits, maps = nnx.eval_shape(shapes)
    assert logits.shape == (1, 7)
    sides = [x.shape[1] for x in maps]
    assert all(x.ndim == 4 for x in maps) and sides == sorted(sides, reverse=True)
