"""ViT-S/16 on ImageNet (ILSVRC 2012) from local files, 300 epochs.

    attnlab train imagenet_vit_small --data.path DIRECTORY

DIRECTORY has one directory per class in train/ and in val/. The images come from https://www.image-net.org
(registration needed); its validation archive has to be sorted into classes, which the development kit's ground truth
says. Any other images in such directories work as well. Batches of 1024 over a host of eight accelerators, or one with
`--train.accumulate 8`. Time and accuracy: not measured.
"""

from attnlab.data import Augment, ImageFolder, Loading
from attnlab.experiment import Experiment, ViTConfig
from attnlab.training import ClassificationTask, OptimizerConfig, TrainConfig

CONFIG = Experiment(
    model=ViTConfig(patch_size=16, features=384, depth=12, num_heads=6, mixer="softmax_attention", drop_path=0.1),
    data=ImageFolder(
        size=224,
        resize=256,
        scale="symmetric",
        augment=Augment(flip=True),
        loading=Loading(num_threads=8, worker_count=None),
    ),
    task=ClassificationTask(label_smoothing=0.1),
    train=TrainConfig(
        steps=None,
        epochs=300,
        batch_size=1024,
        eval_every=5000,
        checkpoint_every=5000,
        log_every=100,
        dtype="bfloat16",
        ema=0.9999,
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=10_000, weight_decay=0.1),
    ),
)
