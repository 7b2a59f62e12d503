"""Results of runs, as if they had been trained."""

import dataclasses

from sos.experiments.config import plain, resolve, run_name
from sos.experiments.figures import Study
from sos.experiments.report import draw_figures, write_report
from sos.experiments.results import FinishedRun
from sos.experiments.runs import Result, WeightSparsity
from sos.experiments.scores import BLEU
from tests.support import toy_experiment


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


def in_bleu(runs):
    """The same runs with a BLEU of 30 times their accuracy as the score."""
    changed = {}

    def change(run):
        if run is None:
            return None
        if run.directory not in changed:
            metrics = dict(run.result.metrics)
            metrics["bleu"] = 30 * metrics.pop("accuracy")
            result = dataclasses.replace(
                run.result, score=BLEU, metrics=metrics
            )
            changed[run.directory] = dataclasses.replace(
                run, result=result, parent=change(run.parent)
            )
        return changed[run.directory]

    return [change(run) for run in runs]


# Accuracy at 50, 90 and 98 % sparsity.
_CURVES = {
    "magnitude": (0.86, 0.85, 0.78),
    "random": (0.85, 0.80, 0.50),
    "l0": (0.86, 0.86, 0.84),
}
_SPARSITIES = (0.5, 0.9, 0.98)
_BRANCHES = {
    "scratch-e": (
        -0.02,
        {"name": "scratch", "multiplier": 1, "learning_rate": "scale"},
    ),
    "scratch-b": (
        -0.01,
        {"name": "scratch", "multiplier": 2, "learning_rate": "scale"},
    ),
    "augmented init": (-0.02, {"name": "augmented_init", "multiplier": 1}),
    "lottery ticket": (-0.015, {"name": "lottery_ticket", "step": 0}),
}


def make_study(seeds=(0, 1), spread=0.002, branches=True):
    """Runs as of a study, whose accuracies differ by `spread` between seeds.

    Magnitude pruning is above random pruning and below L0 at high sparsity,
    and its branches are below it.
    """
    runs = []
    for seed in seeds:
        runs.append(make_toy_run("dense", 0.87 + seed * spread, seed))
    for technique, accuracies in _CURVES.items():
        for sparsity, accuracy in zip(_SPARSITIES, accuracies, strict=True):
            for seed in seeds:
                runs.append(
                    make_toy_run(
                        technique, accuracy + seed * spread, seed, sparsity
                    )
                )
    trunks = [run for run in runs if run.technique == "MagnitudePruning"]
    for label, (change, branch) in _BRANCHES.items() if branches else ():
        for trunk in trunks:
            runs.append(make_branch(trunk, label, change, branch))
    return runs


def make_toy_run(technique, accuracy, seed, sparsity=None):
    """A run of a technique of the toy task that reached a sparsity."""
    values = dict(toy_experiment.TECHNIQUES[technique])
    layers = ()
    if sparsity is not None:
        if "sparsity" in values:
            values["sparsity"] = sparsity
            layers = (sparsity, sparsity)
        else:
            values["penalty_weight"] = 1e-4 / (1 - sparsity)
            # A bit beside the sparsities of pruning.
            sparsity -= 0.001
            layers = (sparsity / 2, sparsity)
    config = resolve(
        {**toy_experiment.CONFIG, "sparsity": values, "seed": seed}
    )
    return make_run(
        config,
        accuracy=accuracy,
        sparsity=sparsity,
        weights=tuple(
            WeightSparsity(path=f"{name}/kernel", size=size, sparsity=layer)
            for name, size, layer in zip("ab", (96, 48), layers, strict=False)
        ),
    )


def make_branch(trunk, label, change, branch):
    """A branch of a run, whose accuracy differs by `change`."""
    config = {
        **trunk.config,
        "sparsity": {"technique": "FixedMask", "rules": []},
        "parent": trunk.name,
        "label": label,
        "branch": branch,
        "seed": trunk.config["seed"] + 1000,
    }
    return make_run(
        config,
        parent=trunk,
        accuracy=trunk.result.metrics["accuracy"] + change,
        sparsity=trunk.result.sparsity,
        weights=trunk.result.weights,
    )


def make_report(path, runs, *, drawn=None, **options):
    """Writes a report with the figures that the runs have."""
    study = Study(runs)
    if drawn is None:
        drawn, failures = draw_figures(study)
        assert failures == {}
    write_report(
        path,
        study,
        drawn,
        **{
            "command": "python -m models.sweep --workdir=runs",
            "eval_examples": 4_000,
            **options,
        },
    )
