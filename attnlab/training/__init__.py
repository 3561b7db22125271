"""Training: one loop for every model and task, resumable to the step, from one CPU to many devices.

See `attnlab.training.loop`; orbax, tensorboardX and rich are imported when they are first needed.
"""

from attnlab.training.checkpoint import CheckpointError, CheckpointMismatch
from attnlab.training.config import ConfigMismatch, TrainConfig
from attnlab.training.interrupt import TrainingInterrupted
from attnlab.training.loop import NonFiniteError, TrainResult, load_model, train
from attnlab.training.metrics import read_metrics
from attnlab.training.optimizer import OPTIMIZERS, OptimizerConfig
from attnlab.training.sharding import MeshConfig, mesh_from
from attnlab.training.task import (
    AdversarialTask,
    ClassificationTask,
    LanguageTask,
    RegressionTask,
    RestorationTask,
    Task,
)

__all__ = [
    "OPTIMIZERS",
    "AdversarialTask",
    "CheckpointError",
    "CheckpointMismatch",
    "ClassificationTask",
    "ConfigMismatch",
    "LanguageTask",
    "MeshConfig",
    "NonFiniteError",
    "OptimizerConfig",
    "RegressionTask",
    "RestorationTask",
    "Task",
    "TrainConfig",
    "TrainResult",
    "TrainingInterrupted",
    "load_model",
    "mesh_from",
    "read_metrics",
    "train",
]
