"""Conclusions of a study, computed from its runs.

First which technique is best at each sparsity, then whether each finding of
Gale, Elsen and Hooker (2019, arXiv 1902.09574) holds for these runs.
"""

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import sos
from sos.experiments import config as config_lib
from sos.experiments import differences
from sos.experiments.differences import BySeed, Difference
from sos.experiments.results import FinishedRun
from sos.experiments.scores import ScoreMetric, shared_score
from sos.experiments.task import make_task

Verdict = Literal["holds", "does not hold", "undecided", "not tested"]

_METHOD = (
    "A difference is a mean over sparsities and seeds. Its 95 % interval is a "
    "bootstrap over seeds, resampled within each sparsity, in pairs where both "
    "sides have the same seeds. If some sparsities have several seeds, those "
    "with one are left out. A finding holds, or does not hold, if the "
    "interval excludes zero{margin}. Everything else is undecided."
)
_FRACTION_MARGIN = (
    " and the difference is larger than the standard error that the number of "
    "evaluation examples gives an accuracy. One side matches the other if the "
    "interval excludes a loss larger than that standard error"
)
_NO_MARGIN = ". One side matches the other if the interval excludes a loss"
_FEW_SEEDS = (
    "Two seeds give little. At a single sparsity, their interval is the mean ± "
    "0.7 times their difference; if {scores} vary normally, it contains the "
    "true difference in 6 of 10 cases. The interval of a mean over five "
    "sparsities with two seeds each contains it in 9 of 10 if the differences "
    "of a seed are independent between sparsities, and in 7 of 10 if their "
    "correlation is 0.3."
)

#: Topic of the findings that are not the paper's.
BEST = "Best technique"
# From this sparsity on, sparsity is high.
_HIGH = 0.9

