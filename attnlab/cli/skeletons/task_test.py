import numpy as np

from attnlab.cli.skeletons.task import Skeleton


def test_targets_are_the_greatest_so_far():
    task = Skeleton(length=5, vocab_size=9)
    assert (task.oracle(np.asarray([[3, 1, 4, 1, 5]])) == [[3, 3, 4, 4, 5]]).all()
    batch = task.sample(np.random.default_rng(0), 7)
    assert batch["inputs"].shape == (7, 5) and batch["inputs"].max() < 9
    assert (batch["targets"] == task.oracle(batch["inputs"])).all()
