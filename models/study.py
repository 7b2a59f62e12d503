r"""Trains a network with every technique and compares them.

For example, with fewer steps than the config has:

    python -m models.study --config=configs/fashion_mnist.py \
        --workdir=runs/fashion_mnist --config.steps=300
"""

import os
import pathlib
import sys
from collections.abc import Sequence
from typing import NoReturn

from absl import app, flags

from models import config_flag
from models.config_flag import define_config, parse_flags

_CONFIG = define_config()
flags.adopt_module_key_flags(config_flag)
_WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Directory for results.csv, the figures and a file for each finished run. "
    "What is finished there is not run again.",
    required=True,
)
_AGAIN = (
    "Run the same command again to continue: what is finished is not repeated."
)


def main(argv: Sequence[str]) -> None:
    """Runs the study that the flags ask for.

    Args:
        argv: What is left of the command line.
    """
    if argv[1:]:
        _fail(f"There are only flags here. Received: {' '.join(argv[1:])}")
    if not _WORKDIR.value:
        _fail("--workdir must name a directory. Received: an empty text")
    try:
        _study()
    except KeyboardInterrupt:
        # While networks are built.
        print(f"\nInterrupted. {_AGAIN}", file=sys.stderr)
        sys.exit(130)


def _study() -> None:
    # TensorFlow takes seconds to load, and wrong flags are refused before.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    from sos import startup

    with startup.quiet():
        import tensorflow as tf

        from models import networks
        from sos.errors import Stopped, in_a_line
        from sos.experiments import progress, runs, study
        from sos.training.signals import StopRequest, exit_code

        tf.config.list_physical_devices()
    # The runs of every shape have functions of their own to trace, of which
    # TensorFlow warns.
    tf.get_logger().setLevel("ERROR")
    # The same command gives the same numbers.
    tf.config.experimental.enable_op_determinism()
    # This graph rewriter fails on noise between a bias and its activation, with
    # an error message and no other effect.
    tf.config.optimizer.set_experimental_options({"remapping": False})

    config = _CONFIG.value
    shown = progress.Progress()
    try:
        data = networks.load_data(config.dataset)
        with StopRequest() as stop:
            results = study.run_study(
                runs.expand(config, train_examples=len(data.y_train)),
                data=data,
                build_model=networks.builder(config.model),
                workdir=pathlib.Path(_WORKDIR.value).expanduser(),
                progress=shown,
                layerwise_sparsity=config.layerwise_sparsity,
                stop=stop,
            )
    except Stopped as stopped:
        print(f"{stopped} {_AGAIN}", file=sys.stderr)
        sys.exit(exit_code(stopped.signal))
    except Exception as error:
        told = in_a_line(error, packages=("sos", "models"))
        if told is None:
            raise
        _fail(told)
    shown.console.print(progress.summary(results))
    shown.console.print()
    for path in (results.table, results.tradeoff, results.layerwise):
        shown.console.print(f"Wrote {path}", soft_wrap=True)
    if results.others:
        shown.console.print(
            f"{results.others} runs of other settings in {results.workdir} "
            "were left as they are, and are not in these files.",
            soft_wrap=True,
        )


def _fail(message: str) -> NoReturn:
    sys.exit(f"FATAL {message}")


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
