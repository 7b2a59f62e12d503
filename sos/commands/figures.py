"""Draws the figures of a study, of the paper, or of both together.

With DIR, draws the figures of the finished runs in it. With --reference, draws
the published results of the paper (Gale, Elsen and Hooker 2019) for one of its
models. With both, draws the runs over the best published results.
"""

import argparse
from pathlib import Path

from sos.commands.finished_runs import finished_runs
from sos.errors import UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command.

    Args:
        parser: The parser of the command.
    """
    parser.add_argument(
        "workdir",
        metavar="DIR",
        nargs="?",
        help="the work directory of the runs",
    )
    parser.add_argument(
        "--reference", metavar="MODEL", help="resnet50 or transformer"
    )
    parser.add_argument(
        "--metric",
        metavar="NAME",
        help="metric of the runs to draw over published results (default: "
        "accuracy for resnet50, study_bleu for transformer)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(),
        metavar="OUT",
        help="directory of the PNG files (default: the current one)",
    )


def run(options: argparse.Namespace) -> str:
    """Draws the figures.

    Args:
        options: The arguments of the command.

    Returns:
        The paths of the files, one a line.

    Raises:
        UsageError: If an argument is invalid, or there are no finished runs.
        StorageError: If a run cannot be read or a file cannot be written.
    """
    from sos.experiments.figures import FIGURES, Study, published, save_png

    workdir, model = options.workdir, options.reference
    if workdir is None and model is None:
        raise UsageError(
            "name the work directory of a study, or a model of the paper with "
            "--reference=resnet50 or --reference=transformer"
        )
    if options.metric is not None and not (workdir and model):
        raise UsageError(
            "--metric needs a work directory and --reference, as it is the "
            f"metric to compare. Received: --metric={options.metric}"
        )
    if workdir is None:
        drawn = {
            f"published_{model}": published.draw_all_scores(model),
            f"published_{model}_branches": published.draw_branches(model),
        }
    else:
        runs = finished_runs(workdir)
        if model is None:
            study = Study(runs)
            drawn = {spec.name: spec.draw(study) for spec in FIGURES}
        else:
            figure = published.draw_runs(model, runs, options.metric)
            drawn = {f"published_{model}_runs": figure}
    lines = []
    for name, figure in drawn.items():
        if figure is not None:
            path = options.out / f"{name}.png"
            save_png(figure, path)
            lines.append(f"Wrote {path}")
    return "\n".join(lines)
