"""Runs a study: what is not finished yet, then the table and the figures."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from sos.errors import NonFiniteLossError
from sos.experiments import figures
from sos.experiments.classification import BuildModel, Data
from sos.experiments.progress import Progress
from sos.experiments.results import Results
from sos.experiments.runner import Runner
from sos.experiments.runs import Run
from sos.files import only_process
from sos.training.signals import StopSource

_CHECKPOINTS = "checkpoints"


def run_study(
    runs: Sequence[Run],
    *,
    data: Data,
    build_model: BuildModel,
    workdir: Path,
    progress: Progress,
    layerwise_sparsity: float,
    stop: StopSource | None = None,
) -> Results:
    """Trains all runs that are not finished, and draws the figures.

    Args:
        runs: The runs, in the order in which they are trained.
        data: The examples.
        build_model: As for `Runner`.
        workdir: Where the results are and come to be.
        progress: Tells the user how far it is.
        layerwise_sparsity: The overall sparsity at which layers are compared.
        stop: Tells when to stop before the end.

    Returns:
        The results of all runs.

    Raises:
        OSError: If the work directory cannot be written to, or another process
            is at work there.
        ValueError: If files in the work directory are damaged, or a network
            cannot be made sparse as a run asks for.
        NonFiniteLossError: If the loss of runs is not finite, when all others
            are finished.
        Stopped: If it was asked to stop; the run in progress is saved.
        CheckpointError: If the run in progress cannot be saved.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    with only_process(workdir):
        results = Results(workdir, runs)
        failures = _train_pending(results, data, build_model, progress, stop)
        results.write_table()
        figures.save_tradeoff(results.tradeoff, results.ordered())
        figures.save_layerwise(
            results.layerwise, results.ordered(), layerwise_sparsity
        )
    if failures:
        raise NonFiniteLossError(
            "\n".join(f"{run.name}: {error}" for run, error in failures),
            failures[0][1].step,
        )
    return results


def _train_pending(
    results: Results,
    data: Data,
    build_model: BuildModel,
    progress: Progress,
    stop: StopSource | None,
) -> list[tuple[Run, NonFiniteLossError]]:
    """Trains what is not finished, and returns what failed."""
    waiting = results.pending
    # All of them first, so that what cannot be built is known before training.
    runners: dict[Run, Runner] = {}
    for run in waiting:
        if run.shape not in runners:
            runners[run.shape] = Runner(run, data, build_model)
    failures = []
    with progress.study(results):
        while waiting:
            run = waiting.pop(0)
            checkpoints = results.workdir / _CHECKPOINTS / run.name
            progress.begin(run)
            try:
                outcome = runners[run.shape].train(
                    run,
                    checkpoints=checkpoints,
                    on_summary=lambda record: progress.step(
                        record.step, record.metrics["loss"]
                    ),
                    stop=stop,
                )
            except NonFiniteLossError as error:
                failures.append((run, error))
            else:
                results.add(run, outcome)
                progress.finish(run, outcome)
                # Not before the result is written.
                shutil.rmtree(checkpoints, ignore_errors=True)
            if run.shape not in {other.shape for other in waiting}:
                # It would count as memory of the runs that follow.
                del runners[run.shape]
    return failures
