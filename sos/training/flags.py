"""The flags of training binaries, by the names that Estimator users know."""

from collections.abc import Callable

import keras
import tensorflow as tf
from absl import flags

from sos.training.main import MODES, Options
from sos.training.strategies import STRATEGIES, make_strategy
from sos.training.task import Task
from sos.training.trainer import Trainer

WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Directory for checkpoints, logs and exports. A training that was stopped "
    "goes on from what is there.",
    required=True,
)
MODE = flags.DEFINE_enum(
    "mode",
    "train_and_eval",
    MODES,
    "train; eval: evaluate every checkpoint in the work directory as it "
    "appears; train_and_eval; export: write the newest checkpoint as a "
    "SavedModel.",
)
STRATEGY = flags.DEFINE_enum(
    "strategy",
    None,
    STRATEGIES,
    "Devices to train on. Default: what the machine has.",
)
TPU = flags.DEFINE_string(
    "tpu", None, "Name or address of the TPU; local for that of this machine."
)
BFLOAT16 = flags.DEFINE_bool(
    "bfloat16", False, "Compute in bfloat16; weights stay float32."
)
STEPS_PER_LOOP = flags.DEFINE_integer(
    "steps_per_loop",
    100,
    "Steps that the devices run between two looks of the host.",
    lower_bound=1,
)
MAX_SECONDS_PER_LOOP = flags.DEFINE_float(
    "max_seconds_per_loop",
    10.0,
    "Seconds after which the host looks at the latest, about: a signal waits "
    "for it.",
)
GRADIENT_ACCUMULATION_STEPS = flags.DEFINE_integer(
    "gradient_accumulation_steps",
    1,
    "Parts, one after the other, into which each replica's batch is cut to "
    "save memory; their gradients are accumulated.",
    lower_bound=1,
)
SYNCHRONIZED_BATCH_NORM = flags.DEFINE_bool(
    "synchronized_batch_norm",
    False,
    "Batch statistics over all replicas, not of each by itself.",
)
SAVE_CHECKPOINTS_STEPS = flags.DEFINE_integer(
    "save_checkpoints_steps",
    1000,
    "Steps between two checkpoints.",
    lower_bound=1,
)
KEEP_CHECKPOINT_MAX = flags.DEFINE_integer(
    "keep_checkpoint_max",
    5,
    "The newest checkpoints that are kept.",
    lower_bound=1,
)
KEEP_CHECKPOINT_EVERY = flags.DEFINE_integer(
    "keep_checkpoint_every_n_steps",
    None,
    "Keep checkpoints for good whose step is a multiple of it.",
    lower_bound=1,
)
STEPS_PER_EVAL = flags.DEFINE_integer(
    "steps_per_eval",
    1000,
    "Steps between two evaluations in train_and_eval.",
    lower_bound=1,
)
EVAL_TIMEOUT = flags.DEFINE_float(
    "eval_timeout",
    None,
    "Seconds without a new checkpoint after which eval gives up. Default: "
    "never.",
)
PROFILE_STEPS = flags.DEFINE_list(
    "profile_steps",
    None,
    "FIRST,LAST: steps between which a profile for TensorBoard is taken.",
)
DETERMINISTIC = flags.DEFINE_bool(
    "deterministic",
    False,
    "The same bits in every run, at some cost in speed.",
)


@flags.validator(PROFILE_STEPS.name)
def _two_steps(value: list[str] | None) -> bool:
    if value is None:
        return True
    if len(value) == 2 and all(part.strip().isdigit() for part in value):
        return True
    raise flags.ValidationError("must be two steps, such as 100,110")


def settings(train_steps: int) -> Options:
    """How to run, as the flags say.

    Args:
        train_steps: The number of steps of the whole training.

    Raises:
        ValueError: If a flag has a wrong value.
    """
    profile = PROFILE_STEPS.value
    return Options(
        mode=MODE.value,
        workdir=WORKDIR.value,
        train_steps=train_steps,
        save_checkpoints_steps=SAVE_CHECKPOINTS_STEPS.value,
        keep_checkpoint_max=KEEP_CHECKPOINT_MAX.value,
        keep_checkpoint_every_n_steps=KEEP_CHECKPOINT_EVERY.value,
        steps_per_eval=STEPS_PER_EVAL.value,
        eval_timeout=EVAL_TIMEOUT.value,
        profile_steps=profile and (int(profile[0]), int(profile[1])),
    )


def make_trainer(make_task: Callable[[], Task]) -> Trainer:
    """Makes the trainer that the flags ask for, under their strategy.

    Args:
        make_task: Makes the task; called in the strategy's scope.

    Raises:
        ValueError: If flags do not go together.
        RuntimeError: If the TPU cannot be used.
    """
    if DETERMINISTIC.value:
        tf.config.experimental.enable_op_determinism()
    # This graph rewriter fails on noise between a bias and its activation, with
    # an error message and no other effect.
    tf.config.optimizer.set_experimental_options({"remapping": False})
    strategy = make_strategy(STRATEGY.value, tpu=TPU.value)
    if BFLOAT16.value:
        keras.config.set_dtype_policy("mixed_bfloat16")
    with strategy.scope():
        task = make_task()
    return Trainer(
        task,
        strategy=strategy,
        gradient_accumulation_steps=GRADIENT_ACCUMULATION_STEPS.value,
        steps_per_loop=STEPS_PER_LOOP.value,
        max_seconds_per_loop=MAX_SECONDS_PER_LOOP.value,
    )
