"""A small vision transformer on pictures of one or two coloured shapes: which is the first?

    attnlab train shapes_vit --model.mixer softmax_attention

Twenty classes, the colour and shape of the object on the left or above. Captions stand beside the labels.
"""

from attnlab.data import TaskData
from attnlab.experiment import Experiment, ViTConfig
from attnlab.training import ClassificationTask, OptimizerConfig, TrainConfig

CONFIG = Experiment(
    model=ViTConfig(patch_size=4, features=64, depth=3, num_heads=4, mixer="softmax_attention", mlp_ratio=2.0),
    data=TaskData(task="captioned_shapes", train_size=8192),
    task=ClassificationTask(),
    train=TrainConfig(
        steps=1000,
        batch_size=64,
        eval_batch_size=256,
        eval_every=250,
        checkpoint_every=500,
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=50, weight_decay=0.1),
    ),
)
