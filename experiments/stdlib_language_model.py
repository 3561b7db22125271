"""A small byte-level language model on a million bytes of the sources of Python's standard library.

    attnlab train stdlib_language_model

Measured with Python 3.11.7 on 2 CPU cores: 2.48 bits per byte after 55 s of training, compilation not counted; softmax
attention with rotary positions 2.23 after 58 s. `make demo` trains both. The text, and with it the numbers, differ
between versions of Python.
"""

from attnlab.data import StdlibText
from attnlab.experiment import Experiment, LanguageModelConfig
from attnlab.training import LanguageTask, OptimizerConfig, TrainConfig

CONFIG = Experiment(
    model=LanguageModelConfig(
        features=96,
        depth=3,
        num_heads=4,
        mixer="lightning_attention_2",
    ),
    data=StdlibText(max_bytes=1_000_000),
    task=LanguageTask(sequence_length=128),
    train=TrainConfig(
        steps=500,
        batch_size=16,
        eval_batch_size=64,
        eval_every=100,
        checkpoint_every=250,
        log_every=5,
        optimizer=OptimizerConfig(learning_rate=4e-3, warmup_steps=30, weight_decay=0.1),
    ),
)
