r"""Trains many runs and compares them.

For example, the study on Fashion-MNIST with fewer steps than it has:

    python -m models.sweep --config=configs/fashion_mnist.py \
        --workdir=runs/fashion_mnist --config.train_steps=300

Each run has a directory of its own in the work directory. Stop the sweep at any
time and start it again: what is finished is not repeated, and runs in progress
go on where they were. It writes results.csv and layerwise.png and, of a task
with the metric accuracy, tradeoff.png.
"""

import os
import pathlib
from collections.abc import Sequence

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from sos import startup

with startup.quiet():
    import tensorflow as tf

    # The first listing names the GPUs that are missing.
    tf.config.list_physical_devices()

from absl import app, flags

from models.config_flag import ConfigFlag
from sos.errors import UsageError
from sos.experiments import figures, results, sweeps
from sos.experiments.config import run_name
from sos.experiments.launchers import LocalLauncher
from sos.experiments.progress import SweepProgress, summary_table
from sos.training import main as training_main
from sos.training.signals import StopRequest

_CONFIG = ConfigFlag()
_WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Directory of the runs, the table and the figures. Runs that are finished "
    "there are not repeated.",
    required=True,
)
_SELECT = flags.DEFINE_string(
    "select", "", "Regular expression on the names of runs. Default: all runs."
)
_LIST = flags.DEFINE_bool("list", False, "Print the names of the runs only.")
_WORKERS = flags.DEFINE_integer(
    "workers",
    None,
    "Runs that are trained at a time, each in a process of its own. Default: "
    "one for each GPU or, without one, for each core, at most eight.",
    lower_bound=1,
)
_SAVE_CHECKPOINTS_STEPS = flags.DEFINE_integer(
    "save_checkpoints_steps",
    1000,
    "Steps between two checkpoints of a run.",
    lower_bound=1,
)
_LAYERWISE_SPARSITY = flags.DEFINE_float(
    "layerwise_sparsity",
    0.9,
    "Overall sparsity at which layerwise.png compares the layers.",
    lower_bound=0.0,
    upper_bound=1.0,
)


def main(argv: Sequence[str]) -> None:
    """Trains the runs that the flags ask for.

    Args:
        argv: What is left of the command line.
    """
    code = training_main.exit_code_of(lambda: _run(argv[1:]))
    training_main.end_process(code)


def _run(arguments: Sequence[str]) -> None:
    if arguments:
        raise UsageError(
            f"There are only flags here. Received: {' '.join(arguments)}"
        )
    if not _WORKDIR.value:
        raise UsageError(
            "--workdir must name a directory. Received: an empty text"
        )
    if "://" in _WORKDIR.value:
        raise UsageError(
            "--workdir must be a local directory, as the table and the figures "
            f"are written there. Received: {_WORKDIR.value}"
        )
    config = _CONFIG.config
    all_configs = sweeps.expand(config, _CONFIG.sweep(config))
    configs = sweeps.select(all_configs, _SELECT.value)
    if _LIST.value:
        print(*map(run_name, configs), sep="\n")
        return
    workdir = pathlib.Path(_WORKDIR.value).expanduser()
    results.check_outputs(workdir)
    progress = SweepProgress()
    launcher = LocalLauncher(_WORKERS.value)
    # The networks are built here to learn their size. This process would take
    # the memory of a GPU for it, which a worker needs.
    tf.config.set_visible_devices([], "GPU")
    options = {"save_checkpoints_steps": _SAVE_CHECKPOINTS_STEPS.value}
    use = sweeps.estimate_disk_use(
        configs, workdir, workers=launcher.workers, **options
    )
    progress.console.print(
        f"{len(configs)} runs in {workdir}; the checkpoints of those to train "
        f"will take {use.finished / 1e6:,.0f} MB, and "
        f"{use.training / 1e6:,.0f} MB more meanwhile.",
        soft_wrap=True,
    )
    try:
        with StopRequest() as stop:
            sweeps.run_sweep(
                configs,
                workdir,
                launcher=launcher,
                progress=progress,
                stop=stop,
                **options,
            )
    finally:
        # Also of runs that are not selected now.
        _report(progress, workdir, [run_name(c) for c in all_configs])


def _report(
    progress: SweepProgress, workdir: pathlib.Path, names: Sequence[str]
) -> None:
    """Writes the table and the figures of what is finished."""
    runs = results.collect(workdir, names)
    if not runs:
        return
    written = [workdir / results.TABLE]
    results.write_table(written[-1], runs)
    # Tasks have other metrics, too.
    if all("accuracy" in run.result.metrics for run in runs):
        written.append(workdir / results.TRADEOFF)
        figures.save_tradeoff(written[-1], runs)
    written.append(workdir / results.LAYERWISE)
    figures.save_layerwise(written[-1], runs, _LAYERWISE_SPARSITY.value)
    progress.console.print(summary_table(runs))
    progress.console.print()
    for path in written:
        progress.console.print(f"Wrote {path}", soft_wrap=True)


if __name__ == "__main__":
    app.run(main, flags_parser=_CONFIG.parse_flags)
