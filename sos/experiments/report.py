"""A study as one page of HTML that needs no other file."""

import itertools
import json
import statistics
import traceback
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from matplotlib.figure import Figure

from sos.experiments import conclusions, differences, figures, tables
from sos.experiments import config as config_lib
from sos.experiments.results import FinishedRun
from sos.experiments.scores import shared_score
from sos.files import atomic_write, storage_errors
from sos.training.reporting import format_duration

REPORT = "report.html"

# Figures that are wider do not share a row.
_COLUMN_INCHES = 7
# Entries of configs that tell runs apart, and have columns of their own.
_OWN_COLUMNS = ("label", "parent", "seed")


def draw_figures(
    study: figures.Study,
) -> tuple[list[tuple[figures.FigureSpec, Figure]], dict[str, str]]:
    """Draws the figures of a study; a fault in one does not stop the others.

    Args:
        study: The runs.

    Returns:
        The figures that have something to show, and the traceback of each that
        failed, by name.
    """
    drawn, failures = [], {}
    for spec in figures.FIGURES:
        # A damaged file or a user's task may cause any error.
        try:
            figure = spec.draw(study)
        except Exception:
            failures[spec.name] = traceback.format_exc()
            continue
        if figure is not None:
            drawn.append((spec, figure))
    return drawn, failures


def write_report(
    path: Path,
    study: figures.Study,
    drawn: Iterable[tuple[figures.FigureSpec, Figure]],
    *,
    command: str,
    eval_examples: int | None = None,
) -> None:
    """Writes the report of a study, atomically.

    Args:
        path: The file.
        study: The runs, of which there is at least one.
        drawn: The figures to show.
        command: The command that makes the study.
        eval_examples: Number of evaluation examples; None if it is not known.

    Raises:
        StorageError: If the file cannot be written.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "data"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {
        "signed": conclusions.signed,
        "duration": format_duration,
        "value": _format,
        # So that no line begins with the sign.
        "percents": lambda text: text.replace(" %", "\N{NO-BREAK SPACE}%"),
    }
    runs = study.runs
    findings = conclusions.findings(runs, eval_examples=eval_examples)
    table = tables.score_table(runs)
    shared, by_label = _settings(runs)
    text = environment.get_template("report.html.j2").render(
        title=_title(runs),
        summary=_summary(runs, findings),
        topics={
            topic: list(group)
            for topic, group in itertools.groupby(findings, lambda f: f.topic)
        },
        eval_examples=eval_examples,
        method=conclusions.method(study.score),
        score=study.score,
        figures=[
            (
                spec.named(study.score),
                figures.svg(figure, spec.name),
                figure.get_figwidth() > _COLUMN_INCHES,
            )
            for spec, figure in drawn
        ],
        table=table,
        best=[
            max((cell.mean for cell in column if cell), default=None)
            for column in zip(*(cells for _, cells in table.rows), strict=True)
        ],
        runs=runs,
        metrics=[*dict.fromkeys(m for run in runs for m in run.result.metrics)],
        labels=Counter(run.label for run in runs),
        shared=shared,
        by_label=by_label,
        versions=_distinct(run.result.versions for run in runs),
        machine=_distinct(run.result.machine for run in runs),
        training_seconds=sum(run.result.seconds for run in runs),
        command=command,
    )
    with (
        storage_errors(f"{path} could not be written"),
        atomic_write(path) as temporary,
    ):
        temporary.write_text(text, encoding="utf-8")


def _title(runs: Sequence[FinishedRun]) -> str:
    tasks = {run.config["task"].rpartition(":")[2] for run in runs}
    return f"A study of sparsity: {', '.join(sorted(tasks))}"


def _summary(
    runs: Sequence[FinishedRun], findings: Sequence[conclusions.Finding]
) -> str:
    """Returns sentences with the main numbers."""
    seeds = len({differences.seed_of(run) for run in runs})
    techniques = {
        run.label
        for run in runs
        if run.branch is None and run.result.sparsity is not None
    }
    branches = {r.label for r in runs if r.branch is not None}
    parts = [_count(len(techniques), "technique")]
    if branches:
        parts.append(_count(len(branches), "kind") + " of branches")
    sentences = [
        f"{_count(len(runs), 'run')} of {' and '.join(parts)}, with "
        f"{_count(seeds, 'seed')}."
    ]
    score = shared_score(runs)
    dense = [
        value
        for run in runs
        if run.result.sparsity is None
        and (value := differences.score(run)) is not None
    ]
    if dense:
        mean = f"{statistics.fmean(dense):.1f} {score.unit}".rstrip()
        sentences.append(f"Dense networks reach {mean} {score.label}.")
    counts = Counter(f.verdict for f in findings if f.topic != conclusions.BEST)
    verdicts = [
        f"{counts[verdict]} {singular if counts[verdict] == 1 else plural}"
        for verdict, singular, plural in (
            ("holds", "holds", "hold"),
            ("does not hold", "does not", "do not"),
            ("undecided", "is undecided", "are undecided"),
            ("not tested", "is not tested", "are not tested"),
        )
        if counts[verdict]
    ]
    sentences.append(
        f"Of {counts.total()} statements on them, {_join(verdicts)}."
    )
    return " ".join(sentences)


def _settings(
    runs: Sequence[FinishedRun],
) -> tuple[dict[str, Any], dict[str, dict[str, list[Any]]]]:
    """Returns the entries that all configs share, and by label the others."""
    configs = [config_lib.flatten(run.config) for run in runs]
    names = dict.fromkeys(name for config in configs for name in config)
    shared: dict[str, Any] = {}
    by_label: dict[str, dict[str, list[Any]]] = {run.label: {} for run in runs}
    for name in names:
        values = [config.get(name) for config in configs]
        if all(value == values[0] for value in values):
            shared[name] = values[0]
        elif name not in _OWN_COLUMNS:
            for run, value in zip(runs, values, strict=True):
                if value is not None:
                    known = by_label[run.label].setdefault(name, [])
                    if value not in known:
                        known.append(value)
    return shared, by_label


def _distinct(
    mappings: Iterable[Mapping[str, str]],
) -> dict[str, list[str]]:
    """Returns the distinct values of each name."""
    values: dict[str, dict[str, None]] = {}
    for mapping in mappings:
        for name, value in mapping.items():
            values.setdefault(name, {})[value] = None
    return {name: [*distinct] for name, distinct in values.items()}


def _format(value: Any) -> str:
    if value is None or isinstance(value, list | dict | bool):
        return json.dumps(value)
    return config_lib.format_value(value, digits=6)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _join(words: Sequence[str]) -> str:
    if len(words) < 2:
        return "".join(words)
    return f"{', '.join(words[:-1])} and {words[-1]}"
