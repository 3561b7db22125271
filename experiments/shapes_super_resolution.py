"""A small CATANet that makes pictures of coloured shapes twice as fine.

    attnlab train shapes_super_resolution

Its attention is in groups of alike tokens: `--model.group-size` and `--model.num-centres` say how many.
"""

from attnlab.data import DegradedImages, TaskData
from attnlab.experiment import Experiment, model_config
from attnlab.training import OptimizerConfig, RestorationTask, TrainConfig

CONFIG = Experiment(
    model=model_config(
        "catanet.net",
        features=16,
        qk_features=16,
        mlp_features=24,
        num_heads=2,
        patch_size=(8, 10),
        iterations=(3, 3),
        num_centres=(8, 16),
        group_size=(64, 32),
    ),
    data=DegradedImages(images=TaskData(task="captioned_shapes", train_size=8192), degradation="downscale", factor=2),
    task=RestorationTask(border=2),
    train=TrainConfig(
        steps=1000,
        batch_size=16,
        eval_batch_size=64,
        eval_every=250,
        checkpoint_every=500,
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=50),
    ),
)
