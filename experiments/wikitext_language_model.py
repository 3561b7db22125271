"""A byte-level language model on WikiText-103's raw files, or on any plain text.

    attnlab train wikitext_language_model --data.path wiki.train.raw --data.eval_path wiki.valid.raw

The raw files come with the WikiText language modelling dataset (Merity et al., 2016, arXiv:1609.07843), which
Salesforce Research published. Three layers of lightning attention to one of softmax attention. Meant for one GPU or
TPU. Time and bits per byte: not measured.
"""

from attnlab.data import TextFiles
from attnlab.experiment import Experiment, LanguageModelConfig
from attnlab.training import LanguageTask, OptimizerConfig, TrainConfig

CONFIG = Experiment(
    model=LanguageModelConfig(
        features=512,
        depth=12,
        num_heads=8,
        mixer=("lightning_attention_2", "lightning_attention_2", "lightning_attention_2", "softmax_attention"),
        mixer_options={"softmax_attention": {"rotary": 10_000.0}},
    ),
    data=TextFiles(path="wiki.train.raw", eval_path="wiki.valid.raw"),
    task=LanguageTask(sequence_length=1024),
    train=TrainConfig(
        steps=50_000,
        batch_size=64,
        eval_every=2000,
        checkpoint_every=2000,
        log_every=50,
        dtype="bfloat16",
        optimizer=OptimizerConfig(learning_rate=6e-4, warmup_steps=1000, end_fraction=0.1, weight_decay=0.1, b2=0.95),
    ),
)
