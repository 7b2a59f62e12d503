"""Prints the sparsity of a saved model or a checkpoint."""

import argparse
import importlib
import math
import re
import sys
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import keras
import numpy as np
import tensorflow as tf
from tensorflow.core.protobuf import trackable_object_graph_pb2

from sos.errors import UsageError, reason
from sos.files import storage_errors
from sos.report import FIELDS, SparsityReport, sparsity_report
from sos.training import checkpoints
from sos.updater import set_hyperparameters
from sos.wrappers.base import find_wrappers
from sos.wrappers.l0 import mean_gate
from sos.wrappers.variational_dropout import VariationalDropout, log_alpha_of

_DEFAULT_THRESHOLD = 3.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command.

    Args:
        parser: The parser of the command.
    """
    parser.add_argument(
        "file",
        metavar="FILE",
        type=Path,
        help="a .keras file, a TensorFlow checkpoint (such as ckpt-500), a "
        "directory of checkpoints, of which the latest is read, or the "
        "directory of a run",
    )
    parser.add_argument(
        "--threshold",
        type=float,
        help="least log alpha of weights that variational dropout removes "
        f"(default: the saved one, or {_DEFAULT_THRESHOLD})",
    )
    parser.add_argument(
        "--csv", type=Path, metavar="OUT", help="also write the rows to a file"
    )
    parser.add_argument(
        "--import",
        action="append",
        default=[],
        dest="modules",
        metavar="MODULE",
        help="import a module first that registers custom classes",
    )


def run(options: argparse.Namespace) -> SparsityReport:
    """Reports the sparsity of a file, and writes the CSV file.

    Args:
        options: The arguments of the command.

    Returns:
        The report.

    Raises:
        UsageError: If an argument is invalid or the file cannot be read.
        StorageError: If the CSV file cannot be written.
    """
    report = _report(options)
    if options.csv is not None:
        with storage_errors(f"The table could not be written to {options.csv}"):
            report.save_csv(options.csv)
    return report


def _report(options: argparse.Namespace) -> SparsityReport:
    threshold = options.threshold
    if threshold is not None and not math.isfinite(threshold):
        raise UsageError(
            f"--threshold must be a finite number. Received: {threshold}"
        )
    if options.modules:
        # The console script does not search the working directory by itself,
        # as `python -m` does.
        sys.path.append("")
    for module in options.modules:
        # A module may raise any error while it is imported.
        try:
            importlib.import_module(module)
        except Exception as error:
            _fail(f"--import {module!r} failed", error)
    path = options.file
    if path.suffix == ".keras" and path.is_file():
        report = _report_of_model(path, threshold)
    else:
        prefix = _checkpoint_prefix(path)
        # Damaged files raise many kinds of errors.
        try:
            rows = _Checkpoint(prefix).rows(threshold)
        except Exception as error:
            _fail(f"{prefix} cannot be read as a checkpoint", error)
        report = SparsityReport(path.resolve().name, rows)
    techniques = {row["technique"] for row in report.rows}
    if threshold is not None and VariationalDropout.__name__ not in techniques:
        raise UsageError(
            "--threshold needs weights under variational dropout, which "
            f"{path} does not have. Received: --threshold={threshold}"
        )
    return report


def _fail(message: str, error: Exception) -> NoReturn:
    # Keras's message begins with the whole configuration.
    cause = re.search(r"Could not locate .*", str(error))
    line = cause.group() if cause else reason(error)
    if isinstance(error, LookupError | AttributeError | AssertionError):
        # The message of these may be a single name.
        line = f"{type(error).__name__}: {line}"
    raise UsageError(f"{message}: {line[:300]}") from error


def _report_of_model(path: Path, threshold: float | None) -> SparsityReport:
    _check_archive(path)
    with warnings.catch_warnings(record=True) as records:
        try:
            model = keras.models.load_model(path, compile=False)
        except Exception as error:
            _fail(
                f"{path} cannot be loaded (if it contains custom classes, "
                "name the module that registers them with --import)",
                error,
            )
    for warning in records:
        warnings.warn_explicit(
            warning.message, warning.category, warning.filename, warning.lineno
        )
    if threshold is not None and any(
        isinstance(wrapper, VariationalDropout)
        for wrapper in find_wrappers(model)
    ):
        set_hyperparameters(model, threshold=threshold)
    return sparsity_report(model)


def _check_archive(path: Path) -> None:
    """Raises an error if a file is not a zip archive or has a bad checksum.

    Keras reads the weights in parts, which does not verify checksums.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            member = archive.testzip()
    except Exception as error:
        _fail(f"{path} is damaged or not a .keras file", error)
    if member is not None:
        raise UsageError(
            f"{path} is damaged: its member {member!r} has a wrong checksum"
        )


def _checkpoint_prefix(path: Path) -> str:
    if path.is_dir():
        prefix = tf.train.latest_checkpoint(str(path))
        if prefix is None:
            prefix = checkpoints.latest_prefix(path)
        if prefix is None:
            raise UsageError(f"there is no checkpoint in {path}")
        return prefix
    prefix = path.with_suffix("") if path.suffix == ".index" else path
    if prefix.with_name(f"{prefix.name}.index").is_file():
        return str(prefix)
    if path.exists():
        raise UsageError(
            f"{path} is neither a .keras file nor a TensorFlow checkpoint"
        )
    raise UsageError(f"there is no file, directory or checkpoint {path}")


