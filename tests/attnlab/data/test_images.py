"""Image sources on tiny files, and the transform that they share."""

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from attnlab import data
from attnlab.data import cifar10
from attnlab.data.folder import read_image
from attnlab.data.images import ImageTransform, stratified_split


def write_folder(root, classes=("cat", "dog"), splits=("train", "val"), count=3, size=(12, 10)):
    rng = np.random.default_rng(0)
    for split in splits:
        for name in classes:
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(folder / f"{i}.png")
    return root


def write_cifar(root, records=4):
    """Fake files of `records` images; the label of record i is i, its red plane 10 + i, green 20 + i, blue 30 + i."""
    root.mkdir(parents=True, exist_ok=True)
    planes = np.arange(records)[:, None] + np.repeat([10, 20, 30], 1024)
    table = np.concatenate([np.arange(records)[:, None], planes], 1).astype(np.uint8)
    for name in [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]:
        (root / name).write_bytes(table.tobytes())
    return root


def test_stratified_split_is_spread_over_each_class():
    labels = np.array([0] * 10 + [1] * 5 + [0] * 5)
    train, held_out = stratified_split(labels, 0.2)
    assert held_out.tolist() == [4, 9, 14, 19]
    assert sorted([*train, *held_out]) == list(range(20))


@pytest.mark.parametrize("fraction", [0, 1, -0.5, 1.5])
def test_a_split_that_leaves_nothing_is_refused(fraction):
    with pytest.raises(ValueError, match="eval_fraction must lie between 0 and 1"):
        data.open("digits", eval_fraction=fraction)


def test_transform_without_a_generator_takes_the_middle_and_scales():
    image = np.arange(36, dtype=np.uint8).reshape(6, 6, 1)
    transform = ImageTransform((2, 4), data.Augment(padding=1, flip=True), "unit")
    result = transform({"image": image}, None)["image"]
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, image[2:4, 1:5] / 255, rtol=1e-6)
    symmetric = ImageTransform((2, 4), data.Augment(), "symmetric")({"image": image}, None)["image"]
    np.testing.assert_allclose(symmetric, 2 * result - 1, rtol=1e-6)


def test_random_crops_are_all_the_windows_of_the_padded_image():
    image = np.arange(1, 5, dtype=np.float32).reshape(2, 2, 1) / 4
    transform = ImageTransform((2, 2), data.Augment(padding=1), "unit")
    padded = np.pad(image, ((1, 1), (1, 1), (0, 0)))
    windows = {padded[i : i + 2, j : j + 2].tobytes() for i in range(3) for j in range(3)}
    rng = np.random.default_rng(0)
    assert {transform({"image": image}, rng)["image"].tobytes() for _ in range(200)} == windows


def test_flip_mirrors_half_of_the_images():
    image = np.array([[[0.0], [1.0]]], np.float32)
    transform, rng = ImageTransform((1, 2), data.Augment(flip=True), "unit"), np.random.default_rng(0)
    left = [transform({"image": image}, rng)["image"][0, 0, 0] for _ in range(1000)]
    assert 450 < sum(left) < 550


def test_settings_out_of_range_are_refused():
    with pytest.raises(ValueError, match="no scale is called 'symetric': did you mean symmetric"):
        data.open("digits", scale="symetric")
    with pytest.raises(ValueError, match="padding must be at least 0, not -1"):
        data.Augment(padding=-1)


def test_digits():
    dataset = data.open("digits")
    info = dataset.info
    assert (info.kind, info.image_shape, info.num_classes) == ("image", (8, 8, 1), 10)
    assert (info.train_size, info.eval_size) == (1442, 355)
    assert info.digest == data.open("digits").info.digest != data.open("digits", eval_fraction=0.3).info.digest
    seen = [b for split in ("train", "eval") for b in dataset.eval(100, split=split)]
    real = np.concatenate([b["weight"] for b in seen]) > 0
    images, labels = (np.concatenate([b[name] for b in seen])[real] for name in ("image", "label"))
    assert images.min() == 0 and images.max() == 1
    bunch = load_digits()
    assert sorted((x.tobytes(), y) for x, y in zip(images, labels, strict=True)) == sorted(
        ((x / 16).astype(np.float32).tobytes(), y) for x, y in zip(bunch.images, bunch.target, strict=True)
    )
    batch = next(dataset.train(32, 0))
    assert {k: (v.shape, v.dtype.name) for k, v in batch.items()} == {
        "image": ((32, 8, 8, 1), "float32"),
        "label": ((32,), "int32"),
        "weight": ((32,), "float32"),
    }


