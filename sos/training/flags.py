"""absl flags of training programs, named as in Estimator.

They choose how a program runs. The task determines the result, except that
`--deterministic` and `--jit_compile` may change its rounding.

```
def main(argv):
    def train():
        options = flags.options(train_steps=1000)
        return run(options, lambda: flags.make_trainer(MyTask))

    end_process(exit_code_of(train))
```
"""

from collections.abc import Callable
from typing import Any

import tensorflow as tf
from absl import flags

from sos.training import strategies
from sos.training.main import MODES, Options
from sos.training.task import Task
from sos.training.trainer import Trainer

WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Directory of checkpoints, logs and exports. Training resumes from the "
    "newest checkpoint in it.",
    required=True,
)
MODE = flags.DEFINE_enum(
    "mode",
    "train_and_eval",
    MODES,
    "train; eval: evaluate every checkpoint in the work directory as it "
    "appears; train_and_eval; export: write the newest checkpoint, or the "
    "mean of several, for serving.",
)
STRATEGY = flags.DEFINE_enum(
    "strategy",
    None,
    strategies.STRATEGIES,
    "Distribution strategy. Default: the TPU with --tpu or on a TPU machine, "
    "multi_worker if TF_CONFIG lists several workers, else all GPUs, else the "
    "CPU.",
)
TPU = flags.DEFINE_string(
    "tpu", None, "Name or address of the TPU, or local for this machine's TPU."
)
CPU_REPLICAS = flags.DEFINE_integer(
    "cpu_replicas",
    None,
    "Number of replicas that share the CPU, to try the strategy mirrored on a "
    "machine without GPUs.",
    lower_bound=1,
)
STEPS_PER_LOOP = flags.DEFINE_integer(
    "steps_per_loop",
    100,
    "Maximum number of steps in one compiled loop. Summaries, checkpoints and "
    "evaluations run between loops.",
    lower_bound=1,
)
MAX_SECONDS_PER_LOOP = flags.DEFINE_float(
    "max_seconds_per_loop",
    10.0,
    "Approximate maximum duration of a compiled loop in seconds. Signals are "
    "handled between loops.",
)
JIT_COMPILE = flags.DEFINE_bool(
    "jit_compile",
    None,
    "Compile the training and evaluation steps with XLA. Default: only on a "
    "GPU.",
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
    "Number of newest checkpoints that are kept.",
    lower_bound=1,
)
KEEP_CHECKPOINT_EVERY = flags.DEFINE_integer(
    "keep_checkpoint_every_n_steps",
    None,
    "Also keep checkpoints whose step is a multiple of this number.",
    lower_bound=1,
)
STEPS_PER_EVAL = flags.DEFINE_integer(
    "steps_per_eval",
    None,
    "Steps between two evaluations in train_and_eval. The last step is always "
    "evaluated. Default: evaluate only that.",
    lower_bound=1,
)
EVAL_TIMEOUT = flags.DEFINE_float(
    "eval_timeout",
    None,
    "Seconds that eval waits for a new checkpoint. Default: forever.",
)
PROFILE_STEPS = flags.DEFINE_list(
    "profile_steps",
    None,
    "FIRST,LAST: first and last step of a profile for TensorBoard.",
)
DETERMINISTIC = flags.DEFINE_bool(
    "deterministic",
    False,
    "Make results bit-exact across runs, at some cost in speed.",
)


@flags.validator(PROFILE_STEPS.name)
def _check_steps(value: list[str] | None) -> bool:
    if value is None:
        return True
    if len(value) == 2 and all(part.strip().isdigit() for part in value):
        return True
    raise flags.ValidationError("must be two steps, such as 100,110")


def option_values() -> dict[str, Any]:
    """Returns the fields of `Options` that have a flag, except `workdir`.

    Pass them to `sos.experiments.run`, which chooses the directory of a run.
    """
    profile = PROFILE_STEPS.value
    return {
        "mode": MODE.value,
        "save_checkpoints_steps": SAVE_CHECKPOINTS_STEPS.value,
        "keep_checkpoint_max": KEEP_CHECKPOINT_MAX.value,
        "keep_checkpoint_every_n_steps": KEEP_CHECKPOINT_EVERY.value,
        "steps_per_eval": STEPS_PER_EVAL.value,
        "eval_timeout": EVAL_TIMEOUT.value,
        "profile_steps": profile and (int(profile[0]), int(profile[1])),
    }


def options(train_steps: int, **overrides: Any) -> Options:
    """Returns the `Options` that the flags select.

    Args:
        train_steps: Number of optimizer steps of the whole training.
        **overrides: Fields of `Options` that override the flags, or have no
            flag, such as `keep_checkpoint_steps`.

    Returns:
        The options.

    Raises:
        UsageError: If a flag has an invalid value.
    """
    values = {"workdir": WORKDIR.value, **option_values(), **overrides}
    return Options(train_steps=train_steps, **values)


def make_strategy() -> tf.distribute.Strategy:
    """Configures TensorFlow and returns the strategy that the flags select.

    Call it once, before anything else uses TensorFlow's devices.

    Returns:
        The strategy.

    Raises:
        UsageError: If flags contradict each other, or the TPU cannot be used.
    """
    if DETERMINISTIC.value:
        tf.config.experimental.enable_op_determinism()
    return strategies.make_strategy(
        STRATEGY.value, tpu=TPU.value, cpu_replicas=CPU_REPLICAS.value
    )


def make_trainer(
    make_task: Callable[[], Task],
    *,
    strategy: tf.distribute.Strategy | None = None,
    gradient_accumulation_steps: int = 1,
) -> Trainer:
    """Returns the trainer that the flags select.

    Args:
        make_task: Returns the task; called in the strategy's scope.
        strategy: The strategy. Default: that of `make_strategy`.
        gradient_accumulation_steps: Number of parts into which each replica's
            batch is split to save memory.

    Returns:
        The trainer.

    Raises:
        UsageError: If flags contradict each other, or the TPU cannot be used.
    """
    strategy = strategy or make_strategy()
    with strategy.scope():
        task = make_task()
    return Trainer(
        task,
        strategy=strategy,
        gradient_accumulation_steps=gradient_accumulation_steps,
        steps_per_loop=STEPS_PER_LOOP.value,
        max_seconds_per_loop=MAX_SECONDS_PER_LOOP.value,
        jit_compile=JIT_COMPILE.value,
    )
