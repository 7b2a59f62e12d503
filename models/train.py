r"""Trains, evaluates or exports one run.

For example, one run of the study:

    python -m models.train --workdir=runs/one \
        --config=configs/fashion_mnist.py:magnitude,sparsity=0.9

The run has its own directory in the work directory, named after its
fingerprint. If it is stopped and started again, it resumes from its newest
checkpoint. Exit codes: 0 for success; 1 for an error, whose message says what
to do; 75 and 130 if SIGTERM or Ctrl-C stopped it and it saved; 143 and 130 if a
second signal stopped it at once.
"""

import os
import sys
from collections.abc import Sequence

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from sos import startup

with startup.quiet():
    import tensorflow as tf

    # The first listing of devices warns about missing GPUs.
    tf.config.list_physical_devices()

import ml_collections
from absl import app, flags

from models.config_flag import ConfigFlag
from sos.errors import UsageError
from sos.experiments.config import resolve
from sos.experiments.runs import run, run_directory
from sos.experiments.task import make_task
from sos.training import flags as training_flags
from sos.training import main as training_main
from sos.training.strategies import several_workers
from sos.training.trainer import Trainer

_CONFIG = ConfigFlag()
flags.adopt_module_key_flags(training_flags)


def main(argv: Sequence[str]) -> None:
    """Trains, evaluates or exports a run.

    Args:
        argv: Arguments that are not flags.
    """
    code = training_main.exit_code_of(
        lambda: _run(argv[1:]), several_workers=several_workers()
    )
    training_main.end_process(code)


def _run(arguments: Sequence[str]) -> None:
    if arguments:
        raise UsageError(
            f"The program takes only flags. Received: {' '.join(arguments)}"
        )
    config = resolve(_CONFIG.config)
    workdir = training_flags.WORKDIR.value
    print(run_directory(config, workdir), file=sys.stderr)
    run(
        config,
        workdir,
        make_trainer=_make_trainer,
        **training_flags.option_values(),
    )


def _make_trainer(config: ml_collections.ConfigDict) -> Trainer:
    return training_flags.make_trainer(
        lambda: make_task(config),
        gradient_accumulation_steps=config.gradient_accumulation_steps,
    )


if __name__ == "__main__":
    app.run(main, flags_parser=_CONFIG.parse_flags)
