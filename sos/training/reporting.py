"""Where the records of a training go: terminal, JSON lines, TensorBoard.

A reporter is a callable that takes a `Summary`, with a `close`.
"""

import dataclasses
import json
import math
import numbers
import os
from collections.abc import Iterator, Mapping
from typing import Any

import rich.console
import rich.progress
import tensorflow as tf

from sos.event_file import EventFile
from sos.files import atomic_write


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
    """The figures of one host loop of training, or of one evaluation.

    Attributes:
        step: Number of optimizer steps done.
        total_steps: Number of optimizer steps of the whole training.
        kind: "train" for a host loop, "eval" for an evaluation.
        metrics: Means over the steps of the loop or over the evaluation set,
            by name, such as `loss` and `accuracy`.
        learning_rate: That of the step that comes next.
        sparsity: Fraction of zeros in all sparse weights together; None for a
            dense model.
        penalty: Sum of the techniques' penalties, as added to the loss.
        weight_sparsity: Fraction of zeros in each sparse weight, by its path.
        weight_penalty: The penalty of each weight that has one, by its path.
        examples_per_second: Examples of all replicas in a second.
        seconds: Duration of the loop or evaluation.
        seconds_left: An estimate of the time until training ends.
    """

    step: int
    total_steps: int
    kind: str = "train"
    metrics: Mapping[str, float]
    learning_rate: float | None = None
    sparsity: float | None = None
    penalty: float | None = None
    weight_sparsity: Mapping[str, float] = dataclasses.field(
        default_factory=dict
    )
    weight_penalty: Mapping[str, float] = dataclasses.field(
        default_factory=dict
    )
    examples_per_second: float | None = None
    seconds: float
    seconds_left: float | None = None


