"""Checkpoints: a thin adapter of orbax's `CheckpointManager`.

A checkpoint is a directory `<step>` with one item per tree of arrays (`model`, `optimizer`, `ema`) and `progress`, JSON
with the position in the data and whatever else the loop wants back. It appears under its name only when it is whole.
Arrays are stored under their names in the trees, as global arrays, so another mesh or number of devices can read them.
"""

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import ShapeDtypeStruct

from attnlab.compiling import compiled_for_once

PROGRESS = "progress"
ITEMS = ("model", "optimizer", "ema")


class CheckpointError(RuntimeError):
    """No checkpoint of a directory can be read."""


class CheckpointMismatch(ValueError):
    """A checkpoint holds other arrays than the model, its optimizer or its average have."""


@dataclasses.dataclass
class _Keep:
    """Orbax's preservation policy: the newest `newest` steps, and the one with the best score."""

    newest: int
    mode: Literal["max", "min"]
    scores: dict[int, float]

    def best(self, steps: Sequence[int]) -> int | None:
        scored = [step for step in steps if step in self.scores]
        choose = max if self.mode == "max" else min
        return choose(scored, key=self.scores.__getitem__, default=None)

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = {*steps[-self.newest :], self.best(steps)}
        return [step in kept for step in steps]


class Checkpoints:
    """The checkpoints of one run.

    Args:
      directory: made if need be; holds checkpoints alone.
      items: names of the trees of arrays that a checkpoint has.
      keep: newest checkpoints to keep when another is saved, besides the best.
      best_mode: whether the best score is the largest or the smallest.
    """

    def __init__(
        self, directory: Path, items: Sequence[str], *, keep: int = 1, best_mode: Literal["max", "min"] = "max"
    ):
        import orbax.checkpoint as ocp

        self.directory = directory.absolute()
        self._args = ocp.args
        self._items = tuple(items)
        self._keep = _Keep(keep, best_mode, {})
        # Also for those that are not asked for: orbax warns of items that it would not know how to read.
        handlers = {name: ocp.StandardCheckpointHandler() for name in {*items, *ITEMS}}
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(preservation_policy=self._keep, enable_async_checkpointing=True),
            item_handlers={**handlers, PROGRESS: ocp.JsonCheckpointHandler()},
        )
        for step in self.steps():
            try:
                score = self._read_progress(step).get("score")
            except Exception:  # an unreadable checkpoint has no score; restoring it says what is wrong
                continue
            if score is not None:
                self._keep.scores[step] = score

    def steps(self) -> list[int]:
        """Steps of the checkpoints that were written to their end, in rising order."""
        return sorted(self._manager.all_steps())

    def best_step(self) -> int | None:
        """The step with the best score; None if no checkpoint has one."""
        return self._keep.best(self.steps())

    def save(
        self, step: int, trees: Mapping[str, Any], progress: Mapping[str, Any], *, score: float | None = None
    ) -> None:
        """Copies the arrays, and writes them while training goes on; `wait` says when that is done.

        Args:
          step: number of steps done.
          trees: arrays by item.
          progress: whatever JSON can hold.
          score: by which the best checkpoint is chosen, None where it was not measured.
        """
        if score is not None:
            self._keep.scores[step] = score
        items = {name: self._args.StandardSave(_by_name(trees[name])) for name in self._items}
        digests = {name: _digests(trees[name]) for name in self._items}
        progress = self._args.JsonSave({**progress, "score": score, "digests": digests})
        self._manager.save(step, args=self._args.Composite(**items, **{PROGRESS: progress}))

    def restore(self, step: int, abstract: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Reads one checkpoint, all of its items or some.

        Args:
          step: one of `steps`.
          abstract: by item, `jax.ShapeDtypeStruct`s with the shardings that the arrays shall have.

        Returns:
          The trees by item, and the progress.

        Raises:
          CheckpointMismatch: if the checkpoint holds other names, shapes or dtypes, naming the arrays.
          CheckpointError: if an array is not, bit for bit, the one that was saved.
          Exception: whatever orbax raises for a checkpoint that it cannot read.
        """
        metadata = self._manager.item_metadata(step)
        for name, tree in abstract.items():
            if getattr(metadata, name, None) is None:
                raise CheckpointError(f"it has no item {name!r}")
            self._check(step, getattr(metadata, name).tree, tree)
        items = {name: self._args.StandardRestore(_by_name(tree)) for name, tree in abstract.items()}
        read = self._manager.restore(step, args=self._args.Composite(**items))
        trees = {name: jax.tree.unflatten(jax.tree.structure(tree), _leaves_in_order(read[name], tree))
                 for name, tree in abstract.items()}  # fmt: skip
        progress = self._read_progress(step)
        for name, tree in trees.items():
            # Storage checks most of what it reads, not all of it. Checkpoints of before digests have none.
            there, here = progress.get("digests", {}).get(name), _digests(tree)
            if there is not None and there != here:
                wrong = ", ".join(leaf for leaf in here if there.get(leaf) != here[leaf])
                raise CheckpointError(f"arrays of {name!r} are not those that were saved: {wrong}")
        return trees, progress

    def restore_newest(self, abstract: Mapping[str, Any]) -> tuple[int, dict[str, Any], dict[str, Any]] | None:
        """Reads the newest checkpoint that can be read.

        Newer ones that cannot be read are put aside under the name `<step>.unreadable`, with a warning: their steps are
        going to be saved again. Nothing is deleted.

        Returns:
          Its step, trees and progress; None if there is no checkpoint at all.

        Raises:
          CheckpointMismatch: as `restore`.
          CheckpointError: if there are checkpoints and none of them can be read.
        """
        broken: dict[int, Exception] = {}
        for step in reversed(self.steps()):
            try:
                trees, progress = self.restore(step, abstract)
            except CheckpointMismatch:
                raise
            except Exception as error:  # orbax and tensorstore have no common base for what is unreadable
                broken[step] = error
                continue
            self._put_aside(broken, step)
            return step, trees, progress
        if broken:
            reasons = "; ".join(f"step {step}: {_first_line(error)}" for step, error in broken.items())
            raise CheckpointError(
                f"none of the checkpoints in {self.directory} can be read ({reasons}). "
                "Move them away to start from the beginning"
            )
        return None

    def wait(self) -> None:
        """Returns when all saves are on disk; raises what went wrong in them."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for all saves, and ends orbax's threads."""
        self._manager.wait_until_finished()
        self._manager.close()

    def _read_progress(self, step: int) -> dict[str, Any]:
        return self._manager.restore(step, args=self._args.Composite(**{PROGRESS: self._args.JsonRestore()}))[PROGRESS]

    def _check(self, step: int, saved: Any, wanted: Any) -> None:
        there, here = _named_shapes(saved), {name: _as_stored(leaf) for name, leaf in _named_leaves(wanted)}
        problems = [f"{name} is {there[name]} there and {here[name]} here"
                    for name in here if name in there and here[name] != there[name]]  # fmt: skip
        problems += [f"{name} {here[name]} is not in the checkpoint" for name in here if name not in there]
        problems += [f"{name} {there[name]} is in the checkpoint alone" for name in there if name not in here]
        if problems:
            words = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
            raise CheckpointMismatch(f"the checkpoint of step {step} in {self.directory} is of another model: {words}")

    def _put_aside(self, broken: Mapping[int, Exception], good: int) -> None:
        for step, error in broken.items():
            path = self.directory / str(step)
            aside = path.with_name(f"{step}.unreadable")
            count = 1
            while aside.exists():
                count += 1
                aside = path.with_name(f"{step}.unreadable-{count}")
            if jax.process_index() == 0:
                path.rename(aside)
            warnings.warn(
                f"the checkpoint of step {step} in {self.directory} cannot be read ({_first_line(error)}); "
                f"going back to step {good}. What is left of it was renamed to {aside.name}",
                stacklevel=3,
            )
        if broken:
            if jax.process_count() > 1:
                from jax.experimental import multihost_utils

                multihost_utils.sync_global_devices("unreadable checkpoints put aside")
            self._manager.reload()


def _digests(tree: Any) -> dict[str, int]:
    """A number for each array by its name, that another array has with a chance of about 2^-32.

    Σ_i (2 i + 1) w_i modulo 2^32 over the array's 32-bit words w: a sum of integers does not depend on how the array is
    cut over devices, and a single changed word always changes it.
    """
    names, leaves = zip(*_named_leaves(tree), strict=True) if _named_leaves(tree) else ((), ())
    sums = compiled_for_once(_sums_of_words)(leaves)
    return dict(zip(names, map(int, jax.device_get(sums)), strict=True))


def _sums_of_words(leaves: Sequence[jax.Array]) -> list[jax.Array]:
    return [_sum_of_words(leaf) for leaf in leaves]


def _sum_of_words(leaf: jax.Array) -> jax.Array:
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    if leaf.dtype == jnp.bool_:
        leaf = leaf.astype(jnp.uint8)
    if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        leaf = jnp.stack([leaf.real, leaf.imag])
    width = min(leaf.dtype.itemsize, 4)
    words = jax.lax.bitcast_convert_type(leaf, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[width]).astype(jnp.uint32)
    place, stride = jnp.zeros((), jnp.uint32), 1
    for axis in reversed(range(words.ndim)):
        index = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        place, stride = place + index * jnp.uint32(stride % 2**32), stride * words.shape[axis]
    return jnp.sum(words * (2 * place + 1), dtype=jnp.uint32)


def _name(key: Any) -> str:
    return str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key))))


