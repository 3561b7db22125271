"""The pipeline that all sources share, on a dataset of numbers."""

import collections
import itertools
import json
import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest

from attnlab.data import Dataset, DatasetInfo, Loading


class Numbers(collections.abc.Sequence):
    """Examples whose label says which they are."""

    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        if not 0 <= index < self.length:
            raise IndexError(index)
        return {"label": np.int32(index), "weight": np.float32(1)}


def jitter(example, rng):
    return {**example, "noise": np.float32(0 if rng is None else 1 + rng.random())}


def numbers(train=10, held_out=7, *, digest="d", transform=jitter, loading=None):
    info = DatasetInfo("numbers", "image", train, held_out, digest, (1, 1, 1), 10)
    sizes = {"train": train, "eval": held_out}
    return Dataset(info, lambda split, _: Numbers(sizes[split]), transform, loading or Loading())


def take(batches, count):
    return [{name: value.copy() for name, value in next(batches).items()} for _ in range(count)]


def same(left, right):
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


def labels(batches):
    return np.concatenate([batch["label"] for batch in batches]).tolist()


def test_same_seed_same_batches_and_another_seed_another_order():
    first = take(numbers().train(4, 7), 12)
    same(first, take(numbers().train(4, 7), 12))
    assert labels(first) != labels(take(numbers().train(4, 8), 12))


def test_every_epoch_holds_every_example_once_in_its_own_order():
    stream = labels(take(numbers(train=10).train(4, 0), 10))
    epochs = [stream[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_augmentation_changes_from_epoch_to_epoch():
    noise = np.concatenate([batch["noise"] for batch in take(numbers(train=4).train(4, 0), 5)])
    assert len(set(noise.tolist())) == 20


@pytest.mark.parametrize("loading", [Loading(), Loading(num_threads=2)])
@pytest.mark.parametrize(("taken", "size"), [(0, 3), (1, 3), (4, 3), (7, 3), (5, 1), (2, 64)])
def test_resumes_exactly_within_an_epoch_through_json(loading, taken, size):
    dataset = numbers(loading=loading)
    batches = dataset.train(size, 5)
    take(batches, taken)
    state = json.loads(json.dumps(batches.get_state()))
    expected = take(batches, 9)
    fresh = dataset.train(size, 5)
    take(fresh, 2)  # a position of its own, which the state replaces
    fresh.set_state(state)
    same(take(fresh, 9), expected)


def test_a_state_is_restored_under_another_number_of_processes():
    alone = numbers().train(4, 1)
    take(alone, 3)
    pair = [numbers().train(4, 1, shard_index=i, shard_count=2) for i in range(2)]
    for half in pair:
        half.set_state(alone.get_state())
    expected = take(alone, 5)
    halves = [take(half, 5) for half in pair]
    joined = [{name: np.concatenate([a[name], b[name]]) for name in a} for a, b in zip(*halves, strict=True)]
    same(joined, expected)


def test_threads_do_not_change_the_batches():
    same(take(numbers(loading=Loading(num_threads=3)).train(4, 1), 9), take(numbers().train(4, 1), 9))


@pytest.mark.slow
def test_worker_processes_do_not_change_the_batches_and_resume():
    dataset = numbers(loading=Loading(worker_count=2))
    expected = take(numbers().train(4, 1), 8)
    others = multiprocessing.active_children()
    batches = dataset.train(4, 1)
    same(take(batches, 3), expected[:3])
    workers = [child for child in multiprocessing.active_children() if child not in others]
    assert len(workers) == 2
    for worker in workers:  # as Ctrl-C and schedulers do, which mean their parent
        os.kill(worker.pid, signal.SIGINT)
        os.kill(worker.pid, signal.SIGTERM)
    assert {type(value) for value in next(dataset.eval(4)).values()} == {np.ndarray}, "no memory of other processes"
    state = json.loads(json.dumps(batches.get_state()))
    take(batches, 30)  # more than were prepared ahead
    assert all(worker.is_alive() for worker in workers)
    batches.close()
    assert [worker.exitcode for worker in workers] == [0, 0]
    for loading in (Loading(worker_count=1), Loading(num_threads=2)):  # other numbers of them, too
        batches = numbers(loading=loading).train(4, 1)
        batches.set_state(state)
        same(take(batches, 5), expected[3:])
        batches.close()


LEFT_OPEN = """
from attnlab import data
from tests.attnlab.data.test_dataset import numbers

if __name__ == "__main__":
    kept = numbers(loading=data.Loading(worker_count=1)).train(4, 1, shard_index=0, shard_count=1)
    print(next(kept)["label"].shape)
"""


@pytest.mark.slow
def test_a_program_that_leaves_batches_open_ends_without_a_word_and_frees_shared_memory(tmp_path):
    (tmp_path / "left_open.py").write_text(LEFT_OPEN)
    path = os.pathsep.join([str(pathlib.Path(__file__).parents[3]), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(tmp_path / "left_open.py")]
    ended = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    # Blocks that are left are named there, by Python's resource tracker.
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "(4,)\n", "")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed was 0 and is now 1"),
        ({"batch_size": 4}, "batch_size was 2 and is now 4"),
        ({"digest": "e"}, "digest was 'd' and is now 'e'"),
    ],
)
def test_a_state_of_another_stream_is_refused(change, message):
    state = numbers().train(2, 0).get_state()
    other = numbers(digest=change.get("digest", "d")).train(change.get("batch_size", 2), change.get("seed", 0))
    with pytest.raises(ValueError, match=message):
        other.set_state(state)
    with pytest.raises(ValueError, match="split was 'train' and is now 'eval'"):
        numbers().eval(2).set_state(state)
    with pytest.raises(ValueError, match=r"keys 'stream' and 'position', not \['next_index'\]"):
        other.set_state({"next_index": 1})
    with pytest.raises(ValueError, match="the number of batches taken, not"):
        numbers().train(2, 0).set_state(state | {"position": {"next_index": 1}})


