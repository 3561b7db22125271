"""`attnlab predict` and `attnlab attend` on files of all kinds, with small models."""

import numpy as np
import pytest
from flax import nnx
from PIL import Image

from attnlab.cli import attend
from attnlab.cli.main import main
from attnlab.data.folder import read_image
from attnlab.interop import export
from attnlab.models import zoo
from attnlab.models.davit import DaViT
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