def _named_leaves(tree: Any) -> list[tuple[str, Any]]:
    """Leaves with names like `params/blocks/0/mlp/kernel`; a variable adds nothing to its name."""
    variables = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda node: isinstance(node, nnx.Variable))[0]
    return [("/".join(map(_name, path)), leaf) for path, node in variables for leaf in jax.tree.leaves(node)]


def _by_name(tree: Any) -> dict[str, Any]:
    """Nested dicts of the leaves by their names."""
    nested: dict[str, Any] = {}
    for name, leaf in _named_leaves(tree):
        *parents, last = name.split("/")
        level = nested
        for parent in parents:
            level = level.setdefault(parent, {})
        level[last] = leaf
    return nested


def _leaves_in_order(nested: Mapping[str, Any], tree: Any) -> list[Any]:
    leaves = []
    for name, _ in _named_leaves(tree):
        level: Any = nested
        for part in name.split("/"):
            level = level[part]
        leaves.append(level)
    return leaves


def _as_stored(leaf: ShapeDtypeStruct) -> str:
    """Dtype and shape in words; random keys are stored as the integers behind them."""
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.eval_shape(jax.random.key_data, ShapeDtypeStruct(leaf.shape, leaf.dtype))
    return f"{leaf.dtype}{list(leaf.shape)}"


def _named_shapes(metadata: Any) -> dict[str, str]:
    """Dtypes and shapes in words, by name, from orbax's metadata of an item."""
    return {name: _as_stored(leaf) for name, leaf in _named_leaves(metadata)}


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error).strip() else 'no message'}"