def test_augmented_digits_resume_exactly():
    dataset = data.open("digits", augment=data.Augment(padding=1, flip=True), scale="symmetric")
    batches = dataset.train(64, 0)
    for _ in range(30):
        next(batches)
    fresh = dataset.train(64, 0)
    fresh.set_state(batches.get_state())
    for name, value in next(batches).items():
        np.testing.assert_array_equal(next(fresh)[name] if name == "image" else value, value)
    plain = data.open("digits", scale="symmetric").train(64, 0)
    assert not np.array_equal(next(plain)["image"], next(dataset.train(64, 0))["image"])


def test_cifar10(tmp_path, monkeypatch):
    monkeypatch.setattr(cifar10, "RECORDS_PER_FILE", 4)
    write_cifar(tmp_path / "cifar-10-batches-bin")
    dataset = data.open("cifar10", path=str(tmp_path))
    assert (dataset.info.train_size, dataset.info.eval_size, dataset.info.image_shape) == (20, 4, (32, 32, 3))
    assert dataset.info.class_names[3] == "cat"
    batch = next(dataset.eval(4))
    assert batch["label"].tolist() == [0, 1, 2, 3]
    np.testing.assert_allclose(batch["image"][2], np.broadcast_to(np.array([12, 22, 32]) / 255, (32, 32, 3)), rtol=1e-6)
    assert data.open("cifar10", path=str(tmp_path / "cifar-10-batches-bin")).info == dataset.info


def test_cifar10_rows_and_columns(tmp_path, monkeypatch):
    monkeypatch.setattr(cifar10, "RECORDS_PER_FILE", 1)
    write_cifar(tmp_path, records=1)
    pixels = np.random.default_rng(0).integers(0, 256, 3072, dtype=np.uint8)
    (tmp_path / "test_batch.bin").write_bytes(b"\7" + pixels.tobytes())
    batch = next(data.open("cifar10", path=str(tmp_path)).eval(1))
    assert batch["label"].tolist() == [7]
    row, column, channel = 3, 5, 2
    np.testing.assert_allclose(
        batch["image"][0, row, column, channel], pixels[channel * 1024 + row * 32 + column] / 255, rtol=1e-6
    )


def test_cifar10_has_the_official_size():
    assert cifar10.RECORDS_PER_FILE * cifar10.RECORD_BYTES == 30_730_000


def test_cifar10_errors_say_the_file_and_where_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr(cifar10, "RECORDS_PER_FILE", 4)
    with pytest.raises(data.DataError, match=r"no such directory\n.*data_batch_1.bin(.|\n)*cs.toronto.edu/~kriz/cifar"):
        data.open("cifar10", path=str(tmp_path / "none"))
    with pytest.raises(data.DataError, match="no path was given"):
        data.open("cifar10")
    write_cifar(tmp_path)
    (tmp_path / "data_batch_3.bin").write_bytes(b"\0" * 3073)
    with pytest.raises(data.DataError, match=r"data_batch_3.bin: holds 3073 bytes instead of 12292"):
        data.open("cifar10", path=str(tmp_path))
    (tmp_path / "data_batch_3.bin").write_bytes(b"\x0a" * (4 * 3073))
    with pytest.raises(data.DataError, match=r"data_batch_3.bin: holds the label 10, above 9"):
        data.open("cifar10", path=str(tmp_path))
    (tmp_path / "data_batch_3.bin").unlink()
    with pytest.raises(data.DataError, match=r"data_batch_3.bin: no such file"):
        data.open("cifar10", path=str(tmp_path))
    with pytest.raises(data.DataError, match="is not a directory"):
        data.open("cifar10", path=str(tmp_path / "test_batch.bin"))


def test_npz_splits_by_fraction(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (20, 5, 4), np.uint8)
    np.savez(tmp_path / "a.npz", images=images, labels=np.arange(20) % 2)
    dataset = data.open("npz", path=str(tmp_path / "a.npz"))
    assert (dataset.info.train_size, dataset.info.eval_size) == (16, 4)
    assert (dataset.info.image_shape, dataset.info.num_classes) == ((5, 4, 1), 2)
    batch = next(dataset.eval(4))
    np.testing.assert_allclose(batch["image"][..., 0], images[[8, 9, 18, 19]] / 255, rtol=1e-6)


