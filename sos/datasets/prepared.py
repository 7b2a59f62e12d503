"""Finds prepared data sets of TensorFlow Datasets."""

import os
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from sos.datasets.writer import import_tfds
from sos.errors import UsageError, reason

_INFO = "dataset_info.json"


def how_to_prepare(name: str, directory: str) -> str:
    """Says how a data set that TensorFlow Datasets defines is prepared.

    Args:
        name: Name of the data set.
        directory: The data directory.

    Returns:
        The beginning of a sentence.
    """
    return (
        "Prepare what TensorFlow Datasets defines with "
        f"`tensorflow_datasets.builder({name!r}, data_dir={directory!r})"
        ".download_and_prepare(file_format='tfrecord')`"
    )


def find(
    name: str,
    directory: str | os.PathLike | None,
    *,
    how_to_prepare: Callable[[str, str], str] = how_to_prepare,
) -> Any:
    """Returns the builder of a prepared data set. Nothing is downloaded.

    Args:
        name: Name of the data set, with a version ("NAME:1.0.0") or config
            ("NAME/CONFIG") if needed.
        directory: Data directory, `data_dir` of TensorFlow Datasets, which may
            be remote (`gs://`); by default its own, which the environment
            variable `TFDS_DATA_DIR` sets. It may also be the directory of the
            data set itself, which has a file dataset_info.json. Then `name` is
            not used.
        how_to_prepare: Maps the name and the directory to the last sentence of
            an error message.

    Returns:
        A `tfds.core.DatasetBuilder`.

    Raises:
        UsageError: If the data set is unknown, not prepared or unreadable.
        MissingPackageError: If tensorflow-datasets is not installed.
    """
    tfds = import_tfds()
    if directory is not None:
        directory = os.path.expanduser(os.fspath(directory))
        problem = _problem(directory)
        if problem:
            raise UsageError(
                "The data directory must exist and hold a prepared data set. "
                f"Received: {directory}, {problem}. "
                f"{how_to_prepare(name, directory)}"
            )
        if _has_info(directory):
            return _open(tfds, directory)
    place = directory or os.environ.get(
        "TFDS_DATA_DIR", os.path.expanduser("~/tensorflow_datasets")
    )
    try:
        builder = tfds.builder(name, data_dir=directory)
    except tfds.core.DatasetNotFoundError as error:
        raise UsageError(
            "The name must be that of a data set that is prepared in "
            f"{place} or defined by TensorFlow Datasets. Received: {name!r}. "
            f"{how_to_prepare(name, place)}"
        ) from error
    except Exception as error:
        raise _unreadable(f"{name!r} in {place}", error) from error
    prepared = os.fspath(builder.data_dir)
    if _has_info(prepared):
        return builder
    # TensorFlow Datasets looks for the newest version that it defines.
    parent = os.path.dirname(prepared)
    versions = [
        os.path.dirname(path)
        for path in tf.io.gfile.glob(os.path.join(parent, "*", _INFO))
    ]
    if not versions or ":" in name:
        raise UsageError(
            f"The data set {name!r} is not prepared: {prepared} does not exist "
            f"or has no {_INFO}. {how_to_prepare(name, place)}"
        )
    return _open(
        tfds,
        max(
            versions,
            key=lambda path: [
                int(part) if part.isdecimal() else -1
                for part in os.path.basename(path).split(".")
            ],
        ),
    )


def _has_info(directory: str) -> bool:
    return tf.io.gfile.exists(os.path.join(directory, _INFO))


def _open(tfds: Any, directory: str) -> Any:
    try:
        return tfds.builder_from_directory(directory)
    except Exception as error:
        raise _unreadable(f"in {directory}", error) from error


def _unreadable(place: str, error: Exception) -> UsageError:
    """Converts what TensorFlow Datasets raises for unreadable metadata.

    These are AssertionError, OSError, ValueError, and errors of the packages
    that it parses and downloads with. Any line of the message may have the
    cause.
    """
    message = " ".join(str(error).split()).rstrip(".:")
    return UsageError(
        f"The data set {place} cannot be read. Correct its name, or prepare it "
        "again with a present version of tensorflow-datasets. Cause: "
        f"{type(error).__name__}: {message}"
    )


def _problem(directory: str) -> str | None:
    """Says what is wrong with a data directory."""
    try:
        # `isdir` would hide why a remote directory cannot be read.
        if tf.io.gfile.stat(directory).is_directory:
            return None
        return "which is not a directory"
    except tf.errors.NotFoundError:
        return "which does not exist"
    except tf.errors.OpError as error:
        raise UsageError(
            f"The data directory {directory} cannot be read: {reason(error)}"
        ) from error
