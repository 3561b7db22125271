"""The adapter of orbax: what is kept, and that nothing is lost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab.training import checkpoint
from attnlab.training.checkpoint import CheckpointError, CheckpointMismatch, Checkpoints, _digests


def tree(value):
    kernel = nnx.Param(jnp.full((2, 3), value), logical_axes=("embed", "mlp"))
    return {"params": nnx.State({"layers": nnx.State({0: kernel})}), "key": jax.random.key(int(value)), "none": ()}


def abstract(value=0.0):
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return {"model": jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=device), tree(value))}


@pytest.fixture
def opened(tmp_path):
    made = []

    def make(**options):
        made.append(Checkpoints(tmp_path / "checkpoints", ["model"], **options))
        return made[-1]

    yield make
    for checkpoints in made:
        checkpoints.close()


@pytest.mark.parametrize(("mode", "best"), [("max", 2), ("min", 1)])
def test_keeps_the_newest_and_the_best(opened, mode, best):
    checkpoints = opened(keep=2, best_mode=mode)
    for step, score in ((1, 0.1), (2, 0.9), (3, 0.3)):
        checkpoints.save(step, {"model": tree(float(step))}, {}, score=score)
    checkpoints.wait()
    # The scores of earlier runs count too.
    checkpoints = opened(keep=2, best_mode=mode)
    for step, score in ((4, 0.2), (5, None), (6, 0.4)):
        checkpoints.save(step, {"model": tree(float(step))}, {}, score=score)
    checkpoints.wait()
    assert checkpoints.best_step() == best
    assert checkpoints.steps() == [best, 5, 6]


def test_arrays_are_told_by_digests():
    words = np.arange(12, dtype=np.uint32).reshape(3, 4)
    for dtype in (np.float32, np.int8, jnp.bfloat16, np.int32, np.float16, np.bool_):
        array = words.view(np.uint8)[:, : 4 * np.dtype(dtype).itemsize].copy().view(dtype)
        array = array.astype(bool) if dtype is np.bool_ else array
        first = _digests({"a": jnp.asarray(array)})
        assert first == _digests({"a": jnp.asarray(array.copy())})
        for place in np.ndindex(array.shape):
            other = array.copy()
            other[place] = ~other[place] if dtype is np.bool_ else other[place] + 1
            assert _digests({"a": jnp.asarray(other)}) != first
        assert _digests({"a": jnp.asarray(array[::-1].copy())}) != first


def test_an_array_that_changed_in_storage_is_not_taken(opened, monkeypatch):
    checkpoints = opened(keep=2)
    checkpoints.save(1, {"model": tree(1.0)}, {})
    checkpoints.wait()
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_digests", lambda t: _digests(t) | {"params/layers/0": 7})
        checkpoints.save(2, {"model": tree(2.0)}, {})
        checkpoints.wait()
    with pytest.raises(CheckpointError, match="'model' are not those that were saved: params/layers/0"):
        checkpoints.restore(2, abstract())
    with pytest.warns(UserWarning, match="going back to step 1"):
        assert checkpoints.restore_newest(abstract())[0] == 1


def test_gives_back_what_was_saved(opened):
    checkpoints = opened()
    checkpoints.save(7, {"model": tree(7.0)}, {"data": {"next": 3}})
    checkpoints.wait()
    step, trees, progress = opened().restore_newest(abstract())
    assert (step, progress["data"]) == (7, {"next": 3})
    kernel = trees["model"]["params"]["layers"][0]
    assert isinstance(kernel, nnx.Param) and kernel.get_metadata()["logical_axes"] == ("embed", "mlp")
    np.testing.assert_array_equal(kernel[...], np.full((2, 3), 7.0))
    np.testing.assert_array_equal(jax.random.key_data(trees["model"]["key"]), jax.random.key_data(jax.random.key(7)))


def test_no_checkpoint_is_no_error(opened):
    assert opened().restore_newest(abstract()) is None


def test_mismatch_names_the_array_and_leaves_the_checkpoint(opened):
    checkpoints = opened()
    checkpoints.save(1, {"model": tree(1.0)}, {})
    checkpoints.wait()
    other = abstract()
    kernel = other["model"]["params"]["layers"][0]
    shape = jax.ShapeDtypeStruct((2, 3), jnp.bfloat16, sharding=kernel.get_value().sharding)
    other["model"]["params"]["layers"][0] = nnx.Param(shape)
    with pytest.raises(CheckpointMismatch, match=r"params/layers/0 is float32\[2, 3\] there and bfloat16\[2, 3\] here"):
        checkpoints.restore_newest(other)
    assert checkpoints.steps() == [1]


def test_an_interrupted_save_is_passed_over(opened, tmp_path):
    checkpoints = opened()
    checkpoints.save(1, {"model": tree(1.0)}, {})
    checkpoints.wait()
    (tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp" / "model").mkdir(parents=True)
    assert opened().restore_newest(abstract())[0] == 1


def test_two_unreadable_checkpoints_are_both_put_aside(opened, tmp_path):
    checkpoints = opened(keep=3)
    for step in (1, 2, 3):
        checkpoints.save(step, {"model": tree(float(step))}, {})
    checkpoints.wait()
    (tmp_path / "checkpoints" / "3" / "progress" / "metadata").write_text("{")
    (tmp_path / "checkpoints" / "2" / "model" / "_METADATA").unlink()
    again = opened(keep=3)
    with pytest.warns(UserWarning) as warned:
        step, trees, _ = again.restore_newest(abstract())
    assert step == 1 and len(warned) == 2
    np.testing.assert_array_equal(trees["model"]["params"]["layers"][0][...], np.ones((2, 3)))
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert {"1", "2.unreadable", "3.unreadable"} <= names and again.steps() == [1]
    # The same step can now be saved again.
    again.save(2, {"model": tree(20.0)}, {})
    again.wait()
    assert again.steps() == [1, 2]