def test_npz_with_named_arrays_of_floats(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {"x_train": rng.random((6, 4, 4, 2)), "y_train": np.arange(6), "x_test": rng.random((3, 4, 4, 2))}
    np.savez(tmp_path / "a.npz", y_test=np.array([0, 5, 7]), **arrays)
    names = {"train_images": "x_train", "train_labels": "y_train", "eval_images": "x_test", "eval_labels": "y_test"}
    dataset = data.open("npz", path=str(tmp_path / "a.npz"), **names)
    assert (dataset.info.train_size, dataset.info.eval_size, dataset.info.num_classes) == (6, 3, 8)
    np.testing.assert_allclose(next(dataset.eval(3))["image"], arrays["x_test"], rtol=1e-6)


@pytest.mark.parametrize(
    ("arrays", "settings", "message"),
    [
        ({"image": np.zeros((2, 4, 4), np.uint8)}, {}, "has no array 'images': did you mean image"),
        ({"images": np.zeros((2, 4, 4), np.uint8)}, {}, "has no array 'labels'"),
        ({"images": np.zeros((2, 4), np.uint8), "labels": np.zeros(2, int)}, {}, r"'images' has the shape \(2, 4\)"),
        ({"images": np.zeros((2, 4, 4), np.uint8), "labels": np.zeros(3, int)}, {}, r"int64 \(3,\) beside 2 images"),
        ({"images": np.zeros((2, 4, 4), np.uint8), "labels": np.zeros(2)}, {}, r"float64 \(2,\)"),
        ({"images": np.zeros((2, 4, 4), np.uint8), "labels": np.array([0, -1])}, {}, "negative label -1"),
        ({"images": np.full((2, 4, 4), 3.0), "labels": np.zeros(2, int)}, {}, "runs from 3.0 to 3.0"),
        ({"images": np.full((2, 4, 4), np.nan), "labels": np.zeros(2, int)}, {}, "runs from nan to nan"),
        ({"images": np.zeros((2, 4, 4), np.int64), "labels": np.zeros(2, int)}, {}, "'images' is int64"),
        ({"images": np.zeros((2, 4, 4), np.uint8), "labels": np.zeros(2, int)}, {}, "2 images leave the eval split"),
        (
            {"images": np.zeros((2, 4, 4), np.uint8), "labels": np.zeros(2, int), "x": np.zeros((2, 5, 4), np.uint8)},
            {"eval_images": "x", "eval_labels": "labels"},
            "differ in shape",
        ),
        ({"images": np.array([{}, {}]), "labels": np.zeros(2, int)}, {}, "cannot be read as .npz"),
    ],
)
def test_npz_errors_name_the_file(tmp_path, arrays, settings, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(data.DataError, match=rf"a.npz: .*{message}(.|\n)*where to get it"):
        data.open("npz", path=str(tmp_path / "a.npz"), **settings)


def test_npz_files_of_another_kind(tmp_path):
    (tmp_path / "text.npz").write_text("no zip")
    np.save(tmp_path / "one.npy", np.zeros(3))
    np.savez(tmp_path / "cut.npz", images=np.zeros((9, 9, 9), np.uint8), labels=np.zeros(9, int))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "cut.npz").read_bytes()[:500])
    np.savez_compressed(tmp_path / "garbled.npz", images=np.zeros((9, 99, 99), np.uint8), labels=np.zeros(9, int))
    garbled = bytearray((tmp_path / "garbled.npz").read_bytes())
    garbled[60:90] = b"\xff" * 30
    (tmp_path / "garbled.npz").write_bytes(garbled)
    for name, message in (
        ("garbled.npz", "cannot be read as .npz"),
        ("text.npz", "cannot be read as .npz"),
        ("one.npy", "is a single array"),
        ("cut.npz", "cannot be read as .npz"),
        ("none.npz", "no such file"),
    ):
        with pytest.raises(data.DataError, match=f"{name}: {message}"):
            data.open("npz", path=str(tmp_path / name))
    with pytest.raises(ValueError, match="eval_images and eval_labels go together, not 'x' and None"):
        data.open("npz", path=str(tmp_path / "one.npy"), eval_images="x")


def test_image_folder(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "train" / "cat" / "notes.txt").write_text("not an image")
    dataset = data.open("image_folder", path=str(tmp_path), size=8)
    info = dataset.info
    assert (info.train_size, info.eval_size, info.class_names, info.num_classes) == (6, 6, ("cat", "dog"), 2)
    batch = next(dataset.eval(6))
    assert batch["image"].shape == (6, 8, 8, 3) == (6, *info.image_shape)
    assert batch["label"].tolist() == [0, 0, 0, 1, 1, 1]
    assert batch["image"].min() >= 0 and 0.5 < batch["image"].max() <= 1
    grey = data.open("image_folder", path=str(tmp_path), size=8, channels=1)
    assert next(grey.train(2, 0))["image"].shape == (2, 8, 8, 1)


