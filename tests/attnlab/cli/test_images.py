"""`attnlab predict` and `attnlab attend` on files of all kinds, with small models."""

import numpy as np
import pytest
from flax import nnx
from PIL import Image

from attnlab.cli import attend, attend_figure
from attnlab.cli.main import main
from attnlab.compiling import compiled_for_once
from attnlab.data.folder import read_image
from attnlab.figures import LIGHT
from attnlab.interop import export
from attnlab.measure import watch
from attnlab.models import zoo
from attnlab.models.crossvit import CrossViT
from attnlab.models.davit import DaViT
from attnlab.models.dependencyvit import DependencyViT
from attnlab.models.evit import EViT
from attnlab.models.zoo import create

SMALL = {"features": (8, 16), "num_heads": (2, 2), "depths": (1, 1), "window": 4, "image_size": 32}


@pytest.fixture
def named(monkeypatch):
    monkeypatch.setattr(zoo, "named_models", lambda: {"davit_small_one": (DaViT, SMALL)})


@pytest.fixture
def files(tmp_path):
    """The same picture in colours, grey, of 16 bits, with a palette and with transparency; and a broken file."""
    rows, columns = np.mgrid[:40, :60]
    grey = Image.fromarray((rows * 3 + columns).astype(np.uint8))
    grey.convert("RGB").save(tmp_path / "colours.png")
    grey.save(tmp_path / "grey.png")
    Image.fromarray(np.asarray(grey).astype(np.uint16) * 257).save(tmp_path / "deep.png")
    grey.convert("P").save(tmp_path / "palette.gif")
    grey.convert("RGBA").save(tmp_path / "alpha.webp", lossless=True)
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    return tmp_path


def test_files_of_all_kinds_give_the_same_picture(files):
    want = read_image(files / "colours.png", (16, 24), 3)
    assert want.shape == (16, 24, 3)
    for name in ("grey.png", "deep.png", "palette.gif", "alpha.webp"):
        got = read_image(files / name, (16, 24), 3)
        assert np.abs(got.astype(int) - want).max() <= 1, name


@pytest.mark.slow
@pytest.mark.usefixtures("named")
def test_predict_names_classes_and_broken_files(files, capsys):
    model = create("davit_small_one", num_classes=3, rngs=nnx.Rngs(5))
    model.head.bias[...] = np.array([0.0, 9.0, 5.0], np.float32)
    export(model, files / "weights.safetensors")
    (files / "labels.txt").write_text("cat\ndog\nowl\n")
    options = ["--model", "davit_small_one", "--weights", str(files / "weights.safetensors"), "--num-classes", "3"]
    images = [str(files / name) for name in ("grey.png", "broken.jpg", "nowhere.png", "alpha.webp")]
    assert main(["predict", *images, *options, "--labels", str(files / "labels.txt"), "--top", "2"]) == 1
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0] == images[0] and lines[3] == images[3]
    assert lines[1].endswith("%  dog") and lines[2].endswith("%  owl") and len(lines) == 6
    assert "broken.jpg: cannot be decoded" in err and "nowhere.png: no such file" in err


@pytest.mark.usefixtures("named")
def test_what_cannot_be_is_refused(files, capsys):
    image = str(files / "grey.png")
    assert main(["predict", image, "--model", "davit_small_one"]) == 2
    assert "--weights is missing" in capsys.readouterr().err
    assert main(["predict", image, "--model", "davit_smal_one", "--weights", "x"]) == 2
    assert "davit_small_one" in capsys.readouterr().err
    assert main(["attend", image, "--model", "davit_small_one", "--query", "2", "0"]) == 2
    assert "--query must lie" in capsys.readouterr().err


@pytest.mark.usefixtures("named")
def test_attend_draws_windows(files, capsys):
    options = ["--model", "davit_small_one", "--out-dir", str(files / "maps"), "--query", "0.1", "0.1"]
    assert main(["attend", str(files / "grey.png"), *options]) == 0
    assert "grey.png" in capsys.readouterr().out
    for name in ("grey.png", "grey-dark.png"):
        with Image.open(files / "maps" / name) as drawn:
            assert min(drawn.size) > 100


