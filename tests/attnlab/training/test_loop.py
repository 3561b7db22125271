"""The loop: exact resumption, interruption, refusal of what does not fit, and what a run leaves behind."""

import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from attnlab.training import (
    CheckpointError,
    CheckpointMismatch,
    ClassificationTask,
    ConfigMismatch,
    LanguageTask,
    NonFiniteError,
    OptimizerConfig,
    TrainingInterrupted,
    load_model,
    read_metrics,
    train,
)
from tests.attnlab.training.toy import Bigram, Classifier, Interposed, config, images, losses, signal_at, text

ROOT = Path(__file__).parents[3]
TASK = ClassificationTask(label_smoothing=0.1)


def run(directory, data=None, model=Classifier, **changes):
    return train(model, TASK, data or images(), config(**changes), directory, progress=False)


def assert_same_run(a, b):
    assert losses(a.history) == losses(b.history)
    assert a.metrics == b.metrics
    assert not same_metrics_steps_twice(b.history)
    leaves = zip(jax.tree.leaves(nnx.state(a.model)), jax.tree.leaves(nnx.state(b.model)), strict=True)
    for left, right in leaves:
        if jax.dtypes.issubdtype(left.dtype, jax.dtypes.prng_key):
            left, right = jax.random.key_data(left), jax.random.key_data(right)
        np.testing.assert_array_equal(left, right)