def test_image_folder_keeps_pixels_and_takes_the_middle(tmp_path):
    write_folder(tmp_path, size=(6, 10))
    pixels = np.asarray(Image.open(tmp_path / "val" / "cat" / "0.png"), np.float32) / 255
    whole = next(data.open("image_folder", path=str(tmp_path), size=6).eval(1))["image"][0]
    np.testing.assert_allclose(whole, pixels[:, 2:8], rtol=1e-6)
    middle = next(data.open("image_folder", path=str(tmp_path), size=4, resize=6).eval(1))["image"][0]
    np.testing.assert_allclose(middle, whole[1:5, 1:5], rtol=1e-6)


def test_image_folder_crops_at_random_in_training(tmp_path):
    write_folder(tmp_path, classes=("cat",), count=1, size=(6, 6))
    dataset = data.open("image_folder", path=str(tmp_path), size=4, resize=6, loading=data.Loading(num_threads=2))
    batches = dataset.train(1, 0)
    assert len({next(batches)["image"].tobytes() for _ in range(100)}) == 9


def test_image_folder_split_by_fraction(tmp_path):
    write_folder(tmp_path, splits=("all",), count=5)
    dataset = data.open("image_folder", path=str(tmp_path / "all"), eval_fraction=0.4, size=4)
    assert (dataset.info.train_size, dataset.info.eval_size) == (6, 4)
    with pytest.raises(data.DataError, match=r"10 images leave a split empty with eval_fraction 0.05"):
        data.open("image_folder", path=str(tmp_path / "all"), eval_fraction=0.05, size=4)


def test_a_corrupt_image_is_named(tmp_path):
    write_folder(tmp_path)
    broken = tmp_path / "train" / "dog" / "1.png"
    broken.write_bytes(broken.read_bytes()[:90])
    dataset = data.open("image_folder", path=str(tmp_path), size=8)
    with pytest.raises(data.DataError, match=r"dog/1.png: cannot be decoded as an image(.|\n)*remove the file"):
        next(dataset.train(6, 0))
    broken.write_text("no image at all")
    with pytest.raises(data.DataError, match=r"dog/1.png: cannot be decoded"):
        list(dataset.eval(2, split="train"))


def test_broken_images_are_skipped_named_and_counted(tmp_path):
    write_folder(tmp_path)
    broken = sorted((tmp_path / "train").rglob("*.png"))[:2]
    for file in broken:
        file.write_bytes(b"no image")
    dataset = data.open("image_folder", path=str(tmp_path), size=8, on_broken="skip")
    with pytest.warns(UserWarning, match="skipped, 2 of") as caught:
        batches = list(dataset.eval(1, split="train"))
    assert [file.name in str(warning.message) for file, warning in zip(broken, caught, strict=True)] == [True, True]
    weight = np.concatenate([batch["weight"] for batch in batches])
    assert (weight == 0).sum() == 2
    assert (weight == 1).sum() == dataset.info.train_size - 2
    with pytest.raises(ValueError, match="on_broken must be 'raise' or 'skip'"):
        data.open("image_folder", path=str(tmp_path), on_broken="ignore")


def test_images_stand_upright(tmp_path):
    pixels = np.arange(16, dtype=np.uint8).reshape(4, 4) * 10
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned: to be turned clockwise by a quarter
    Image.fromarray(np.rot90(pixels)).save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path / "turned.png", 4, 1)[..., 0], pixels)


def test_image_folder_errors(tmp_path):
    def opened(**settings):
        return data.open("image_folder", path=str(tmp_path), **settings)

    with pytest.raises(data.DataError, match=r"train: no such directory(.|\n)*PATH/train/CLASS(.|\n)*image-net.org"):
        opened()
    (tmp_path / "train").mkdir()
    with pytest.raises(data.DataError, match="val: no such directory"):
        opened()
    (tmp_path / "val").mkdir()
    with pytest.raises(data.DataError, match="train: holds no directories of classes"):
        opened()
    (tmp_path / "train" / "cat").mkdir()
    (tmp_path / "val" / "cats").mkdir()
    with pytest.raises(data.DataError, match="val/cats: is a class without training images: did you mean cat"):
        opened()
    (tmp_path / "val" / "cats").rename(tmp_path / "val" / "cat")
    with pytest.raises(data.DataError, match="train/cat: holds no images"):
        opened()
    with pytest.raises(ValueError, match="size must be at least 1 and at most resize, not 8 with resize 4"):
        opened(size=8, resize=4)
    with pytest.raises(ValueError, match="channels must be 1 or 3, not 2"):
        opened(channels=2)


def test_evaluation_may_lack_classes(tmp_path):
    write_folder(tmp_path)
    for file in (tmp_path / "val" / "cat").iterdir():
        file.unlink()
    (tmp_path / "val" / "cat").rmdir()
    dataset = data.open("image_folder", path=str(tmp_path), size=4)
    assert next(dataset.eval(3))["label"].tolist() == [1, 1, 1]
