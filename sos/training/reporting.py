"""Reporters of training: terminal, progress bar, JSON lines, TensorBoard.

A reporter is a callable that takes a `Summary`, with a method `close`.
"""

import dataclasses
import json
import math
import numbers
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import rich.console
import rich.progress
import tensorflow as tf

from sos.errors import StorageError
from sos.event_file import EventFile
from sos.files import atomic_write
from sos.wrappers.mask_changes import MaskChanges


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskUpdate(MaskChanges):
    """An update of masks.

    Attributes:
        step: Number of completed optimizer steps.
        elements: Number of elements of all updated masks.
        kept: Number of ones after the update.
        pruned: Number of elements that changed from 1 to 0.
        regrown: Number of elements that changed from 0 to 1.

    Example:
    >>> import sos.training
    >>> update = sos.training.MaskUpdate(
    ...     step=100, elements=1000, kept=500, pruned=120, regrown=20
    ... )
    >>> update.churn, update.least_churn
    (0.14, 0.1)
    """

    step: int

    @property
    def churn(self) -> float:
        """Fraction of all elements that changed."""
        return (self.pruned + self.regrown) / max(self.elements, 1)

    @property
    def least_churn(self) -> float:
        """Fraction that had to change to reach the number of ones."""
        return abs(self.pruned - self.regrown) / max(self.elements, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
    """The metrics of one host loop of training, or of one evaluation.

    Attributes:
        step: Number of completed optimizer steps.
        total_steps: Total number of optimizer steps.
        kind: "train" for a host loop, "eval" for an evaluation.
        metrics: Means over the steps of the loop or over the evaluation data,
            by name, for example `loss` and `accuracy`.
        texts: Strings of the task's evaluators by name, for example the
            signature of a BLEU score.
        learning_rate: Learning rate of the next step.
        sparsity: Fraction of zeros in all sparse weights; None for a dense
            model.
        penalty: Sum of the techniques' penalties, as added to the loss; None
            for evaluations.
        weight_sparsity: Fraction of zeros in each sparse weight, by its path.
        weight_penalty: Penalty of each weight that has one, by its path.
        mask_updates: The mask updates of the loop, in order.
        examples_per_second: Examples of all replicas per second.
        seconds: Duration of the loop or evaluation in seconds.
        seconds_left: Estimated seconds until training ends.

    Example:
    >>> import sos.training
    >>> summary = sos.training.Summary(
    ...     step=200, total_steps=1000, seconds=1.5
    ... )
    >>> print(summary.to_json())
    {"step": 200, "total_steps": 1000, "kind": "train", "seconds": 1.5}
    """

    step: int
    total_steps: int
    kind: str = "train"
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
    texts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    learning_rate: float | None = None
    sparsity: float | None = None
    penalty: float | None = None
    weight_sparsity: Mapping[str, float] = dataclasses.field(
        default_factory=dict
    )
    weight_penalty: Mapping[str, float] = dataclasses.field(
        default_factory=dict
    )
    mask_updates: Sequence[MaskUpdate] = ()
    examples_per_second: float | None = None
    seconds: float
    seconds_left: float | None = None

    def to_json(self) -> str:
        """Returns a JSON object without line breaks.

        Its keys are the fields of the summary, except those that are None or
        empty. NaN and infinity, which JSON lacks, become `null`.
        """
        fields = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
        }
        fields["mask_updates"] = [
            dataclasses.asdict(update) for update in self.mask_updates
        ]
        return json.dumps(
            {
                name: _to_plain(value)
                for name, value in fields.items()
                if value is not None and value not in ({}, [])
            },
            allow_nan=False,
        )

    @classmethod
    def from_json(cls, text: str | bytes) -> "Summary":
        """Returns the summary in a JSON object of `to_json`.

        Args:
            text: A JSON object. Unknown keys are ignored.

        Returns:
            The summary, with NaN instead of `null`.

        Raises:
            ValueError: If `text` is not the JSON of a summary.
        """
        try:
            values = json.loads(text)
            values["mask_updates"] = tuple(
                MaskUpdate(**_fields_of(MaskUpdate, update))
                for update in values.get("mask_updates", ())
            )
            summary = cls(
                **{
                    name: _from_plain(value)
                    for name, value in _fields_of(cls, values).items()
                }
            )
            if not isinstance(summary.step, int):
                raise TypeError("step")
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(
                "Expected a JSON object with the fields of a summary. "
                f"Received: {text[:80]!r}"
            ) from error
        return summary


