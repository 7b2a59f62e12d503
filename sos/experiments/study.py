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
        runs: The runs; those of one shape should follow each other.
        data: The examples.
        build_model: As for `Trainer`.
        workdir: Where the results are and come to be.
        progress: Tells the user how far it is.

    Returns:
        The results of all runs.

    Raises:
        OSError: If the work directory cannot be written to.
        ValueError: If files in the work directory are damaged.
        FloatingPointError: If the loss of a run is not finite.
    """
    results = Results(workdir, runs)
    trainer = None
    with progress.study(results):
        for run in results.pending:
            if trainer is None or trainer.shape != run.shape:
                trainer = Trainer(run, data, build_model)
            progress.begin(run)
            outcome = trainer.train(run, progress.step)
            results.add(run, outcome)
            progress.finish(run, outcome)
    figures.save_tradeoff(results.figure, results.ordered())
    return results