class _Checkpoint:
    """Reads the sparse weights of a checkpoint without the model.

    A checkpoint contains a graph of objects and their attributes. A technique
    is an object with variables named as its states (`kernel_mask`). It is a
    wrapper, with an attribute `layer`, or an attribute `technique_0` of its
    layer. Slots of optimizers belong to other objects, and are ignored.
    """

    def __init__(self, prefix: str) -> None:
        self._reader = tf.train.load_checkpoint(prefix)
        graph = trackable_object_graph_pb2.TrackableObjectGraph()
        graph.ParseFromString(
            self._reader.get_tensor("_CHECKPOINTABLE_OBJECT_GRAPH")
        )
        self._nodes = graph.nodes

    def rows(self, threshold: float | None) -> list[dict[str, Any]]:
        """Returns one row for every sparse weight.

        Args:
            threshold: Threshold of variational dropout; None for the saved one.

        Returns:
            The rows of a `SparsityReport`.

        Raises:
            ValueError: If the checkpoint has no sparse weights.
        """
        rows = []
        nodes: dict[tuple[str, ...], int] = {}
        for path, node in self._walk(0):
            nodes[tuple(path)] = node
            children = self._children(node)
            if re.fullmatch(r"technique_\d+", "".join(path[-1:])):
                path = path[:-1]
                children["layer"] = nodes[tuple(path)]
            if "layer" not in children:
                continue
            for name, child in children.items():
                for kind, technique, is_kept in (
                    ("mask", "mask", self._mask),
                    ("log_alpha", "L0Regularization", self._gate),
                    ("log_sigma2", "VariationalDropout", self._low_noise),
                ):
                    weight = name.removesuffix(f"_{kind}")
                    if weight == name or self._value(child) is None:
                        continue
                    nonzero = is_kept(weight, children, child, threshold)
                    rows.append(
                        _row([*path, weight], technique, np.asarray(nonzero))
                    )
        if not rows:
            raise ValueError("it holds no masks, log alphas or log sigmas")
        return rows

    def _mask(
        self, weight: str, children: dict, child: int, threshold: Any
    ) -> Any:
        return self._value(child) != 0

    def _gate(
        self, weight: str, children: dict, child: int, threshold: Any
    ) -> Any:
        return mean_gate(self._value(child)) > 0

    def _low_noise(
        self, weight: str, children: dict, child: int, threshold: Any
    ) -> Any:
        log_sigma2 = self._value(child)
        theta = self._wrapped_weight(
            weight, children["layer"], log_sigma2.shape
        )
        if threshold is None and "threshold_value" in children:
            threshold = self._value(children["threshold_value"])
        if threshold is None:
            threshold = _DEFAULT_THRESHOLD
        return log_alpha_of(theta, log_sigma2) < threshold

    def _wrapped_weight(
        self, weight: str, layer: int, shape: tuple[int, ...]
    ) -> np.ndarray:
        """Returns a layer's weight, found by its shape, then by its name."""
        candidates = {
            node: "_".join(path).split("_")
            for path, node in self._walk(layer)
            if self._shape(node) == shape
            # The layer may be a wrapper too.
            and not path[-1].endswith(("_mask", "_log_alpha", "_log_sigma2"))
        }
        if len(candidates) > 1:
            words = weight.split("_")
            candidates = {
                node: path
                for node, path in candidates.items()
                if path[-1] == words[-1] and _in_order(words, path)
            }
            shortest = min(map(len, candidates.values()), default=0)
            candidates = {
                node: path
                for node, path in candidates.items()
                if len(path) == shortest
            }
        if len(candidates) != 1:
            raise ValueError(
                f"its weight {weight!r} is missing or ambiguous; save the "
                "model to a .keras file and report that"
            )
        (node,) = candidates
        return self._value(node)

    def _children(self, node: int) -> dict[str, int]:
        return {
            child.local_name: child.node_id
            for child in self._nodes[node].children
        }

    def _walk(self, root: int) -> Iterator[tuple[list[str], int]]:
        """Yields the paths and nodes below a node, each once, nearest first."""
        seen = {root}
        queue: list[tuple[list[str], int]] = [([], root)]
        for path, node in queue:
            yield path, node
            for name, child in self._children(node).items():
                if child not in seen:
                    seen.add(child)
                    queue.append(([*path, name], child))

    def _key(self, node: int) -> str | None:
        attributes = self._nodes[node].attributes
        return attributes[0].checkpoint_key if attributes else None

    def _shape(self, node: int) -> tuple[int, ...] | None:
        key = self._key(node)
        if key is None:
            return None
        return tuple(self._reader.get_variable_to_shape_map()[key])

    def _value(self, node: int) -> np.ndarray | None:
        key = self._key(node)
        return None if key is None else self._reader.get_tensor(key)


def _in_order(words: list[str], path: list[str]) -> bool:
    remaining = iter(path)
    return all(word in remaining for word in words)


def _row(
    path: list[str], technique: str, nonzero: np.ndarray
) -> dict[str, Any]:
    nonzeros = int(np.count_nonzero(nonzero))
    # Attributes in which Keras keeps the layers of a model, and in which the
    # engine's checkpoints have them by name.
    attributes = ("_functional", "_operations", "sparse_layers")
    path = [p for p in path if p not in attributes]
    return {
        **dict.fromkeys(FIELDS),
        "layer": "/".join(path[:-1]),
        "weight": "/".join(path),
        "technique": technique,
        "rank": nonzero.ndim,
        "size": nonzero.size,
        "nonzeros": nonzeros,
        "sparsity": 1 - nonzeros / nonzero.size if nonzero.size else 0.0,
        "reason": "",
    }
