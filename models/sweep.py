r"""Trains the runs of a sweep and compares them.

For example, the study on Fashion-MNIST with fewer steps:

    python -m models.sweep --config=configs/fashion_mnist.py \
        --workdir=runs/fashion_mnist --config.train_steps=300

Each run has its own directory in the work directory. A run that starts from
another one is trained after it. If the sweep is stopped and started again, it
skips finished runs and resumes those in progress. It writes results.csv,
figures, and report.html, a page with all of them.
"""

import os
import pathlib
import shlex
import sys
from collections.abc import Sequence

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from sos import startup

with startup.quiet():
    import tensorflow as tf

    # The first listing of devices warns about missing GPUs.
    tf.config.list_physical_devices()

from absl import app, flags

from models.config_flag import ConfigFlag
from sos.errors import UsageError
from sos.experiments import conclusions, figures, report, results, sweeps
from sos.experiments.config import run_name
from sos.experiments.launchers import LocalLauncher
from sos.experiments.progress import SweepProgress, summary_table
from sos.training import main as training_main
from sos.training.signals import StopRequest

_CONFIG = ConfigFlag()
_WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Directory of the runs, the table and the figures. Finished runs in it are "
    "not repeated.",
    required=True,
)
_SELECT = flags.DEFINE_string(
    "select",
    "",
    "Regular expression that selects runs by name (re.search). Default: all. "
    "The unfinished runs that they start from are trained, too.",
)
_LIST = flags.DEFINE_bool("list", False, "Only print the names of the runs.")
_WORKERS = flags.DEFINE_integer(
    "workers",
    None,
    "Number of worker processes, each of which trains one run at a time. "
    "Default: one per GPU or, without a GPU, per core, at most eight.",
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
    """Trains the runs that the flags select.

    Args:
        argv: Arguments that are not flags.
    """
    code = training_main.exit_code_of(lambda: _run(argv[1:]))
    training_main.end_process(code)


def _run(arguments: Sequence[str]) -> None:
    if arguments:
        raise UsageError(
            f"The program takes only flags. Received: {' '.join(arguments)}"
        )
    if not _WORKDIR.value:
        raise UsageError("--workdir must be a directory. Received: --workdir=")
    if "://" in _WORKDIR.value:
        raise UsageError(
            "--workdir must be a local directory. "
            f"Received: --workdir={_WORKDIR.value}"
        )
    config = _CONFIG.config
    all_configs = sweeps.expand(config, _CONFIG.sweep(config))
    workdir = pathlib.Path(_WORKDIR.value).expanduser()
    selected, parents = sweeps.select(all_configs, _SELECT.value, workdir)
    configs = [*parents, *selected]
    if _LIST.value:
        print(*map(run_name, configs), sep="\n")
        return
    results.check_outputs(
        workdir,
        [report.REPORT, *(f"{spec.name}.png" for spec in figures.FIGURES)],
    )
    progress = SweepProgress()
    launcher = LocalLauncher(_WORKERS.value)
    # This process builds the networks to estimate their size. It must leave the
    # memory of GPUs to the workers.
    tf.config.set_visible_devices([], "GPU")
    options = {"save_checkpoints_steps": _SAVE_CHECKPOINTS_STEPS.value}
    disk_use = sweeps.estimate_disk_use(
        configs, workdir, workers=launcher.workers, **options
    )
    text = f"{len(configs)} runs in {workdir}."
    if parents:
        text += (
            f" {len(parents)} of them are not selected, but others start from "
            "them."
        )
    kept, further = (
        f"{size / 1e6:,.0f} MB"
        for size in (disk_use.final_bytes, disk_use.temporary_bytes)
    )
    if further != "0 MB":
        text += (
            f" Their checkpoints will need {kept}, and up to {further} more "
            "during training."
        )
    elif kept != "0 MB":
        text += f" Their checkpoints will need {kept}."
    progress.console.print(text, soft_wrap=True)
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
        # Includes finished runs that are not selected now.
        _report(progress, workdir, [run_name(c) for c in all_configs])


def _report(
    progress: SweepProgress, workdir: pathlib.Path, names: Sequence[str]
) -> None:
    """Writes the table, the figures and the report of the finished runs."""
    runs = results.collect(workdir, names)
    if not runs:
        return
    paths = [workdir / results.TABLE]
    results.write_table(paths[-1], runs)
    progress.console.print(summary_table(runs))
    study = figures.Study(runs, _LAYERWISE_SPARSITY.value)
    drawn, failures = report.draw_figures(study)
    for name, text in failures.items():
        progress.console.print(f"{text}The figure {name} could not be drawn.")
    for spec, figure in drawn:
        paths.append(workdir / f"{spec.name}.png")
        figures.save_png(figure, paths[-1])
    paths.append(workdir / report.REPORT)
    report.write_report(
        paths[-1],
        study,
        drawn,
        command=shlex.join(["python", "-m", "models.sweep", *sys.argv[1:]]),
        eval_examples=conclusions.eval_examples(runs),
    )
    progress.console.print()
    for path in paths:
        progress.console.print(f"Wrote {path}", soft_wrap=True)


if __name__ == "__main__":
    app.run(main, flags_parser=_CONFIG.parse_flags)
