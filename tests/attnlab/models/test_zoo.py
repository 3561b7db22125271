"""Models of the papers by name."""

import itertools

import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from attnlab.contract import constructor_parameters
from attnlab.interop import export
from attnlab.interop.names import StateDictError
from attnlab.models import create, named_models
from attnlab.models.evit import EViT

SMALL = {"features": (8, 12, 16), "partial": (4, 4, 4), "key_dim": (4, 4, 4), "depths": (1, 1, 1), "image_size": 64}


def test_names_are_in_order_and_lead_to_constructors():
    assert list(named_models()) == sorted(named_models())
    assert {"davit_tiny", "biformer_tiny", "shvit_s1", "ravlt_tiny"} <= named_models().keys()


@pytest.mark.slow
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


def depth(name: str) -> int:
    cls, options = named_models()[name]
    defaults = {key: parameter.default for key, parameter in constructor_parameters(cls).items()}
    return sum(sum(np.ravel(value)) for key, value in (defaults | dict(options)).items() if key in ("depth", "depths"))


# The least deep of each.
ONE_OF_EACH_CLASS = {named_models()[name][0]: name for name in sorted(named_models(), key=depth, reverse=True)}.values()


@pytest.mark.slow
@pytest.mark.parametrize("name", ONE_OF_EACH_CLASS)
def test_one_size_of_each_class(name):
    """Images of its own size to float32 logits and a map of each stage, from fine to coarse; nothing is computed."""
    cls, _ = named_models()[name]
    classes = 7 if "num_classes" in constructor_parameters(cls) else None

    def shapes():
        model = create(name, num_classes=classes)
        rows, columns, channels = getattr(model, "image_shape", (64, 64, getattr(model, "channels", 3)))
        images = np.zeros((1, rows or 224, columns or 224, channels), np.float32)
        if cls is EViT:
            with pytest.raises(ValueError, match="tokens are left out"):
                model.stages(images)
            return model(images), ()
        return model(images), model.stages(images) if hasattr(model, "stages") else ()

    result, maps = nnx.eval_shape(shapes)
    result = result[-1] if isinstance(result, tuple) else result  # of several exits the last
    assert classes is None or (result.shape == (1, 7) and result.dtype == np.float32)
    maps = [x for x in maps if x.ndim == 4]
    assert all(fine.shape[1] >= coarse.shape[1] for fine, coarse in itertools.pairwise(maps))
