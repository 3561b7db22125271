"""What every data source opens to: a `Dataset`, and the resumable iterators over its batches.

A source supplies examples by index (`Dataset.examples`) and a transform; the order, the batches, the epochs and the
sharding are one grain pipeline for all sources:

    train   shuffle (anew in each epoch) -> repeat -> transform with a random generator -> batch -> slice of the process
    eval    every example once, in order, blank examples of weight 0 up to a whole batch -> the same batch and slice

Every element of it is a function of (seed, index), so a position is a number, and a restart continues to the example.
A batch of `batch_size` examples is cut into `shard_count` runs of rows, one for each process: the rows of all processes
put together are the batch that a single process would read, whatever their number.

Worker processes hand batches over in shared memory, a block for each array, which the receiver unlinks. Grain (0.2.18)
loses blocks in three cases. A worker that a signal ends leaves those that it has not handed over, and a terminal's
Ctrl-C and many schedulers' SIGTERM go to all processes of a program: here workers, once started, ignore both, and end
when their iterator is closed or their parent is gone. An iterator that is open when the program ends is closed by grain
only after the threads that unlink: here it is closed before. A worker that is busy with one batch for more than 25
seconds after `close` is killed, with the block that it may be writing: that one remains, until Python's resource
tracker unlinks it at the program's end, with a warning.
"""

import atexit
import dataclasses
import functools
import multiprocessing
import os
import signal
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from attnlab.suggest import suggestion

Example = Mapping[str, np.ndarray]
Batch = dict[str, np.ndarray]
Split = Literal["train", "eval"]
SPLITS = ("train", "eval")


@dataclasses.dataclass(frozen=True)
class Loading:
    """How examples are read; never which, or in what order: a run may go on with other numbers.

    Attributes:
      num_threads: threads that prepare batches ahead; 0 reads in the calling thread, best for data in memory.
      worker_count: processes that prepare batches ahead, for heavy decoding; 0 stays in this process, and None is one
        for each of the machine's processors but the first two, up to 16. The program's entry point must then be guarded
        by `if __name__ == "__main__"`.
    """

    num_threads: int = 0
    worker_count: int | None = 0

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None and value < 0:
                raise ValueError(f"{field.name} must be at least 0, not {value}")

    @property
    def workers(self) -> int:
        """Processes that prepare batches ahead on this machine."""
        if self.worker_count is not None:
            return self.worker_count
        return min(16, max(0, len(os.sched_getaffinity(0)) - 2)) if hasattr(os, "sched_getaffinity") else 0


@dataclasses.dataclass(frozen=True)
class DatasetInfo:
    """What a model and a report need to know about a dataset.

    Attributes:
      name: of the source.
      kind: "image" for classification of images, "text" for language modelling, "vectors" for regression, "image pairs"
        for restoration of images.
      train_size: images or tokens of the training split.
      eval_size: images or tokens of the evaluation split.
      digest: SHA-256 (hex) of the data; the source's docstring says of what exactly.
      image_shape: (H, W, C) of an image as the batches hold it; None for text.
      num_classes: of images; None for text.
      class_names: of images where they are known, in the order of the labels.
      vocab_size: of text; None for others.
      token_features: numbers of a vector; None for others.
      responses: numbers to be predicted from vectors; None for others.
      upscale: how many times as many rows and columns the targets of image pairs have; None for others.
      details: further facts in words, such as the version of a text.
    """

    name: str
    kind: Literal["image", "text", "vectors", "image pairs"]
    train_size: int
    eval_size: int
    digest: str
    image_shape: tuple[int, int, int] | None = None
    num_classes: int | None = None
    class_names: tuple[str, ...] = ()
    vocab_size: int | None = None
    token_features: int | None = None
    responses: int | None = None
    upscale: int | None = None
    details: Mapping[str, str] = dataclasses.field(default_factory=dict)


