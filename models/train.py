r"""Trains one run, for as long as it takes.

For example, one of the runs of the study, on whatever devices there are:

    python -m models.train --workdir=runs/one \
        --config=configs/fashion_mnist.py:magnitude,sparsity=0.9

The run has a directory of its own in the work directory, named after what
identifies it. Stop it at any time and start it again: it goes on from its last
checkpoint. Exit codes: 0 done; 75 stopped by SIGTERM and saved, 130 by Ctrl-C
and saved; 143 and 130 at once, after a second signal; 1 an error, whose message
says what to do.
"""

import os
import sys
from collections.abc import Sequence

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from sos import startup

with startup.quiet():
    import tensorflow as tf

    # The first listing names the GPUs that are missing.
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
    """Trains, evaluates or exports a run, as the flags say.

    Args:
        argv: What is left of the command line.
    """
    code = training_main.exit_code_of(
        lambda: _run(argv[1:]), several_workers=several_workers()
    )
    training_main.end_process(code)


def _run(arguments: Sequence[str]) -> None:
    if arguments:
        raise UsageError(
            f"There are only flags here. Received: {' '.join(arguments)}"
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