_Value = Callable[[FinishedRun], float | None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """A statement, and what the runs say of it.

    Attributes:
        statement: The statement.
        topic: What it is about, to group findings.
        verdict: Whether it holds for these runs.
        measured: What `estimate` is, in points of the score, or of percent.
        estimate: The mean difference; None if the statement is not tested.
        interval: Its 95 % interval; None without several seeds.
        evidence: The numbers behind the verdict.
        paper: What the paper found, where its models or techniques differ.
    """

    statement: str
    topic: str = ""
    verdict: Verdict
    measured: str
    estimate: float | None = None
    interval: tuple[float, float] | None = None
    evidence: str = ""
    paper: str = ""


def method(score: ScoreMetric) -> list[str]:
    """Returns how `findings` decides, for readers of a report.

    Args:
        score: The score of the runs.

    Returns:
        Paragraphs: the rules, and what two seeds can give.
    """
    fraction = score.is_fraction
    return [
        _METHOD.format(margin=_FRACTION_MARGIN if fraction else _NO_MARGIN),
        _FEW_SEEDS.format(scores="accuracies" if fraction else "scores"),
    ]


def eval_examples(runs: Sequence[FinishedRun]) -> int | None:
    """Returns the number of evaluation examples of the runs' task, if known.

    Args:
        runs: Finished runs of one task.

    Returns:
        The number; None also if the score is not an accuracy, whose standard
        error follows from it.

    Raises:
        UsageError: If the task cannot be imported.
    """
    if not shared_score(runs).is_fraction:
        return None
    return make_task(config_lib.resolve(runs[0].config)).eval_examples


def findings(
    runs: Sequence[FinishedRun], *, eval_examples: int | None = None
) -> list[Finding]:
    """Returns what the runs say of each finding of the paper.

    Args:
        runs: Finished runs, in the order of `collect`.
        eval_examples: Number of evaluation examples, from which the standard
            error of an accuracy follows. None if it is not known, or the score
            is not an accuracy: then the interval alone decides.

    Returns:
        The findings; first the best technique at each sparsity.

    Raises:
        UsageError: If the runs have different scores.

    Example:
    >>> from sos.experiments import conclusions
    >>> finding = conclusions.findings([])[0]
    >>> finding.statement, finding.verdict
    ('Magnitude pruning is above random pruning at high sparsity', 'not tested')
    """
    study = _Study(runs, eval_examples)
    return [
        dataclasses.replace(finding, topic=topic)
        for topic, find in (
            (BEST, _best_techniques),
            ("Techniques", _techniques),
            ("Sparsity of layers", _layers),
            ("The mask without its weights", _branches),
        )
        for finding in find(study)
    ]


def markdown(findings: Iterable[Finding]) -> str:
    """Returns findings as a table in Markdown."""
    rows = [
        "| | holds | difference [95 % interval] |",
        "|---|---|---|",
    ]
    for finding in findings:
        verdict = {"holds": "yes", "does not hold": "no"}.get(
            finding.verdict, finding.verdict
        )
        number = ""
        if finding.estimate is not None:
            number = _with_interval(finding.estimate, finding.interval)
        rows.append(f"| {finding.statement} | {verdict} | {number} |")
    return "\n".join(rows)


class _Study:
    """The runs of a study, by what the findings are about."""

    def __init__(
        self, runs: Sequence[FinishedRun], eval_examples: int | None
    ) -> None:
        self.sparsities = differences.target_sparsities(runs)
        self.high_sparsities = [s for s in self.sparsities if s >= _HIGH]
        #: The runs of each technique, or variant of one, by label.
        self.labels: dict[str, list[FinishedRun]] = {}
        for run in runs:
            if run.branch is None and run.result.sparsity is not None:
                self.labels.setdefault(run.label, []).append(run)
        self._branches = [
            run for run in runs if run.branch and run.parent is not None
        ]
        self.score = shared_score(runs)
        self._eval_examples = eval_examples if self.score.is_fraction else None

    def of_technique(self, technique: str) -> list[FinishedRun]:
        """Returns the runs of a technique without rules."""
        for runs in self.labels.values():
            if (
                runs[0].technique == technique
                and not runs[0].config["sparsity"]["rules"]
            ):
                return runs
        return []

    def magnitude_with_dense_first_layer(self) -> list[FinishedRun]:
        """Returns the runs of magnitude pruning of all but the first layer."""
        for runs in self.labels.values():
            if runs[0].technique == "MagnitudePruning" and all(
                run.result.weights
                and run.result.weights[0].sparsity == 0 < run.result.sparsity
                for run in runs
            ):
                return runs
        return []

    def learned(self) -> dict[str, list[FinishedRun]]:
        """Returns the runs of each technique with a penalty, by label."""
        groups = [
            self.of_technique(name)
            for name in sos.extend.techniques()
            if "penalty_weight" in sos.extend.hyperparameters(name)
        ]
        by_label = {runs[0].label: runs for runs in groups if runs}
        return by_label or {"a learned technique": []}

    def branches(self, name: str, **options: Any) -> list[FinishedRun]:
        """Returns the branches of a name and options whose trunk is there."""
        return [
            run
            for run in self._branches
            if run.branch == name
            and options.items() <= run.config["branch"].items()
        ]

    def compare(
        self,
        first: Iterable[FinishedRun],
        second: Iterable[FinishedRun],
        sparsities: Sequence[float],
        value: _Value = differences.score,
    ) -> "_Comparison":
        """Compares values of two techniques at equal sparsities."""
        groups = [
            differences.by_sparsity(runs, sparsities, value)
            for runs in (first, second)
        ]
        return self._comparison(
            *({_percent(s): v for s, v in group.items()} for group in groups),
            is_score=value is differences.score,
        )

    def compare_branches(
        self, first: Iterable[FinishedRun], second: Iterable[FinishedRun]
    ) -> "_Comparison":
        """Compares branches of equal trunks, or trunks with their branches."""
        groups = [*first], [*second]
        names = _trunk_names(_trunk(run) for runs in groups for run in runs)
        return self._comparison(*(_by_trunk(runs, names) for runs in groups))

    def compare_profiles(
        self, branches: Iterable[FinishedRun], others: Sequence[FinishedRun]
    ) -> "_Comparison":
        """Compares branches with other runs at the sparsity that each reaches.

        Only with those of the same seed.
        """
        groups: dict[tuple, list[FinishedRun]] = {}
        for run in branches:
            groups.setdefault(run.point, []).append(run)
        first, second = {}, {}
        for runs in groups.values():
            pairs: dict[int, tuple[float, float]] = {}
            for run in runs:
                seed, sparsity = differences.seed_of(run), run.result.sparsity
                values = differences.by_sparsity(others, [sparsity])
                score = differences.score(run)
                if score is not None and seed in values.get(sparsity, {}):
                    pairs[seed] = score, values[sparsity][seed]
            name = _percent(statistics.fmean(r.result.sparsity for r in runs))
            if name in first:
                name += f" ({runs[0].hyperparameters})"
            first[name] = {s: own for s, (own, _) in pairs.items()}
            second[name] = {s: other for s, (_, other) in pairs.items()}
        return self._comparison(first, second)

    def _comparison(
        self,
        first: Mapping[str, BySeed],
        second: Mapping[str, BySeed],
        *,
        is_score: bool = True,
    ) -> "_Comparison":
        strata = {
            name: (values, second[name])
            for name, values in first.items()
            if values and second.get(name)
        }
        margin = 0.0
        if is_score and strata and self._eval_examples is not None:
            mean = statistics.fmean(
                v for pair in strata.values() for g in pair for v in g.values()
            )
            margin = math.sqrt(mean * (100 - mean) / self._eval_examples)
        return _Comparison(strata, margin)


def _trunk(run: FinishedRun) -> FinishedRun:
    return run if run.parent is None else run.parent


def _trunk_names(trunks: Iterable[FinishedRun]) -> dict[tuple, str]:
    """Returns the name of the sparsity of each point, for evidence.

    Trunks of one point may reach sparsities that differ between seeds: without
    a target, their mean counts. Labels are added if they differ.
    """
    points: dict[tuple, dict[str, FinishedRun]] = {}
    for trunk in trunks:
        points.setdefault(trunk.point, {})[trunk.directory] = trunk
    names = {}
    for point, runs in points.items():
        trunk, *_ = runs.values()
        sparsity = trunk.target_sparsity
        if sparsity is None:
            sparsity = statistics.fmean(
                run.result.sparsity for run in runs.values()
            )
        names[point] = trunk.label, _percent(sparsity)
    several = len({label for label, _ in names.values()}) > 1
    return {
        point: f"{percent} ({label})" if several else percent
        for point, (label, percent) in names.items()
    }


def _by_trunk(
    runs: Iterable[FinishedRun], names: Mapping[tuple, str]
) -> dict[str, dict[int, float]]:
    """Returns scores by name and seed of the trunks.

    Args:
        runs: Trunks or branches.
        names: Names by the points of the trunks.
    """
    values: dict[str, dict[int, list[float]]] = {}
    for run in runs:
        score = differences.score(run)
        if score is None:
            continue
        seeds = values.setdefault(names[_trunk(run).point], {})
        seeds.setdefault(differences.seed_of(run), []).append(score)
    return {
        name: {seed: statistics.fmean(v) for seed, v in seeds.items()}
        for name, seeds in values.items()
    }


@dataclasses.dataclass(frozen=True)
class _Comparison:
    """Values of two groups of runs.

    Attributes:
        strata: By name of the sparsity, the values of both groups by seed.
        margin: Size of a difference that does not count.
    """

    strata: Mapping[str, tuple[BySeed, BySeed]]
    margin: float

    @property
    def total(self) -> Difference | None:
        """The mean difference over all sparsities."""
        return differences.difference(self.strata.values())

    def verdict(self, *, matches: bool = False) -> Verdict:
        """Returns whether the first group is above the second.

        Args:
            matches: Whether it is enough that it is not below.
        """
        total = self.total
        if total is None:
            return "not tested"
        if total.interval is None:
            return "undecided"
        low, high = total.interval
        if high < 0 and total.mean < -self.margin:
            return "does not hold"
        if matches:
            return "holds" if low >= -self.margin else "undecided"
        above = low > 0 and total.mean > self.margin
        return "holds" if above else "undecided"

    def finding(
        self,
        statement: str,
        measured: str,
        *,
        matches: bool = False,
        paper: str = "",
    ) -> Finding:
        """Returns the finding that the first group is above the second."""
        total, verdict = self.total, self.verdict(matches=matches)
        finding = Finding(
            statement=statement, verdict=verdict, measured=measured, paper=paper
        )
        if total is None:
            return finding
        evidence = self._numbers(total)
        if verdict == "undecided":
            evidence += f" {self._why_undecided(total, matches)}"
        return dataclasses.replace(
            finding,
            estimate=total.mean,
            interval=total.interval,
            evidence=evidence,
        )

    def _numbers(self, total: Difference) -> str:
        parts = []
        for name, stratum in self.strata.items():
            part = differences.difference([stratum])
            parts.append(f"{name}: {_with_interval(part.mean, part.interval)}")
        number = " to ".join(str(n) for n in sorted(set(total.seeds)))
        seeds = "seed" if total.seeds[1] == 1 else "seeds"
        return f"{'; '.join(parts)} ({number} {seeds})."

    def _why_undecided(self, total: Difference, matches: bool) -> str:
        if total.interval is None:
            return "One seed gives no interval."
        if matches:
            return f"The interval does not exclude {signed(-self.margin)}."
        low, high = total.interval
        if low <= 0 <= high:
            return "The interval contains zero."
        return (
            "The difference is within the standard error of an accuracy on the "
            f"evaluation examples, {self.margin:.1f}."
        )


def _best_techniques(study: _Study) -> list[Finding]:
    result = [_best_technique(study, s) for s in study.sparsities]
    return [finding for finding in result if finding is not None]


def _best_technique(study: _Study, sparsity: float) -> Finding | None:
    """Returns which technique is best; None if there are not two."""
    means = {}
    for label, runs in study.labels.items():
        values = differences.by_sparsity(runs, [sparsity])
        if values:
            means[label] = statistics.fmean(values[sparsity].values())
    if len(means) < 2:
        return None
    best, *others = sorted(means, key=means.__getitem__, reverse=True)
    compared = {
        other: study.compare(
            study.labels[best], study.labels[other], [sparsity]
        )
        for other in others
    }
    total = compared[others[0]].total
    close = [o for o in others if compared[o].verdict() != "holds"]
    unit = f" {study.score.unit}".rstrip()
    numbers = [f"{label} {means[label]:.1f}{unit}" for label in (best, *others)]
    evidence = f"Means: {'; '.join(numbers)}."
    if total.interval is None:
        evidence += " One seed gives no interval."
    elif close:
        evidence += f" Not clearly below the best: {'; '.join(close)}."
    return Finding(
        statement=f"At {_percent(sparsity)} sparsity, {best} is best",
        verdict="undecided" if close else "holds",
        measured=f"{study.score.label}, {best} minus {others[0]}",
        estimate=total.mean,
        interval=total.interval,
        evidence=evidence,
    )


def _techniques(study: _Study) -> list[Finding]:
    score = study.score.label
    magnitude = study.of_technique("MagnitudePruning")
    random = study.of_technique("RandomPruning")
    dense_first = study.magnitude_with_dense_first_layer()
    high = study.high_sparsities
    return [
        study.compare(magnitude, random, high).finding(
            "Magnitude pruning is above random pruning at high sparsity",
            f"{score}, magnitude pruning minus random pruning",
        ),
        *(
            study.compare(magnitude, runs, study.sparsities).finding(
                f"Magnitude pruning matches or beats {label}",
                f"{score}, magnitude pruning minus {label}",
                matches=True,
                paper="Of the best published points, variational dropout was "
                "better on ResNet-50 from 95 % on, and L0 on the Transformer "
                "up to 70 % and at 98 %.",
            )
            for label, runs in study.learned().items()
        ),
        study.compare(dense_first, magnitude, high).finding(
            "A dense first layer helps magnitude pruning at high sparsity",
            f"{score}, first layer dense minus all layers sparse",
        ),
    ]


def _layers(study: _Study) -> list[Finding]:
    magnitude = study.of_technique("MagnitudePruning")
    result = []
    for label, runs in study.learned().items():
        name = _capital(label)
        sparsities = study.sparsities
        spread = study.compare(runs, magnitude, sparsities, _layer_spread)
        ends = study.compare(runs, magnitude, sparsities, _density_of_ends)
        result += [
            spread.finding(
                f"Sparsity differs more between layers with {label} than with "
                "magnitude pruning",
                "standard deviation of the layers' sparsities, "
                f"{label} minus magnitude pruning",
            ),
            ends.finding(
                f"{name} keeps the first and the last layer denser than the "
                "network",
                "density of the sparser of the two minus that of the network, "
                f"{label} minus magnitude pruning",
            ),
        ]
    return result


def _layer_spread(run: FinishedRun) -> float | None:
    layers = [100 * weight.sparsity for weight in run.result.weights]
    return statistics.pstdev(layers) if layers else None


def _density_of_ends(run: FinishedRun) -> float | None:
    layers = run.result.weights
    if not layers:
        return None
    sparser = max(layers[0].sparsity, layers[-1].sparsity)
    return 100 * (run.result.sparsity - sparser)


def _branches(study: _Study) -> list[Finding]:
    score = study.score.label
    scratch = study.branches("scratch", multiplier=1, learning_rate="scale")
    longer = study.branches("scratch", learning_rate="scale")
    longer = [run for run in longer if run not in scratch]
    augmented = study.branches("augmented_init", multiplier=1)
    tickets = study.branches("lottery_ticket", step=0)
    random_masks = study.branches("random_mask")
    magnitude = study.of_technique("MagnitudePruning")
    profiles: dict[str, list[FinishedRun]] = {}
    for run in study.branches("transferred_profile"):
        if run.technique == "MagnitudePruning":
            profiles.setdefault(run.parent.label, []).append(run)
    labels: dict[str, list[FinishedRun]] = {}
    for name in ("scratch", "augmented_init", "lottery_ticket"):
        for run in study.branches(name):
            labels.setdefault(run.label, []).append(run)
    return [
        *(
            study.compare_branches([run.parent for run in runs], runs).finding(
                f"{_capital(label)} does not reach its trunk",
                f"{score}, trunk minus {label}",
            )
            for label, runs in (labels or {"training from scratch": []}).items()
        ),
        study.compare_branches(scratch, augmented).finding(
            "Augmented initialization does not help",
            f"{score}, scratch-e minus augmented init",
            matches=True,
            paper="It made no difference on ResNet-50 and was worse on the "
            "Transformer.",
        ),
        study.compare_branches(longer, scratch).finding(
            "Longer training from scratch helps",
            f"{score}, scratch-b minus scratch-e",
        ),
        study.compare_branches(scratch, tickets).finding(
            "A lottery ticket is no better than fresh weights",
            f"{score}, scratch-e minus lottery ticket",
            matches=True,
            paper="It was up to 0.2 points better on ResNet-50, and about 1 "
            "point better on the Transformer at 80 to 95 % sparsity.",
        ),
        study.compare_branches(scratch, random_masks).finding(
            "The trunk's mask is better than a random one with the same "
            "sparsity of each layer",
            f"{score}, scratch-e minus random mask",
            paper="The published runs with random masks have other learning "
            "rates.",
        ),
        *(
            study.compare_profiles(runs, magnitude).finding(
                f"The sparsity of each layer that {label} found helps "
                "magnitude pruning",
                f"{score}, magnitude pruning with those sparsities minus with "
                "equal ones",
                paper="No published table has such runs.",
            )
            for label, runs in (profiles or {"another technique": []}).items()
        ),
    ]


def signed(value: float) -> str:
    """Formats a difference with its sign and one decimal."""
    # Neither -0.0 nor a hyphen.
    return f"{round(value, 1) + 0.0:+.1f}".replace("-", "\N{MINUS SIGN}")


def _with_interval(mean: float, interval: tuple[float, float] | None) -> str:
    text = signed(mean)
    if interval is not None:
        text += f" [{signed(interval[0])}, {signed(interval[1])}]"
    return text


def _percent(sparsity: float) -> str:
    return f"{100 * sparsity:.3g} %"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
