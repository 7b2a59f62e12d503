"""The results of a study: a file for each run, and the table made of them."""

import csv
import dataclasses
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sos.experiments.runs import IDENTITY, Run
from sos.files import atomic_write
from sos.report import SparsityReport

TABLE = "results.csv"
TRADEOFF = "tradeoff.png"
LAYERWISE = "layerwise.png"
FOLDER = "runs"


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightSparsity:
    """How sparse one weight of a trained network is.

    Attributes:
        path: The weight's path in the dense network.
        size: The number of its elements.
        sparsity: Fraction of zeros, as evaluation sees them.
    """

    path: str
    size: int
    sparsity: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run gave; all but `weights` are columns of the results table.

    Attributes:
        achieved_sparsity: Fraction of zeros in the weights made sparse, as
            evaluation sees them.
        model_sparsity: Fraction of zeros in all weights of the model.
        test_accuracy: Fraction of the test examples classified correctly.
        test_loss: Mean cross-entropy on the test examples, in nats.
        seconds: Duration of training and evaluation, without compilation.
        peak_memory: Peak memory of the process during the run, in MiB; also of
            what earlier runs left there.
        parameters_trained: The number of elements of all trainable variables,
            with those that the technique adds.
        weights: The weights of rank 2 or more, dense ones too, in the order of
            the network.
    """

    achieved_sparsity: float
    model_sparsity: float
    test_accuracy: float
    test_loss: float
    seconds: float
    peak_memory: float
    parameters_trained: int
    weights: tuple[WeightSparsity, ...] = ()


def weight_sparsities(report: SparsityReport) -> tuple[WeightSparsity, ...]:
    """What `Outcome.weights` holds, from a report of the trained network.

    Args:
        report: What `sos.sparsity_report` says of the network.

    Returns:
        The weights of rank 2 or more, in the order of the report.
    """
    return tuple(
        WeightSparsity(
            path=row["weight"], size=row["size"], sparsity=row["sparsity"]
        )
        for row in report.rows
        if row["rank"] >= 2
    )


_NUMBERS = tuple(
    field.name
    for field in dataclasses.fields(Outcome)
    if field.name != "weights"
)

#: The columns of the table: what tells runs apart, what they gave, the rest.
COLUMNS = tuple(
    dict.fromkeys(
        [
            *("technique", "sparsity", "penalty", "seed"),
            *_NUMBERS,
            *IDENTITY,
            "name",
        ]
    )
)


class Results:
    """The finished runs of a study in a work directory.

    Every run has a file of its own in `runs`, which appears complete or not at
    all; `results.csv` is made anew from these files after each run. Files of
    other runs stay as they are and are not in the table, so that several
    configs may share a work directory.

    Args:
        workdir: The directory; it is made if need be.
        runs: The runs of the study, in the order of the table.

    Attributes:
        outcomes: What the finished runs gave, by run.

    Raises:
        OSError: If the directory cannot be written to.
        ValueError: If a run's file is damaged, or the table or a figure is not
            of a study.
    """

    def __init__(self, workdir: Path, runs: Sequence[Run]) -> None:
        self.workdir = workdir
        self.runs = list(runs)
        self.outcomes: dict[Run, Outcome] = {}
        self._folder = workdir / FOLDER
        for path in (self.table, self.tradeoff, self.layerwise):
            if path.exists() and not self._is_ours():
                raise ValueError(
                    f"{path} is there, but is not of a study like this, so "
                    "that it would be lost. Choose another work directory, or "
                    "move the file away."
                )
        for run in self.runs:
            if self.path(run).exists():
                self.outcomes[run] = _read(self.path(run), run)
        # Shows now whether writing will be possible. The table stays until
        # there is something new to say.
        self._folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=workdir):
            pass

    @property
    def table(self) -> Path:
        """The table, `results.csv`."""
        return self.workdir / TABLE

    @property
    def tradeoff(self) -> Path:
        """The figure of accuracy against sparsity, `tradeoff.png`."""
        return self.workdir / TRADEOFF

    @property
    def layerwise(self) -> Path:
        """The figure of sparsity by layer, `layerwise.png`."""
        return self.workdir / LAYERWISE

    @property
    def pending(self) -> list[Run]:
        """The runs that are not finished, in order."""
        return [run for run in self.runs if run not in self.outcomes]

    @property
    def others(self) -> int:
        """The number of files of runs that are not of this study."""
        own = {self.path(run) for run in self.runs}
        return sum(
            # Hidden files are temporary ones, of a process that was killed.
            path not in own and not path.name.startswith(".")
            for path in self._folder.glob("*.json")
        )

    def ordered(self) -> list[tuple[Run, Outcome]]:
        """The finished runs and what they gave, in the order of the runs."""
        return [
            (run, self.outcomes[run])
            for run in self.runs
            if run in self.outcomes
        ]

    def path(self, run: Run) -> Path:
        """The file of a run."""
        return self._folder / f"{run.name}.json"

    def add(self, run: Run, outcome: Outcome) -> None:
        """Records a finished run.

        Args:
            run: The run.
            outcome: What it gave.
        """
        content = {
            "run": run.identity(),
            "outcome": dataclasses.asdict(outcome),
        }
        with atomic_write(self.path(run)) as temporary:
            temporary.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
        self.outcomes[run] = outcome
        self.write_table()

    def rows(self) -> list[dict[str, Any]]:
        """The rows of the table, in the order of the runs."""
        return [
            {
                "name": run.name,
                **run.identity(),
                **{name: getattr(outcome, name) for name in _NUMBERS},
            }
            for run, outcome in self.ordered()
        ]

    def _is_ours(self) -> bool:
        """Whether the table that is there is one that this class wrote."""
        try:
            with self.table.open(newline="", encoding="utf-8") as file:
                return next(csv.reader(file), []) == list(COLUMNS)
        except (OSError, UnicodeDecodeError, csv.Error):
            return False

    def write_table(self) -> None:
        """Writes the table of the runs that are finished."""
        with (
            atomic_write(self.table) as temporary,
            temporary.open("w", newline="", encoding="utf-8") as file,
        ):
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(self.rows())


def _read(path: Path, run: Run) -> Outcome:
    """Reads the file of a run and checks that it is that run's."""
    try:
        content = json.loads(path.read_text("utf-8"))
        if content["run"] != run.identity():
            raise ValueError("its settings are those of another run")
        found = content["outcome"]
        weights = tuple(WeightSparsity(**w) for w in found.pop("weights"))
        numbers = {
            **found,
            **{weight.path: weight.sparsity for weight in weights},
        }
        for name, value in numbers.items():
            if type(value) not in (int, float):
                raise ValueError(f"{name} is {value!r}")
        outcome = Outcome(**found, weights=weights)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged or not the result of a run "
            f"({type(error).__name__}: {error}). Move it away to repeat the "
            "run, then start again."
        ) from error
    return outcome
