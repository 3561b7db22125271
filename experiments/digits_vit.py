"""A small vision transformer on scikit-learn's digit images.

attnlab train digits_vit
"""

from attnlab.data import Augment, Digits
from attnlab.experiment import Experiment, ViTConfig
from attnlab.training import ClassificationTask, OptimizerConfig, TrainConfig

CONFIG = Experiment(
    model=ViTConfig(patch_size=1, features=64, depth=4, num_heads=4, mixer="softmax_attention", mlp_ratio=2.0),
    data=Digits(scale="symmetric", augment=Augment(padding=1)),
    task=ClassificationTask(label_smoothing=0.1),
    train=TrainConfig(
        steps=600,
        batch_size=64,
        eval_batch_size=355,
        eval_every=100,
        checkpoint_every=200,
        log_every=10,
        ema=0.98,
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=60, weight_decay=0.05),
    ),
)
