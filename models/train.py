r"""Trains one network with one technique, for as long as it takes.

For example, one of the runs of the study, on whatever devices there are:

    python -m models.train --config=configs/fashion_mnist.py \
        --run=magnitude_sparsity-0.9_seed-0 --workdir=runs/magnitude_90

Stop it at any time and start it again: it goes on from its last checkpoint.
Exit codes: 0 done; 75 stopped by SIGTERM and saved, 130 by Ctrl-C and saved;
143 and 130 at once, after a second signal; 1 an error, which is told.
"""

import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from absl import app, flags, logging

from models import config_flag
from models.config_flag import define_config, parse_flags

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from sos import startup

with startup.quiet():
    import tensorflow as tf

    from models import networks
    from sos.experiments.classification import Classification
    from sos.experiments.runs import Run, expand
    from sos.training import flags as training_flags
    from sos.training import main

    tf.config.list_physical_devices()

_CONFIG = define_config()
_RUN = flags.DEFINE_string(
    "run",
    "",
    "The run of the config, by the beginning of its name. Not needed if the "
    "config has one run only.",
)
flags.adopt_module_key_flags(config_flag)
flags.adopt_module_key_flags(training_flags)
# TensorFlow tells of every save and of every sum over workers.
flags.FLAGS.set_default("verbosity", logging.WARNING)


def main(argv: Sequence[str]) -> None:
    """Trains, evaluates or exports, as the flags say.

    Args:
        argv: What is left of the command line.
    """
    if argv[1:]:
        _fail(f"There are only flags here. Received: {' '.join(argv[1:])}")
    try:
        sys.exit(_run())
    except KeyboardInterrupt:
        print("\nInterrupted before training began.", file=sys.stderr)
        sys.exit(130)


def _run() -> int:
    config = _CONFIG.value
    try:
        data = networks.load_data(config.dataset)
        run = _choose(
            expand(config, train_examples=len(data.y_train)), _RUN.value
        )
        synchronized = training_flags.SYNCHRONIZED_BATCH_NORM.value
        build_model = networks.builder(config.model, synchronized)
        settings = training_flags.settings(run.steps)
    except (ValueError, FileNotFoundError) as error:
        _fail(str(error))
    return main.run(
        settings,
        lambda: training_flags.make_trainer(
            lambda: Classification(
                run,
                data,
                build_model,
                settings={"synchronized_batch_norm": synchronized},
            )
        ),
    )


def _choose(runs: Sequence[Run], prefix: str) -> Run:
    matches = [run for run in runs if run.name.startswith(prefix)]
    if len(matches) != 1:
        names = "".join(f"\n  {run.name}" for run in (matches or runs)[:60])
        raise ValueError(
            f"--run must be the beginning of one name, not of {len(matches)}. "
            f"Received: --run={prefix}. Runs of the config:{names}"
        )
    return matches[0]


def _fail(message: str) -> NoReturn:
    sys.exit(f"FATAL {message}")


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
