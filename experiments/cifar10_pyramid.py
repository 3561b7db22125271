"""A four-stage pyramid vision transformer on CIFAR-10: agent attention in the large stages, softmax in the small ones.

    attnlab train cifar10_pyramid --data.path DIRECTORY

DIRECTORY as for `cifar10_vit`. Meant for one GPU or TPU. Time and accuracy: not measured.
"""

import dataclasses

from attnlab.experiment import PyramidViTConfig
from experiments import cifar10_vit

CONFIG = dataclasses.replace(
    cifar10_vit.CONFIG,
    model=PyramidViTConfig(
        patch_size=2,
        features=(64, 128, 192, 256),
        depths=(2, 2, 4, 2),
        num_heads=(2, 4, 6, 8),
        mixer=("agent_attention", "agent_attention", "softmax_attention", "softmax_attention"),
        drop_path=0.1,
    ),
)
