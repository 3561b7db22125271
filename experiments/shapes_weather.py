"""A small TANet that takes haze, rain and snow off pictures of coloured shapes, one network for all three.

attnlab train shapes_weather --data.degradation haze
"""

from attnlab.data import DegradedImages, TaskData
from attnlab.experiment import Experiment, model_config
from attnlab.training import OptimizerConfig, RestorationTask, TrainConfig

CONFIG = Experiment(
    model=model_config("tanet.net", features=12, depth=2, residual_depth=1),
    data=DegradedImages(images=TaskData(task="captioned_shapes", train_size=8192), degradation="weather", strength=0.6),
    task=RestorationTask(),
    train=TrainConfig(
        steps=1000,
        batch_size=16,
        eval_batch_size=64,
        eval_every=250,
        checkpoint_every=500,
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=50),
    ),
)
