"""A sequence model on in-context linear regression: 40 examples of a line in five dimensions, then a query.

    attnlab train in_context_regression --model.mixer softmax_attention

The loss is the squared error. Ridge regression, which knows the variance of the noise, reaches 0.113; a prediction of
0 has 1.1.
"""

from attnlab.data import TaskData
from attnlab.experiment import Experiment, SequenceRegressorConfig
from attnlab.training import OptimizerConfig, RegressionTask, TrainConfig

CONFIG = Experiment(
    model=SequenceRegressorConfig(features=64, depth=3, num_heads=4, mixer="softmax_attention"),
    data=TaskData(task="icl_linear_regression.regression"),
    task=RegressionTask(),
    train=TrainConfig(
        steps=2000,
        batch_size=64,
        eval_batch_size=256,
        eval_every=250,
        checkpoint_every=1000,
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=100, weight_decay=0.0),
    ),
)
