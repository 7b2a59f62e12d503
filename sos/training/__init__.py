"""The training engine: estimator-style, on tf.distribute, losing no step."""

from sos.training.checkpoints import Checkpoints
from sos.training.inputs import (
    Shard,
    array_batches,
    array_eval_batches,
    list_shards,
    record_batches,
    record_eval_batches,
)
from sos.training.learning_rates import make_learning_rate
from sos.training.main import Options, end_process, exit_code_of, run
from sos.training.optimizers import make_optimizer
from sos.training.reporting import (
    Console,
    JsonLines,
    MaskUpdate,
    ProgressBar,
    Summary,
    TensorBoard,
    read_summaries,
)
from sos.training.signals import StopRequest
from sos.training.strategies import make_strategy
from sos.training.task import Task
from sos.training.trainer import Action, Trainer

__all__ = [
    "Action",
    "Checkpoints",
    "Console",
    "JsonLines",
    "MaskUpdate",
    "Options",
    "ProgressBar",
    "Shard",
    "StopRequest",
    "Summary",
    "Task",
    "TensorBoard",
    "Trainer",
    "array_batches",
    "array_eval_batches",
    "end_process",
    "exit_code_of",
    "list_shards",
    "make_learning_rate",
    "make_optimizer",
    "make_strategy",
    "read_summaries",
    "record_batches",
    "record_eval_batches",
    "run",
]
