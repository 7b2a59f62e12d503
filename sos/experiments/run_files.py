"""The files of a run's directory."""

import dataclasses
import io
import json
import os
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from sos.errors import StorageError
from sos.experiments.scores import ACCURACY, ScoreMetric
from sos.files import write_bytes, write_text

CONFIG = "config.json"
MASKS = "masks.npz"
RESULT = "result.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightSparsity:
    """Sparsity of one weight of a trained network.

    Attributes:
        path: Path of the weight in the dense network.
        size: Number of elements.
        sparsity: Fraction of zeros in evaluation.
        kind: Kind of its layer, such as "attention output"; None if the task
            names none.
    """

    path: str
    size: int
    sparsity: float
    kind: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """Result of a finished run, stored in `result.json`.

    Attributes:
        step: Number of optimizer steps.
        metrics: Metrics of the last evaluation by name; empty if the task has
            no evaluation data.
        texts: Strings of the task's evaluators by name, for example the
            signature of a BLEU score.
        sparsity: Fraction of zeros in the sparse weights, in evaluation; None
            for a dense model.
        model_sparsity: Fraction of zeros in all weights of the model.
        seconds: Total training time in seconds, including time before
            restarts, and tracing unless the run shared a compiled step.
        parameters: Number of elements of all trainable variables, including
            those that the technique adds.
        weights: All weights of rank 2 or more, in the order of the network.
        versions: Versions of the packages by name.
        multiply_adds: Multiply-adds of one example in evaluation that the
            nonzero weights need; None if unknown for a weight.
        dense_multiply_adds: The same for all weights.
        machine: Properties of the machine by name; see `describe_machine`.
        score: The metric by which runs are compared.
        ignored_entries: Dotted names of further config entries that do not
            change the result; those of the task.

    Example:
    >>> import sos.experiments
    >>> config = {
    ...     "task": "models.fashion_mnist:FashionMnist",
    ...     "sparsity": {"technique": "MagnitudePruning", "sparsity": 0.9},
    ...     "train_steps": 2,
    ... }
    >>> result = sos.experiments.run(config, "runs", quiet=True)
    >>> sorted(result.metrics)
    ['accuracy', 'loss']
    >>> result.weights[0].path, result.weights[0].size
    ('conv1/kernel', 144)
    """

    step: int
    metrics: Mapping[str, float]
    sparsity: float | None
    model_sparsity: float
    seconds: float
    parameters: int
    weights: tuple[WeightSparsity, ...]
    versions: Mapping[str, str]
    multiply_adds: int | None = None
    dense_multiply_adds: int | None = None
    machine: Mapping[str, str] = dataclasses.field(default_factory=dict)
    texts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    # Runs of older versions store none.
    score: ScoreMetric = ACCURACY
    ignored_entries: tuple[str, ...] = ()

    @property
    def score_value(self) -> float | None:
        """The score, in percent or its own unit; None if it has none."""
        return self.score.of(self.metrics)


def read_config(directory: str) -> dict[str, Any] | None:
    """Returns the stored config of a run; None if there is none.

    Args:
        directory: Directory of the run.

    Raises:
        StorageError: If the file is damaged or cannot be read.
    """
    config = _read_json(os.path.join(directory, CONFIG))
    if config is not None and not isinstance(config, dict):
        raise _damaged_file_error(
            os.path.join(directory, CONFIG), "not a mapping"
        )
    return config


def read_result(directory: str) -> Result | None:
    """Returns the result of a run; None if it is not finished.

    Args:
        directory: Directory of the run.

    Raises:
        StorageError: If the file is damaged or cannot be read.
    """
    path = os.path.join(directory, RESULT)
    content = _read_json(path)
    if content is None:
        return None
    try:
        weights = tuple(WeightSparsity(**w) for w in content.pop("weights"))
        if "score" in content:
            content["score"] = ScoreMetric(**content["score"])
        ignored = tuple(content.pop("ignored_entries", ()))
        result = Result(**content, weights=weights, ignored_entries=ignored)
        _check_result(result)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise _damaged_file_error(
            path, f"{type(error).__name__}: {error}"
        ) from error
    return result


def read_masks(directory: str) -> dict[str, np.ndarray] | None:
    """Returns the masks of a finished run; None if it has no sparse weights.

    Args:
        directory: Directory of the run.

    Returns:
        uint8 arrays, 1 = kept, by the path of the weight, as from
        `sos.get_masks`.

    Raises:
        StorageError: If the file is damaged or cannot be read.
    """
    path = os.path.join(directory, MASKS)
    try:
        if not tf.io.gfile.exists(path):
            return None
        with tf.io.gfile.GFile(path, "rb") as file:
            content = io.BytesIO(file.read())
        with np.load(content, allow_pickle=False) as masks:
            return dict(masks)
    except (
        # Of a compression method or encryption that was never used.
        RuntimeError,
        ValueError,
        EOFError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise _damaged_file_error(path, str(error)) from error
    except (tf.errors.OpError, OSError) as error:
        raise StorageError(f"{path} cannot be read: {error}") from error


def write_config(values: Mapping[str, Any], directory: str) -> None:
    """Writes the config of a run, unless the stored one is equal.

    Args:
        values: JSON values.
        directory: Directory of the run.

    Raises:
        StorageError: If the file is damaged, or cannot be read or written.
    """
    if read_config(directory) != values:
        write_text(os.path.join(directory, CONFIG), _to_json(values))


def write_result(
    result: Result, masks: Mapping[str, np.ndarray], directory: str
) -> None:
    """Writes the masks, if there are any, and the result of a finished run.

    Args:
        result: The result.
        masks: The masks, as from `sos.get_masks`.
        directory: Directory of the run.

    Raises:
        StorageError: If a file cannot be written.
    """
    if masks:
        content = io.BytesIO()
        np.savez_compressed(content, **masks)
        write_bytes(os.path.join(directory, MASKS), content.getvalue())
    # Last, because it says that the run is finished.
    write_text(
        os.path.join(directory, RESULT), _to_json(dataclasses.asdict(result))
    )


def _check_result(result: Result) -> None:
    """Raises `ValueError` if a value is not a number."""
    numbers = {
        "step": result.step,
        "model_sparsity": result.model_sparsity,
        "seconds": result.seconds,
        "parameters": result.parameters,
        **result.metrics,
        **{weight.path: weight.sparsity for weight in result.weights},
    }
    for name in ("sparsity", "multiply_adds", "dense_multiply_adds"):
        if getattr(result, name) is not None:
            numbers[name] = getattr(result, name)
    for name, value in numbers.items():
        if type(value) not in (int, float):
            raise ValueError(f"{name} is {value!r}")


def _read_json(path: str) -> Any:
    """Returns the content of a JSON file; None if it does not exist."""
    try:
        if not tf.io.gfile.exists(path):
            return None
        with tf.io.gfile.GFile(path) as file:
            return json.loads(file.read())
    except ValueError as error:
        raise _damaged_file_error(path, str(error)) from error
    except (tf.errors.OpError, OSError) as error:
        raise StorageError(f"{path} cannot be read: {error}") from error


def _damaged_file_error(path: str, reason: str) -> StorageError:
    return StorageError(
        f"{path} is damaged or not a file of a run ({reason}). Move the "
        "directory away to repeat the run."
    )


def _to_json(values: Mapping[str, Any]) -> str:
    return json.dumps(values, indent=1) + "\n"
