"""A small language model on multi-query associative recall: eight keys and values, then the keys again.

    attnlab train recall --model.mixer lightning_attention_2

Accuracy counts the values alone. Other tasks by their names, as `attnlab list --kind task` prints them:
--data.task selective_copying, --data.task induction, --data.task needle, each with its settings in --data.options.
"""

from attnlab.data import TaskData
from attnlab.experiment import Experiment, LanguageModelConfig
from attnlab.training import LanguageTask, OptimizerConfig, TrainConfig

CONFIG = Experiment(
    model=LanguageModelConfig(features=64, depth=2, num_heads=1, mixer="softmax_attention"),
    data=TaskData(task="multi_query_recall", options=("vocab_size=64", "pairs=8")),
    task=LanguageTask(sequence_length=64),
    train=TrainConfig(
        steps=2000,
        batch_size=64,
        eval_batch_size=256,
        eval_every=250,
        checkpoint_every=1000,
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=100, weight_decay=0.1),
    ),
)
