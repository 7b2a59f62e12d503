"""Results of runs, as if they had been trained."""

from sos.experiments.config import plain, run_name
from sos.experiments.results import FinishedRun
from sos.experiments.runs import Result


def make_result(accuracy=0.85, **changes):
    return Result(
        **{
            "step": 12,
            "metrics": {"accuracy": accuracy, "loss": 0.4},
            "sparsity": 0.9,
            "model_sparsity": 0.89,
            "seconds": 12.5,
            "parameters": 155_786,
            "weights": (),
            "versions": {"sos": "0"},
            **changes,
        }
    )


def make_run(config, *, parent=None, **changes):
    """A finished run of a resolved config, with changes to its result."""
    return FinishedRun(
        name=run_name(config),
        config=plain(config),
        result=make_result(**changes),
        directory=f"runs/{run_name(config)}",
        parent=parent,
    )
