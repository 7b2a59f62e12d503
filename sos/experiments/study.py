"""Runs a study: what is not finished yet, then the table and the figure."""

from collections.abc import Sequence
from pathlib import Path

from sos.experiments import figures
from sos.experiments.progress import Progress
from sos.experiments.results import Results
from sos.experiments.runs import Run
from sos.experiments.training import BuildModel, Data, Trainer


def run_study(
    runs: Sequence[Run],
    *,
    data: Data,
    build_model: BuildModel,
    workdir: Path,
    progress: Progress,
) -> Results:
    """Trains all runs that are not finished, and draws the figure.

    Args:
        runs: The runs, in the order in which they are trained.
        data: The examples.
        build_model: As for `Trainer`.
        workdir: Where the results are and come to be.
        progress: Tells the user how far it is.

    Returns:
        The results of all runs.

    Raises:
        OSError: If the work directory cannot be written to.
        ValueError: If files in the work directory are damaged, or a network
            cannot be made sparse as a run asks for.
        FloatingPointError: If the loss of runs is not finite, when all others
            are finished.
    """
    results = Results(workdir, runs)
    # All of them first, so that what cannot be built is known before training.
    trainers: dict[Run, Trainer] = {}
    for run in results.pending:
        if run.shape not in trainers:
            trainers[run.shape] = Trainer(run, data, build_model)
    failures = []
    with progress.study(results):
        for run in results.pending:
            progress.begin(run)
            try:
                outcome = trainers[run.shape].train(run, progress.step)
            except FloatingPointError as error:
                failures.append(str(error))
                continue
            results.add(run, outcome)
            progress.finish(run, outcome)
    results.write_table()
    figures.save_tradeoff(results.figure, results.ordered())
    if failures:
        raise FloatingPointError("\n".join(failures))
    return results
