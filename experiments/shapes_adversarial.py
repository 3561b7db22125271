"""A small CrossViT on pictures of one coloured shape, turned by quarters and perturbed against it in training.

    attnlab train shapes_adversarial --task.epsilon 0.03

The recipe of Berrios and Deza (2022, arXiv:2203.06649), who went on from CrossViT-18† so: Adam at 8e-5, weight decay
1e-4, batches of 64, 6 epochs. Beside `accuracy`, `robust_accuracy` is that under a step along the gradient's signs.
`--task.epsilon 1e-9 --task.turns False` trains without both.
"""

from attnlab.data import TaskData
from attnlab.experiment import Experiment, model_config
from attnlab.training import AdversarialTask, OptimizerConfig, TrainConfig

CONFIG = Experiment(
    model=model_config(
        "crossvit_dual_stream.backbone",
        features=(32, 64),
        num_heads=(4, 4),
        depths=((1, 2, 0),),
        mlp_ratios=(2.0, 2.0),
        image_scales=(1.0, 0.75),
        patch_sizes=(4, 6),
    ),
    data=TaskData(task="captioned_shapes", options=("objects=1",), train_size=8192),
    task=AdversarialTask(),
    train=TrainConfig(
        steps=1000,
        batch_size=64,
        eval_batch_size=256,
        eval_every=250,
        checkpoint_every=500,
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=50, weight_decay=1e-4),
    ),
)