@pytest.mark.parametrize(("held_out", "batch_size"), [(7, 3), (6, 3), (1, 4), (7, 1)])
def test_eval_covers_every_example_once_and_fills_up_with_blank_ones(held_out, batch_size):
    batches = list(numbers(held_out=held_out).eval(batch_size))
    assert len(batches) == -(-held_out // batch_size)
    assert all(batch["label"].shape == (batch_size,) for batch in batches)
    weight = np.concatenate([batch["weight"] for batch in batches])
    assert weight.dtype == np.float32 and weight.tolist() == [1] * held_out + [0] * (len(weight) - held_out)
    assert labels(batches)[:held_out] == list(range(held_out))
    assert not any(batch["noise"].any() for batch in batches)


def test_eval_of_the_training_split():
    assert labels(numbers(train=4).eval(2, split="train")) == [0, 1, 2, 3]


def test_eval_is_repeatable_and_resumable():
    dataset = numbers()
    expected = list(dataset.eval(3))
    batches = dataset.eval(3)
    next(batches)
    state = batches.get_state()
    fresh = dataset.eval(3)
    fresh.set_state(state)
    same(list(fresh), expected[1:])


@pytest.mark.parametrize("count", [2, 3])
def test_shards_are_disjoint_and_together_the_whole(count):
    size = 2 * count
    expected = take(numbers(train=11).train(size, 3), 9)
    shards = [take(numbers(train=11).train(size, 3, shard_index=i, shard_count=count), 9) for i in range(count)]
    for step, whole in enumerate(expected):
        for name, value in whole.items():
            np.testing.assert_array_equal(np.concatenate([shard[step][name] for shard in shards]), value)


def test_eval_shards_have_equally_many_batches_and_cover_disjointly():
    shards = [list(numbers(held_out=5).eval(4, shard_index=i, shard_count=2)) for i in range(2)]
    assert [len(shard) for shard in shards] == [2, 2]
    real = [int(label) for b in itertools.chain(*shards) for label, w in zip(b["label"], b["weight"], strict=True) if w]
    assert sorted(real) == list(range(5))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda d: d.train(0, 0), r"batch_size must be a positive multiple of shard_count \(1\), not 0"),
        (lambda d: d.eval(3, shard_index=0, shard_count=2), r"multiple of shard_count \(2\), not 3"),
        (lambda d: d.train(4, 0, shard_index=2, shard_count=2), "shard_index must lie in 0..shard_count - 1, not 2 of"),
        (lambda d: d.train(4, -1), r"seed must lie in 0..2\*\*32 - 1, not -1"),
        (lambda d: d.train(4, 2**32), "seed must lie"),
        (lambda d: d.train(4, 0, sequence_length=8), "sequence_length is for text; numbers holds images"),
        (lambda d: d.eval(4, split="evla"), "no split is called 'evla': did you mean eval"),
        (lambda d: d.num_examples("test"), "no split is called 'test'"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call(numbers())


def test_loading_refuses_negative_numbers():
    with pytest.raises(ValueError, match="worker_count must be at least 0, not -1"):
        Loading(worker_count=-1)


def test_workers_follow_the_machine(monkeypatch):
    for processors, wanted in ((1, 0), (2, 0), (8, 6), (64, 16)):
        monkeypatch.setattr("os.sched_getaffinity", lambda _, count=processors: set(range(count)), raising=False)
        assert Loading(worker_count=None).workers == wanted


def test_without_a_transform():
    batch = next(numbers(transform=None).train(2, 0))
    assert batch.keys() == {"label", "weight"} and batch["label"].dtype == np.int32