class Batches(Iterator[Batch]):
    """An iterator over batches whose position can be saved and restored exactly.

    `get_state` gives a dict that JSON can hold; it names the stream as well as the position, so that a checkpoint is
    never continued on other data. Batches prepared ahead but not yet taken do not count. The state is the same on
    every process, and it may be restored under another number of processes.
    """

    def __init__(self, start: Callable[[int], Any], stream: Mapping[str, Any], *, shared: bool = False):
        self._start, self._stream, self._shared = start, dict(stream), shared
        self._taken, self._iterator = 0, None

    def __next__(self) -> Batch:
        if self._iterator is None:
            self._iterator = self._start(self._taken)
            if self._shared:
                _close_at_exit(self)
        # Out of the memory that is shared with worker processes, which would outlive the program with what it holds.
        batch = {name: np.array(value) if self._shared else value for name, value in next(self._iterator).items()}
        self._taken += 1
        return batch

    def get_state(self) -> dict[str, Any]:
        """The position after the last batch taken: how many there were, whoever prepared them."""
        return {"stream": dict(self._stream), "position": self._taken}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Moves to a position that `get_state` gave, of this iterator or of one made by the same call.

        Raises:
          ValueError: if the state is of another stream (data, split, seed, batch size, ...).
        """
        if set(state) != {"stream", "position"}:
            raise ValueError(f"a data position has the keys 'stream' and 'position', not {sorted(state)}")
        then, now = state["stream"], self._stream
        differing = [key for key in {**now, **then} if then.get(key) != now.get(key)]
        if differing:
            changes = ", ".join(f"{key} was {then.get(key)!r} and is now {now.get(key)!r}" for key in differing)
            raise ValueError(f"the saved data position belongs to another stream of batches: {changes}")
        if not isinstance(state["position"], int) or state["position"] < 0:
            raise ValueError(f"a data position is the number of batches taken, not {state['position']!r}")
        self.close()
        self._taken = state["position"]

    def close(self) -> None:
        """Ends the threads and processes that prepare batches ahead, and frees the memory shared with them.

        Worker processes first finish the batch that each is preparing. The end of the program closes what is open.
        """
        if self._iterator is not None:
            self._iterator.close()
        self._iterator = None


@dataclasses.dataclass(frozen=True)
class Dataset:
    """An opened source. See `attnlab.data` for what a batch holds.

    Attributes:
      info: what it is.
      examples: (split, sequence_length) to a sequence of examples, each a mapping of arrays with a `weight`.
      transform: applied to each example, with a random generator in training and without one in evaluation.
      loading: how it is read.
    """

    info: DatasetInfo
    examples: Callable[[Split, int | None], Sequence[Example]]
    transform: Callable[[Example, np.random.Generator | None], Example] | None = None
    loading: Loading = dataclasses.field(default_factory=Loading)

    def num_examples(self, split: Split, *, sequence_length: int | None = None) -> int:
        """Images, or windows of `sequence_length` tokens, in a split: what one epoch covers.

        Raises:
          ValueError: as `train`.
        """
        return len(self._examples(split, sequence_length))

    def train(
        self,
        batch_size: int,
        seed: int,
        *,
        sequence_length: int | None = None,
        shard_index: int | None = None,
        shard_count: int | None = None,
    ) -> Batches:
        """Training batches without end.

        Args:
          batch_size: examples in a step over all processes; this process gets `batch_size / shard_count` of them.
          seed: of the order and the augmentation, 0 to 2**32 - 1.
          sequence_length: N of the windows, for text alone.
          shard_index: of this process; JAX's process index when None.
          shard_count: number of processes; JAX's process count when None.

        Returns:
          An iterator over all examples, in another order in every epoch; batches run on across the end of an epoch,
          so that none is smaller and no example is left out.

        Raises:
          ValueError: for a `sequence_length` that text lacks or images cannot use, or a seed, batch size or shard
            out of range.
        """
        import grain

        shard = _shard(batch_size, shard_index, shard_count)
        if not 0 <= seed < 2**32:
            raise ValueError(f"seed must lie in 0..2**32 - 1, not {seed}")
        examples = self._examples("train", sequence_length)
        # As good as endless; grain counts batches in floats, which an endless repetition overflows.
        epochs = max(1, 2**52 // len(examples))
        dataset = grain.MapDataset.source(examples).seed(seed).shuffle().repeat(epochs)
        if self.transform is not None:
            dataset = dataset.random_map(self.transform)
        stream = {"split": "train", "seed": int(seed), "sequence_length": sequence_length}
        return self._batches(dataset, stream, batch_size, shard)

    def eval(
        self,
        batch_size: int,
        *,
        split: Split = "eval",
        sequence_length: int | None = None,
        shard_index: int | None = None,
        shard_count: int | None = None,
    ) -> Batches:
        """One pass over a split: every example once, in a fixed order, without augmentation.

        Every batch is whole, on every process: blank examples (all zeros, so their `weight` is 0 too) complete the
        last one. Means over a split are sums over `weight`.

        Args:
          batch_size: examples in a step over all processes, as in `train`.
          split: "eval", or "train" to measure on the training examples.
          sequence_length: N of the windows, for text alone.
          shard_index: of this process; JAX's process index when None.
          shard_count: number of processes; JAX's process count when None.

        Raises:
          ValueError: as `train`.
        """
        import grain

        shard = _shard(batch_size, shard_index, shard_count)
        examples = self._examples(split, sequence_length)
        length = -(-len(examples) // batch_size) * batch_size
        dataset = grain.MapDataset.range(length).map(_PaddedExamples(examples, self.transform))
        stream = {"split": split, "sequence_length": sequence_length}
        return self._batches(dataset, stream, batch_size, shard)

    def _examples(self, split: Split, sequence_length: int | None) -> Sequence[Example]:
        if split not in SPLITS:
            raise ValueError(f"no split is called {split!r}: {suggestion(split, SPLITS)}")
        if self.info.kind in ("image", "image pairs") and sequence_length is not None:
            raise ValueError(f"sequence_length is for text; {self.info.name} holds images of {self.info.image_shape}")
        if self.info.kind == "vectors" and sequence_length is not None:
            raise ValueError(f"sequence_length is for text; {self.info.name} holds sequences of vectors")
        if self.info.kind == "text" and (sequence_length is None or sequence_length < 1):
            raise ValueError(f"{self.info.name} is text: sequence_length must be at least 1, not {sequence_length}")
        return self.examples(split, sequence_length)

    def _batches(self, dataset: Any, stream: dict[str, Any], batch_size: int, shard: tuple[int, int]) -> Batches:
        import grain

        shard_index, shard_count = shard
        threads, workers = self.loading.num_threads, self.loading.workers
        # Batches first, slice second: a process takes a run of consecutive rows from each step's batch.
        local = dataset.batch(batch_size // shard_count)[shard_index::shard_count]

        def start(taken: int) -> Any:
            if taken >= len(local):
                return iter(local[:0])
            rest = local[taken:] if taken else local
            batches = rest.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads))
            if workers:
                _mark_flags_as_parsed()
                options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
                batches = batches.mp_prefetch(options, _follow_parent)
            return iter(batches)

        stream = {"name": self.info.name, "digest": self.info.digest, "batch_size": batch_size, **stream}
        return Batches(start, stream, shared=workers > 0)


class _PaddedExamples:
    """Index to example; beyond the last example, a blank one."""

    def __init__(self, examples: Sequence[Example], transform: Callable[..., Example] | None):
        self._examples, self._transform = examples, transform

    def __call__(self, index: int) -> Example:
        if index >= len(self._examples):
            return {name: np.zeros_like(value) for name, value in self(0).items()}
        example = self._examples[int(index)]
        return example if self._transform is None else self._transform(example, None)


def _shard(batch_size: int, index: int | None, count: int | None) -> tuple[int, int]:
    if index is None or count is None:
        import jax

        index = jax.process_index() if index is None else index
        count = jax.process_count() if count is None else count
    if not 0 <= index < count:
        raise ValueError(f"shard_index must lie in 0..shard_count - 1, not {index} of {count}")
    if batch_size < 1 or batch_size % count:
        raise ValueError(f"batch_size must be a positive multiple of shard_count ({count}), not {batch_size}")
    return index, count


def _mark_flags_as_parsed() -> None:
    """Grain reads absl flags when it starts processes, which fails in programs that never parse any."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


def _follow_parent(worker: int, worker_count: int) -> None:
    """Run in a worker process at its start: it ends when its parent wishes so or is gone, at no signal to the group."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_after_parent, daemon=True).start()


def _end_after_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


_open_with_workers: weakref.WeakSet[Batches] = weakref.WeakSet()


def _close_at_exit(batches: Batches) -> None:
    _open_with_workers.add(batches)
    _register_closing()


@functools.cache
def _register_closing() -> None:
    # What is registered last runs first: before multiprocessing.util, imported by grain, ends the threads that unlink.
    atexit.register(_close_open, os.getpid())


def _close_open(process_id: int) -> None:
    if os.getpid() == process_id:  # a fork leaves them to its parent
        for batches in list(_open_with_workers):
            batches.close()