class ProgressBar:
    """A progress bar below the lines of a terminal.

    Draws nothing if the output is not a terminal. Only one bar may be open at a
    time.

    Args:
        console: Console to draw on; stdout by default.

    Example:
    >>> import sos.training
    >>> with sos.training.ProgressBar() as bar:
    ...     for run in range(10):
    ...         bar.update(run, 10, f"{run} of 10 runs", seconds_left=60.0)
    """

    def __init__(self, console: rich.console.Console | None = None) -> None:
        self.console = console or rich.console.Console(highlight=False)
        self._bar: rich.progress.Progress | None = None

    def update(
        self,
        completed: float,
        total: float,
        description: str = "",
        *,
        seconds_left: float | None = None,
    ) -> None:
        """Draws or redraws the bar.

        Args:
            completed: Completed amount, in any unit.
            total: Total amount, in the same unit.
            description: Text in front of the bar.
            seconds_left: Estimated seconds left, if known.
        """
        if not self.console.is_terminal:
            return
        state = {
            "completed": completed,
            "total": total,
            "description": description,
            "time_left": (
                ""
                if seconds_left is None
                else f"{format_duration(seconds_left)} left"
            ),
        }
        if self._bar is not None:
            self._bar.update(self._task, refresh=True, **state)
            return
        self._bar = rich.progress.Progress(
            rich.progress.TextColumn("{task.description}", markup=False),
            rich.progress.BarColumn(bar_width=None),
            rich.progress.TextColumn("{task.percentage:>3.0f}%"),
            rich.progress.TextColumn("{task.fields[time_left]}"),
            console=self.console,
            # The bar changes only in `update`.
            auto_refresh=False,
            expand=True,
            transient=True,
        )
        self._task = self._bar.add_task(**state)
        self._bar.start()
        # A killed process could not restore a hidden cursor.
        self.console.show_cursor(True)

    def close(self) -> None:
        """Removes the bar. The next `update` draws a new one."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class Console:
    """Reporter that prints a line per summary and, on a terminal, a bar.

    Args:
        console: Console to print to; stdout by default.

    Example:
    >>> import sos.training
    >>> report = sos.training.Console()
    >>> report(
    ...     sos.training.Summary(
    ...         step=200, total_steps=1000, metrics={"loss": 0.25}, seconds=1.5
    ...     )
    ... )
    step 200/1,000  loss 0.25
    >>> report.close()
    """

    def __init__(self, console: rich.console.Console | None = None) -> None:
        self._bar = ProgressBar(console)
        self.console = self._bar.console

    def __call__(self, summary: Summary) -> None:
        """Prints a summary."""
        if summary.kind == "train":
            self._bar.update(
                summary.step,
                summary.total_steps,
                f"{summary.step:,} of {summary.total_steps:,} steps",
                seconds_left=summary.seconds_left,
            )
        self.console.print(
            format_summary(summary),
            soft_wrap=True,
            markup=False,
            highlight=False,
        )

    def close(self) -> None:
        """Removes the progress bar, but not the lines."""
        self._bar.close()


def format_summary(summary: Summary) -> str:
    """Returns a summary as one line of text.

    Args:
        summary: The summary.

    Returns:
        For example `step 200/1,000  loss 2.302  sparsity 50.00%  0:15 left`.
    """
    parts = [f"step {summary.step:,}/{summary.total_steps:,}"]
    if summary.kind != "train":
        parts.insert(0, summary.kind)
    parts += [f"{key} {value:.4g}" for key, value in _metrics(summary)]
    if summary.learning_rate is not None:
        parts.append(f"learning rate {summary.learning_rate:.3g}")
    if summary.sparsity is not None:
        parts.append(f"sparsity {summary.sparsity:.2%}")
    if summary.penalty:
        parts.append(f"penalty {summary.penalty:.4g}")
    if summary.examples_per_second is not None:
        parts.append(f"{summary.examples_per_second:,.0f} examples/s")
    if summary.kind != "train":
        parts.append(f"took {format_duration(summary.seconds)}")
    elif summary.seconds_left is not None:
        parts.append(f"{format_duration(summary.seconds_left)} left")
    # Last, because they are long.
    parts += [f"{name} {text}" for name, text in summary.texts.items()]
    return "  ".join(parts)


def format_duration(seconds: float) -> str:
    """Returns a duration as hours, minutes and seconds.

    Args:
        seconds: The duration in seconds.

    Returns:
        For example "1:03:05", or "3:05" below one hour.
    """
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02d}:{seconds:02d}"
    return f"{minutes}:{seconds:02d}"


class JsonLines:
    """Reporter that appends each summary to a file, as a line of JSON.

    See `Summary.to_json` for the format and `read_summaries` for reading. A
    line is handed to the operating system before the call returns.

    Opening drops a truncated last line, as a killed process leaves it. Only one
    process may write to the file at a time. On Google Cloud Storage (`gs://`),
    where files cannot be appended to, TensorFlow uploads the whole file for
    each summary.

    Args:
        path: The file; it and its directory are created if needed.
        resume_step: Step at which training resumes. Lines of later steps, which
            will be written again, are dropped. By default all are kept.

    Raises:
        StorageError: If the file holds anything other than summaries.

    Example:
    >>> import sos.training
    >>> report = sos.training.JsonLines("log.jsonl")
    >>> report(sos.training.Summary(step=200, total_steps=1000, seconds=1.5))
    >>> report.close()
    >>> sos.training.read_summaries("log.jsonl")[0].step
    200
    """

    def __init__(
        self, path: str | os.PathLike, *, resume_step: int | None = None
    ) -> None:
        self.path = os.fspath(path)
        directory = os.path.dirname(self.path)
        if directory:
            tf.io.gfile.makedirs(directory)
        if tf.io.gfile.exists(self.path):
            self._repair(math.inf if resume_step is None else resume_step)
        if _is_local(self.path):
            self._file = open(self.path, "a", encoding="utf-8")
        else:
            self._file = tf.io.gfile.GFile(self.path, "a")
            # The first write opens the file, and creates it if needed.
            self._file.write("")
            self._file.flush()

    def __call__(self, summary: Summary) -> None:
        """Appends a summary."""
        self._file.write(summary.to_json() + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _repair(self, last_step: float) -> None:
        """Drops lines of later steps and a truncated last line."""
        with tf.io.gfile.GFile(self.path, "rb") as file:
            old = file.read()
        new = b"".join(
            line + b"\n"
            for line, summary in _parse(self.path, old)
            if summary.step <= last_step
        )
        if new == old:
            return
        if _is_local(self.path):
            with atomic_write(self.path) as temporary:
                temporary.write_bytes(new)
        else:
            temporary = f"{self.path}.repaired"
            with tf.io.gfile.GFile(temporary, "wb") as file:
                file.write(new)
            tf.io.gfile.rename(temporary, self.path, overwrite=True)


def read_summaries(path: str | os.PathLike) -> list[Summary]:
    """Reads a file of `JsonLines`, even while it is being written.

    Args:
        path: The file; may be a `gs://` path.

    Returns:
        The summaries in order, without a truncated last line; an empty list if
        the file does not exist.

    Raises:
        StorageError: If the file holds anything other than summaries.

    Example:
    >>> import sos.training
    >>> sos.training.read_summaries("missing.jsonl")
    []
    """
    path = os.fspath(path)
    if not tf.io.gfile.exists(path):
        return []
    with tf.io.gfile.GFile(path, "rb") as file:
        return [summary for _, summary in _parse(path, file.read())]


def _parse(path: str, text: bytes) -> Iterator[tuple[bytes, Summary]]:
    """Yields each line of a file without its end, and its summary."""
    lines = text.splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            summary = Summary.from_json(line)
        except ValueError as error:
            # A truncated line lacks the closing brace.
            if number == len(lines) and not text.endswith(b"\n"):
                return
            raise StorageError(
                f"Line {number} of {path} is not a summary of training. "
                "Repair the line, or move the file away. "
                f"Received: {line[:80]!r}"
            ) from error
        yield line, summary


class TensorBoard:
    """Reporter that writes event files for TensorBoard.

    Summaries of training go to the subdirectory `train`, those of evaluations
    to `eval`, so TensorBoard charts them as two runs. The tags are the names of
    the metrics, `learning_rate`, `sparsity`, `penalty` and
    `examples_per_second`, for each weight `sparsity/<path>` and
    `penalty/<path>`, and for each mask update `mask_churn`, the fraction of
    elements that changed.

    Writing does not need the package `tensorboard`.

    Args:
        directory: The log directory; may be a `gs://` path.
        resume_step: Step at which training resumes. TensorBoard then hides what
            was written for later steps. By default it shows everything.

    Example:
    >>> import sos.training
    >>> report = sos.training.TensorBoard("logs")
    >>> report(
    ...     sos.training.Summary(
    ...         step=200, total_steps=1000, metrics={"loss": 0.25}, seconds=1.5
    ...     )
    ... )
    >>> report.close()
    """

    def __init__(
        self, directory: str | os.PathLike, *, resume_step: int | None = None
    ) -> None:
        self.directory = os.fspath(directory)
        self._resume_step = resume_step
        self._files: dict[str, EventFile] = {}

    def __call__(self, summary: Summary) -> None:
        """Writes a summary."""
        if summary.kind not in self._files:
            self._files[summary.kind] = EventFile(
                os.path.join(self.directory, summary.kind),
                resume_step=self._resume_step,
            )
        file = self._files[summary.kind]
        for update in summary.mask_updates:
            file.write(update.step, {"mask_churn": update.churn})
        file.write(summary.step, _scalars(summary))

    def close(self) -> None:
        """Closes the files."""
        for file in self._files.values():
            file.close()
        self._files = {}


def _metrics(summary: Summary) -> list[tuple[str, float]]:
    """Returns the metrics, the loss first."""
    return sorted(summary.metrics.items(), key=lambda item: item[0] != "loss")


def _scalars(summary: Summary) -> dict[str, float]:
    """Returns the scalars of a summary by TensorBoard tag."""
    scalars = dict(summary.metrics)
    for name in (
        "learning_rate",
        "sparsity",
        "penalty",
        "examples_per_second",
    ):
        value = getattr(summary, name)
        if value is not None:
            scalars[name] = value
    for path, value in summary.weight_sparsity.items():
        scalars[f"sparsity/{path}"] = value
    for path, value in summary.weight_penalty.items():
        scalars[f"penalty/{path}"] = value
    return scalars


def _to_plain(value: Any) -> Any:
    """Converts a value to JSON types."""
    if isinstance(value, Mapping):
        return {key: _to_plain(entry) for key, entry in value.items()}
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value) if math.isfinite(value) else None
    return value


def _fields_of(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values that are fields of a dataclass."""
    names = {field.name for field in dataclasses.fields(cls)}
    return {name: value for name, value in values.items() if name in names}


def _from_plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _from_plain(entry) for key, entry in value.items()}
    return math.nan if value is None else value


def _is_local(path: str) -> bool:
    return "://" not in path