def same_metrics_steps_twice(history):
    seen = [(record["split"], record["step"]) for record in history]
    return len(seen) != len(set(seen))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Ten steps without interruption, dropout, batch norm and average included; an epoch ends at step 6.25."""
    directory = tmp_path_factory.mktemp("whole") / "run"
    return run(directory)


def test_learns(tmp_path):
    result = run(tmp_path, steps=100, checkpoint_every=None, eval_every=None)
    assert result.metrics["eval"]["accuracy"] > 0.9
    assert result.parameters == 16 * 16 + 2 * 16 + 16 * 4 + 4
    assert result.steps == 100 and result.steps_per_second > 0
    assert result.units_per_second == pytest.approx(8 * result.steps_per_second)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_interrupted_and_resumed_is_the_same_run_bit_for_bit(whole, tmp_path, number):
    with pytest.raises(TrainingInterrupted) as stopped:
        run(tmp_path, Interposed(images(), signal_at(6, number)))
    assert (stopped.value.step, stopped.value.code) == (6, 128 + number)
    assert max(losses(read_metrics(tmp_path / "metrics.jsonl"))) == 6
    # The interposed iterator wraps the position of the real one, so the wrapper resumes too.
    assert_same_run(whole, run(tmp_path, Interposed(images(), lambda _, batch: batch)))


def test_resumes_from_a_checkpoint_that_was_written_while_training_went_on(whole, tmp_path):
    run(tmp_path)
    (tmp_path / "checkpoints" / "10").rename(tmp_path / "gone")
    assert_same_run(whole, run(tmp_path))


def test_a_finished_run_is_not_trained_again(whole):
    again = train(Classifier, TASK, Unread(), config(), whole.directory, progress=False)
    assert_same_run(whole, again)
    assert again.seconds == pytest.approx(whole.seconds)


class Unread:
    """Data that is opened, and then not read."""

    def train(self, *args, **kwargs):
        return images().train(*args, **kwargs)


def test_same_seed_same_run_other_seed_another(whole, tmp_path):
    same = run(tmp_path / "same")
    other = run(tmp_path / "other", seed=1)
    assert_same_run(whole, same)
    assert losses(whole.history)[1] != losses(other.history)[1]


def test_metrics_file(whole):
    records = read_metrics(whole.directory / "metrics.jsonl")
    assert records == whole.history
    assert [r["step"] for r in records if r["split"] == "eval"] == [4, 8, 10]
    assert [r["step"] for r in records if r["split"] == "eval_ema"] == [4, 8, 10]
    assert set(records[0]) == {"step", "split", "values", "time"}
    assert set(records[0]["values"]) == {"loss", "accuracy", "grad_norm", "learning_rate"}
    assert whole.metrics["eval"] != whole.metrics["eval_ema"]


def test_padded_examples_do_not_count(whole, tmp_path):
    # 21 images: in batches of 8 three blank ones are added, in batches of 7 none.
    other = run(tmp_path, eval_batch_size=7)
    assert other.metrics["eval"] == pytest.approx(whole.metrics["eval"], rel=1e-5)


def test_load_model(whole):
    x = np.linspace(0, 1, 32, dtype=np.float32).reshape(2, 4, 4, 1)
    newest = load_model(Classifier, whole.directory)
    np.testing.assert_array_equal(newest(x), whole.model(x))
    raw, early = load_model(Classifier, whole.directory, ema=False), load_model(Classifier, whole.directory, step=5)
    assert not np.array_equal(raw(x), newest(x)) and not np.array_equal(early(x), newest(x))
    with pytest.raises(FileNotFoundError, match="no checkpoint 7; its steps are: 5, 10"):
        load_model(Classifier, whole.directory, step=7)
    with pytest.raises(FileNotFoundError, match="holds no run"):
        load_model(Classifier, whole.directory / "checkpoints")


def test_a_module_is_trained_from_its_parameters_and_stays_as_it_is(tmp_path):
    model = Classifier(dtype=np.float32, rngs=nnx.Rngs(5))
    before = np.array(model.head.kernel[...])
    result = run(tmp_path, model=model, steps=4)
    np.testing.assert_array_equal(model.head.kernel[...], before)
    assert not np.array_equal(result.model.head.kernel[...], before)
    with pytest.raises(ValueError, match="needs a function that builds the model"):
        run(tmp_path / "other", model=model, steps=4, dtype="bfloat16")


def test_unreadable_checkpoint_falls_back_with_a_warning_and_deletes_nothing(whole, tmp_path):
    run(tmp_path)
    newest = tmp_path / "checkpoints" / "10"
    for file in newest.rglob("d/*"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    files = sorted(path.name for path in newest.rglob("*"))
    with pytest.warns(UserWarning, match=r"step 10 .* cannot be read .*going back to step 5.*10\.unreadable"):
        again = run(tmp_path)
    assert_same_run(whole, again)
    assert sorted(path.name for path in (tmp_path / "checkpoints" / "10.unreadable").rglob("*")) == files


def test_no_readable_checkpoint_is_an_error(tmp_path):
    run(tmp_path, steps=4)
    for file in (tmp_path / "checkpoints").rglob("_METADATA"):
        file.write_text("{")
    with pytest.raises(CheckpointError, match=r"none of the checkpoints .* can be read .*step 4"):
        run(tmp_path, steps=4)
    assert (tmp_path / "checkpoints" / "4").is_dir()


def test_other_model_is_refused_by_the_name_of_the_parameter(tmp_path):
    run(tmp_path, steps=4)
    with pytest.raises(
        CheckpointMismatch, match=r"params/hidden/kernel is float32\[16, 16\] there and .*\[16, 20\] here"
    ):
        run(tmp_path, steps=4, model=functools.partial(Classifier, width=20))
    with pytest.raises(CheckpointMismatch, match=r"params/norm/bias float32\[16\] is in the checkpoint alone"):
        run(tmp_path, steps=4, model=functools.partial(Classifier, batch_norm=False))


def test_other_settings_are_refused_by_name(tmp_path):
    run(tmp_path, steps=4)
    with pytest.raises(ConfigMismatch, match=r"train.batch_size was 8 and is now 16; train.optimizer.name was 'adamw'"):
        run(
            tmp_path,
            steps=4,
            batch_size=16,
            optimizer=OptimizerConfig("lion", learning_rate=1e-2, schedule="constant", warmup_steps=4),
        )
    with pytest.raises(ConfigMismatch, match=r"experiment.mixer was .* and is now 'softmax'"):
        train(Classifier, TASK, images(), config(steps=4), tmp_path, experiment={"mixer": "softmax"}, progress=False)
    assert run(tmp_path, steps=5, checkpoint_every=1, eval_batch_size=4).steps == 5
    assert json.loads((tmp_path / "config.json").read_text())["train"]["steps"] == 5
    (tmp_path / "config.json").write_text('{"train": ')
    for call in (lambda: run(tmp_path, steps=5), lambda: load_model(Classifier, tmp_path)):
        with pytest.raises(ValueError, match=r"config.json is damaged .* cannot be read. Restore it"):
            call()


def test_going_on_with_more_steps_keeps_the_schedule(tmp_path):
    optimizer = OptimizerConfig(learning_rate=1e-2, schedule="linear", end_fraction=0.25)
    options = {"optimizer": optimizer, "eval_every": None, "checkpoint_every": None}
    run(tmp_path, steps=4, **options)
    with pytest.warns(UserWarning, match=r"linear schedule .* over 4 steps: .* to step 6 .* 0.0025.*decay_steps=6"):
        result = run(tmp_path, steps=6, **options)
    rates = [record["values"]["learning_rate"] for record in result.history if record["split"] == "train"]
    np.testing.assert_allclose(rates, [1e-2, 7.5e-3, 5e-3, 2.5e-3, 2.5e-3, 2.5e-3], rtol=1e-5)
    stretched = dataclasses.replace(optimizer, decay_steps=8)
    history = run(tmp_path, steps=7, **options | {"optimizer": stretched}).history
    last = [record["values"]["learning_rate"] for record in history if record["split"] == "train"][-1]
    assert last == pytest.approx(1e-2 * (1 - 0.75 * 6 / 7))


def test_non_finite_loss_stops_and_keeps_the_last_good_checkpoint(tmp_path):
    def spoil(count, batch):
        return {**batch, "image": batch["image"] * np.float32("nan")} if count == 7 else batch

    with pytest.raises(NonFiniteError, match=r"step 7: the loss is nan.*the last good checkpoint is that of step 6"):
        run(tmp_path, Interposed(images(), spoil), checkpoint_every=1)
    # The newest two, and that of the only evaluation, which is therefore the best.
    assert sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == [4, 5, 6]
    assert max(losses(read_metrics(tmp_path / "metrics.jsonl"))) == 6


def test_parameters_that_overflow_at_a_finite_loss_are_not_saved(tmp_path):
    optimizer = OptimizerConfig(learning_rate=1e39, schedule="constant")
    with pytest.raises(NonFiniteError, match=r"not finite after the update.*no checkpoint had been saved"):
        run(tmp_path, steps=1, optimizer=optimizer)
    assert not list((tmp_path / "checkpoints").iterdir())


@pytest.mark.parametrize("pack", [True, False])
def test_language(tmp_path, pack):
    task = LanguageTask(sequence_length=16)
    settings = config(steps=None, epochs=3, eval_every=5, checkpoint_every=None)
    result = train(Bigram, task, text(pack=pack), settings, tmp_path, progress=False)
    # 8 documents of 41..48 bytes and an end each: 364 tokens, 23 windows of 16.
    assert result.steps == 9
    values = result.metrics["eval"]
    assert values["bits_per_byte"] == pytest.approx(values["loss"] / np.log(2))
    assert values["perplexity"] == pytest.approx(np.exp(values["loss"]))
    assert losses(result.history)[9] < losses(result.history)[1]


def test_bfloat16_computes_in_bfloat16_with_float32_parameters(tmp_path, whole):
    seen = []

    class Watched(Classifier):
        def __call__(self, images, *, deterministic=True):
            y = super().__call__(images, deterministic=deterministic)
            seen.append(y.dtype)
            return y

    result = run(tmp_path, model=Watched, dtype="bfloat16")
    assert set(seen) == {np.dtype("bfloat16")}
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(result.model, nnx.Param))} == {np.dtype("float32")}
    assert losses(result.history)[1] == pytest.approx(losses(whole.history)[1], rel=2e-2)


def test_data_of_another_task_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match="needs batches with image, label, weight: image, label is missing among inputs"
    ):
        train(Classifier, TASK, TextForImages(), config(steps=4), tmp_path, progress=False)


class TextForImages:
    def train(self, batch_size, seed):
        return text().train(batch_size, seed, sequence_length=16)


def test_a_signal_between_the_batches_of_an_evaluation(tmp_path, whole):
    """It stops there; the state is saved, and the evaluation made up for."""

    class Signalled(Interposed):
        seen = 0

        def eval(self, *args, **kwargs):
            for batch in self.data.eval(*args, **kwargs):
                self.seen += 1
                if self.seen == self.at:
                    os.kill(os.getpid(), signal.SIGTERM)
                yield batch

    for at, step in ((2, 4), (8, 10)):  # an evaluation has 3 batches, after the steps 4, 8 and 10
        data = Signalled(images(), lambda _, batch: batch)
        data.at = at
        with pytest.raises(TrainingInterrupted) as stopped:
            run(tmp_path / str(at), data=data)
        assert (stopped.value.step, data.seen) == (step, at)
        assert_same_run(whole, run(tmp_path / str(at), data=Interposed(images(), data.act)))


def test_an_infinite_perplexity_is_a_number_like_others(tmp_path):
    class Sure(Bigram):
        def __call__(self, *args, **kwargs):
            return 1e4 * super().__call__(*args, **kwargs)

    task = LanguageTask(sequence_length=16)
    for _ in range(2):  # the second call reads it from the file
        result = train(Sure, task, text(), config(steps=4), tmp_path, progress=False)
        assert result.metrics["eval"]["perplexity"] == np.inf
        assert f"{result.metrics['eval']['perplexity']:.4g}" == "inf"


def test_tensorboard(tmp_path):
    run(tmp_path, steps=4, tensorboard=True)
    events = list((tmp_path / "tensorboard").iterdir())
    assert len(events) == 1 and b"eval/accuracy" in events[0].read_bytes()


@pytest.mark.slow
def test_a_program_that_is_signalled_saves_exits_and_goes_on(tmp_path):
    command = [sys.executable, "-m", "tests.attnlab.training.toy", str(tmp_path), "slow"]
    options = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    program = subprocess.Popen(command, **options)
    for line in program.stdout:
        if line == "batch 3\n":
            break
    time.sleep(0.05)
    program.send_signal(signal.SIGTERM)
    _, errors = program.communicate(timeout=60)
    assert program.returncode == 143
    assert "Traceback" not in errors
    assert "stopped by SIGTERM" in errors and "goes on from there" in errors
    steps = [int(path.name) for path in (tmp_path / "checkpoints").iterdir()]
    assert steps and max(steps) in (3, 4)
    again = subprocess.run(command, **{**options, "timeout": 120, "check": True})
    assert f"going on from step {max(steps)} of 8" in again.stderr
    assert f"batch {max(steps) + 1}\n" in again.stdout and "batch 3\n" not in again.stdout
    assert len(json.loads(again.stdout.splitlines()[-1])["losses"]) == 8


def test_chosen_parameters_alone_are_trained(tmp_path):
    """The others stay what they were to the bit, through a checkpoint too, though weights would decay."""
    start = Classifier(dtype=np.float32, rngs=nnx.Rngs(1))
    only_head = nnx.All(nnx.Param, nnx.PathContains("head"))
    settings = config(steps=4, eval_every=None, checkpoint_every=None)
    result = train(start, TASK, images(), settings, tmp_path, trainable=only_head, progress=False)
    assert result.parameters == 16 * 4 + 4
    loaded = load_model(start, tmp_path, trainable=only_head)
    for model in (result.model, loaded):
        np.testing.assert_array_equal(model.hidden.kernel[...], start.hidden.kernel[...])
        assert not np.array_equal(model.head.kernel[...], start.head.kernel[...])
    assert not np.array_equal(result.model.norm.mean[...], start.norm.mean[...])  # statistics go on
    with pytest.raises(ValueError, match="trainable chooses none"):
        train(start, TASK, images(), settings, tmp_path / "no", trainable=nnx.PathContains("hed"), progress=False)