def seen_by(model, size, *queries):
    """What a model records of an image, and the maps for each query."""
    image = np.random.default_rng(0).normal(size=(1, *size, 3)).astype(np.float32)
    graph, state = nnx.split(model)

    def run(state, image):
        seen = watch(nnx.merge(graph, state), image)[1]
        return [attend.maps_of(seen, size, query) for query in queries], seen.recorded("kept"), seen["attention"]

    return compiled_for_once(run)(state, image)


FORM = {"num_heads": 1, "mlp_ratio": 1.0, "image_size": 32, "patch_size": 8, "num_classes": None, "rngs": nnx.Rngs(0)}
LEAVING = {
    "evit": (lambda: EViT(8, depth=3, keep_rate=0.5, layers=(0, 1), **FORM), [17, 10, 7]),
    "dependencyvit": (lambda: DependencyViT(8, depth=3, prune_layers=(1, 2), prune_ratio=0.25, **FORM), [16, 12, 8]),
}


@pytest.mark.parametrize("name", LEAVING)
def test_tokens_that_were_left_out_are_blank(name):
    """Of two layers that leave tokens out the second counts among those that the first left."""
    build, left = LEAVING[name]
    (maps, at_corner), kept, weights = seen_by(build(), (32, 32), None, (0.0, 0.0))
    prefix = int(name == "evit")
    first, second = (np.asarray(kept[layer][0]) for layer in (0, 1))
    places = [np.arange(16 + prefix), first, np.where(second < 0, -1, first[second])]
    assert [len(here) for here in places] == left
    for layer, here in enumerate(places):
        patches = here >= prefix  # neither the class token nor one that is fused
        wanted = np.full(16, np.nan, np.float32)
        rows = np.asarray(weights[layer])[0].mean(0)
        wanted[here[patches] - prefix] = (rows[0] if prefix else rows.mean(0))[patches]
        np.testing.assert_allclose(maps[layer].ravel(), wanted, rtol=1e-5)
        assert np.isfinite(at_corner[layer]).any() == (prefix in here)


def test_streams_are_named_and_each_has_its_grid():
    form = {"features": (8, 8), "num_heads": (1, 1), "depths": ((1, 1, 0),), "mlp_ratios": (1.0, 1.0)}
    model = CrossViT(**form, image_size=32, image_scales=(1.0, 0.75), patch_sizes=(8, 4), rngs=nnx.Rngs(0))
    ((maps,), _, _) = seen_by(model, (32, 32), None)
    assert {layer: drawn.shape for layer, drawn in maps.items()} == {0: (4, 4), 1: (6, 6)}
    assert attend.titles_of(model) == ["layer 0, stream 0", "layer 1, stream 1"]


def test_blank_tokens_are_drawn_as_ground():
    values = np.array([[1.0, np.nan], [0.0, 0.5]])
    figure = attend_figure.draw(np.zeros((4, 4, 3)), {"layer 0": values}, None, LIGHT)
    drawn = figure.axes[1].images[1].get_array()
    assert drawn[0, 1].tolist() == [1.0, 1.0, 1.0, 1.0]
    np.testing.assert_allclose(drawn[..., 3], [[0.85, 1.0], [0.25, 0.55]])


def test_maps_of_weights():
    assert attend.grid_of(197, (224, 224)) == ((14, 14), 1)
    assert attend.grid_of(280, (224, 320)) == ((14, 20), 0)
    assert attend.grid_of(23, (224, 224)) is None
    weights = np.random.default_rng(0).dirichlet(np.ones(17), (1, 2, 17)).astype(np.float32)
    np.testing.assert_array_equal(attend.attention_of(weights, (8, 8), None), weights[0].mean(0)[0, 1:].reshape(4, 4))
    at = attend.attention_of(weights, (8, 8), (1.0, 0.5))
    np.testing.assert_array_equal(at, weights[0].mean(0)[1 + 14, 1:].reshape(4, 4))
    assert attend.attention_of(weights[0], (8, 8), None) is None
    gate = np.arange(2 * 64.0).reshape(1, 64, 2)
    np.testing.assert_array_equal(attend.gate_of(gate, (64, 64)), gate[0].mean(1).reshape(8, 8))
