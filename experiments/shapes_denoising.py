"""A small RAT that takes the noise off pictures of coloured shapes, attending inside regions of like brightness.

    attnlab train shapes_denoising --data.strength 0.3

The regions are those of the noisy picture; `--task.focal 0.001` stresses those with the largest errors.
"""

from attnlab.data import DegradedImages, TaskData
from attnlab.experiment import Experiment, model_config
from attnlab.training import OptimizerConfig, RestorationTask, TrainConfig

CONFIG = Experiment(
    model=model_config(
        "rat_region_attention.net",
        features=16,
        middle_depth=2,
        layers=1,
        encoder_depths=(1,),
        decoder_depths=(1,),
        num_heads=4,
    ),
    data=DegradedImages(images=TaskData(task="captioned_shapes", train_size=8192), degradation="noise", regions=6),
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