class Console:
    """Prints a line for every record, and on a terminal a progress bar below.

    Args:
        console: Where to write; by default the standard output.
    """

    def __init__(self, console: rich.console.Console | None = None) -> None:
        self.console = console or rich.console.Console(highlight=False)
        self._bar: rich.progress.Progress | None = None

    def __call__(self, record: Summary) -> None:
        """Prints a record."""
        if self.console.is_terminal and record.kind == "train":
            self._show_bar(record)
        self.console.print(
            describe(record), soft_wrap=True, markup=False, highlight=False
        )

    def close(self) -> None:
        """Takes the progress bar away; the lines stay."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _show_bar(self, record: Summary) -> None:
        left = record.seconds_left
        state = {
            "completed": record.step,
            "total": record.total_steps,
            "steps": f"{record.step:,} of {record.total_steps:,} steps",
            "left": "" if left is None else f"{_duration(left)} left",
        }
        if self._bar is not None:
            self._bar.update(self._task, refresh=True, **state)
            return
        self._bar = rich.progress.Progress(
            rich.progress.TextColumn("{task.fields[steps]}"),
            rich.progress.BarColumn(bar_width=None),
            rich.progress.TextColumn("{task.percentage:>3.0f}%"),
            rich.progress.TextColumn("{task.fields[left]}"),
            console=self.console,
            # Nothing changes between two records.
            auto_refresh=False,
            expand=True,
            transient=True,
        )
        self._task = self._bar.add_task("", **state)
        self._bar.start()
        # A process that is killed could not bring the cursor back.
        self.console.show_cursor(True)


def describe(record: Summary) -> str:
    """A record as one line for people.

    Args:
        record: The record.

    Returns:
        Such as `step 200/1,000  loss 2.302  sparsity 50.00%  0:15 left`.
    """
    parts = [f"step {record.step:,}/{record.total_steps:,}"]
    if record.kind != "train":
        parts.insert(0, record.kind)
    parts += [f"{key} {value:.4g}" for key, value in _metrics(record)]
    if record.learning_rate is not None:
        parts.append(f"learning rate {record.learning_rate:.3g}")
    if record.sparsity is not None:
        parts.append(f"sparsity {record.sparsity:.2%}")
    if record.penalty:
        parts.append(f"penalty {record.penalty:.4g}")
    if record.examples_per_second is not None:
        parts.append(f"{record.examples_per_second:,.0f} examples/s")
    if record.kind != "train":
        parts.append(f"took {_duration(record.seconds)}")
    elif record.seconds_left is not None:
        parts.append(f"{_duration(record.seconds_left)} left")
    return "  ".join(parts)


class JsonLines:
    """Appends a JSON object for every record to a file.

    The keys are the fields of `Summary`. What is None or empty is left out, and
    `null` stands for what is not finite, as JSON knows neither NaN nor
    infinity. A line is handed to the operating system before the call returns.

    The file belongs to one process at a time: opening it may replace it. On
    Google Cloud Storage (`gs://`), where nothing can be appended, TensorFlow
    uploads the whole file for each record.

    Args:
        path: The file; it and its directory are made if need be.
        resume_step: The step that training goes on from. Lines of later steps,
            which will be written again, are dropped. By default all are kept.

    Raises:
        ValueError: If the file holds something else than records. Only a last
            line that was cut off, as when the process was killed, is dropped.
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
            # Opened, and made if need be, by the first write only.
            self._file.write("")
            self._file.flush()

    def __call__(self, record: Summary) -> None:
        """Appends a record."""
        self._file.write(json.dumps(_to_json(record), allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _repair(self, last_step: float) -> None:
        """Drops lines of later steps and a last line that was cut off."""
        with tf.io.gfile.GFile(self.path, "rb") as file:
            old = file.read()
        new = b"".join(self._lines_until(old, last_step))
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

    def _lines_until(self, text: bytes, last_step: float) -> Iterator[bytes]:
        lines = text.splitlines()
        for number, line in enumerate(lines, start=1):
            try:
                step = json.loads(line)["step"]
                keep = step <= last_step
            except (ValueError, TypeError, KeyError) as error:
                # Cut off in the middle, a line has no closing brace.
                if number == len(lines) and not text.endswith(b"\n"):
                    return
                raise ValueError(
                    f"Line {number} of {self.path} is not a record of a "
                    "training. Repair the line, or move the file away. "
                    f"Received: {line[:80]!r}"
                ) from error
            if keep:
                yield line + b"\n"


class TensorBoard:
    """Writes the figures of every record for TensorBoard.

    Training goes to the subfolder `train`, evaluations to `eval`, so that a
    chart shows both as two runs. The tags are the names of the metrics,
    `learning_rate`, `sparsity`, `penalty` and `examples_per_second`, and for
    each weight `sparsity/<path>` and `penalty/<path>`.

    The package `tensorboard` is needed to look at the files only.

    Args:
        directory: The log directory; `gs://` works too.
        resume_step: The step that training goes on from. What was written for
            later steps is no longer shown. By default all is.
    """

    def __init__(
        self, directory: str | os.PathLike, *, resume_step: int | None = None
    ) -> None:
        self.directory = os.fspath(directory)
        self._resume_step = resume_step
        self._files: dict[str, EventFile] = {}

    def __call__(self, record: Summary) -> None:
        """Writes the figures of a record."""
        if record.kind not in self._files:
            self._files[record.kind] = EventFile(
                os.path.join(self.directory, record.kind),
                resume_step=self._resume_step,
            )
        self._files[record.kind].write(record.step, _scalars(record))

    def close(self) -> None:
        """Closes the files."""
        for file in self._files.values():
            file.close()
        self._files = {}


def _metrics(record: Summary) -> list[tuple[str, float]]:
    """The metrics with the loss in front."""
    return sorted(record.metrics.items(), key=lambda item: item[0] != "loss")


def _scalars(record: Summary) -> dict[str, float]:
    """The figures of a record by TensorBoard tag."""
    scalars = dict(record.metrics)
    for name in (
        "learning_rate",
        "sparsity",
        "penalty",
        "examples_per_second",
    ):
        value = getattr(record, name)
        if value is not None:
            scalars[name] = value
    for path, value in record.weight_sparsity.items():
        scalars[f"sparsity/{path}"] = value
    for path, value in record.weight_penalty.items():
        scalars[f"penalty/{path}"] = value
    return scalars


def _to_json(record: Summary) -> dict[str, Any]:
    fields = {
        field.name: getattr(record, field.name)
        for field in dataclasses.fields(record)
    }
    return {
        name: _plain(value)
        for name, value in fields.items()
        if value is not None and value != {}
    }


def _plain(value: Any) -> Any:
    """The value in types that JSON has."""
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value) if math.isfinite(value) else None
    return value


def _is_local(path: str) -> bool:
    return "://" not in path


def _duration(seconds: float) -> str:
    """Hours, minutes and seconds, as in 1:03:05, or 3:05."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02d}:{seconds:02d}"
    return f"{minutes}:{seconds:02d}"
