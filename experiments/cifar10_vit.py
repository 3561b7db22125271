"""A vision transformer on CIFAR-10.

    attnlab train cifar10_vit --data.path DIRECTORY

DIRECTORY holds the "CIFAR-10 binary version" of https://www.cs.toronto.edu/~kriz/cifar.html, unpacked. Meant for one
GPU or TPU. Time and accuracy: not measured.
"""

from attnlab.data import Augment, Cifar10
from attnlab.experiment import Experiment, ViTConfig
from attnlab.training import ClassificationTask, OptimizerConfig, TrainConfig

CONFIG = Experiment(
    model=ViTConfig(patch_size=4, features=256, depth=8, num_heads=8, mixer="softmax_attention", drop_path=0.1),
    data=Cifar10(scale="symmetric", augment=Augment(padding=4, flip=True)),
    task=ClassificationTask(label_smoothing=0.1),
    train=TrainConfig(
        steps=None,
        epochs=100,
        batch_size=256,
        eval_batch_size=1000,
        eval_every=1000,
        checkpoint_every=1000,
        log_every=50,
        dtype="bfloat16",
        ema=0.999,
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=1000, weight_decay=0.05),
    ),
)
