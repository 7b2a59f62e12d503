"""The SavedModel format of TensorFlow Serving, written atomically."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import tensorflow as tf

from sos.errors import StorageError
from sos.export.serving import concrete_signatures
from sos.files import atomic_directory, storage_errors


def write(module: tf.Module, path: str) -> None:
    """Writes a module and its signatures as a SavedModel.

    Args:
        module: The module, with an attribute `signatures`.
        path: The directory to write. An existing SavedModel is replaced.

    Raises:
        UsageError: If `signatures` is invalid.
        StorageError: If `path` holds anything other than a SavedModel, or
            cannot be written.
    """
    # Traced first, so that any later error of TensorFlow is due to the disk.
    signatures = concrete_signatures(module)
    open_directory = _upload if "://" in path else atomic_directory
    with storage_errors(f"The model could not be exported to {path}"):
        _check_path(path)
        with _without_signatures(module), open_directory(path) as temporary:
            tf.saved_model.save(
                module, os.fspath(temporary), signatures=signatures
            )


@contextmanager
def _without_signatures(module: tf.Module) -> Iterator[None]:
    """Removes the attribute `signatures`, whose name SavedModels reserve."""
    signatures = vars(module).get("signatures")
    if signatures is None:
        # A property, which TensorFlow does not track.
        yield
        return
    del module.signatures
    try:
        yield
    finally:
        module.signatures = signatures


def _check_path(path: str) -> None:
    gfile = tf.io.gfile
    if not gfile.exists(path) or tf.saved_model.contains_saved_model(path):
        return
    if gfile.isdir(path) and not gfile.listdir(path):
        return
    raise StorageError(
        "An export replaces only a SavedModel, but the path holds something "
        f"else. Move it away or choose another path. Received: path={path!r}"
    )


@contextmanager
def _upload(path: str) -> Iterator[str]:
    """Yields a local directory that is copied to `path` on success.

    Object stores cannot rename directories. `saved_model.pb`, which makes a
    directory a SavedModel, is removed first and written last.
    """
    gfile = tf.io.gfile
    with tempfile.TemporaryDirectory() as temporary:
        yield temporary
        if gfile.exists(path):
            if tf.saved_model.contains_saved_model(path):
                gfile.remove(f"{path}/saved_model.pb")
            gfile.rmtree(path)
        files = [file for file in Path(temporary).rglob("*") if file.is_file()]
        for file in sorted(files, key=lambda x: x.name == "saved_model.pb"):
            new = f"{path}/{file.relative_to(temporary).as_posix()}"
            gfile.makedirs(os.path.dirname(new))
            gfile.copy(str(file), new)
