"""Checkpoints that are complete or absent."""

import contextlib
import json
import os
import re
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

import keras
import tensorflow as tf
from absl import logging

from sos.errors import CheckpointError, DamagedCheckpointError
from sos.files import sync_directory, sync_tree

_FOLDER = re.compile(r"step-(\d{8,})")
_METADATA = "metadata.json"
_VARIABLES = "variables"
_TEMPORARY = ".writing-"
# Errors that say nothing of the files: what they are of may pass.
_LOST_WORKER = (
    tf.errors.AbortedError,
    tf.errors.CancelledError,
    tf.errors.DeadlineExceededError,
    tf.errors.UnavailableError,
)
_NOT_DAMAGE = (
    *_LOST_WORKER,
    tf.errors.PermissionDeniedError,
    tf.errors.ResourceExhaustedError,
    tf.errors.UnauthenticatedError,
    MemoryError,
    PermissionError,
)
_COUNTS = re.compile(r"_\d+(?=[/_]|$)")
_OPERATION = re.compile(r"^\{\{\S+ \S+\}\} ?| \[Op:\w+\]$")


class Checkpoints:
    """The checkpoints in a directory.

    Each is a directory `step-00001000` with the variables, as TensorFlow's
    `tf.train.Checkpoint(model=..., optimizer=...)` reads them, and
    `metadata.json`: the step, the configuration, and what belongs to it. It is
    written under a temporary name and renamed, so that it is complete or
    absent; sizes and checksums tell what was damaged later. On an object store
    such as `gs://`, where directories cannot be renamed in one go, a checkpoint
    counts only when all its files are there.

    A checkpoint holds everything that training is a function of: weights,
    masks, the optimizer's slots and the step, which also is the position in the
    input.

    Args:
        directory: Where the checkpoints are; it is made when one is saved.
        configuration: What decides what is computed; JSON values by name. A
            checkpoint of another configuration is refused.
        keep: How many of the newest are kept.
        keep_every: Keep those whose step is a multiple of it for good; None
            for none.

    Raises:
        ValueError: If `keep` or `keep_every` is below 1.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        *,
        configuration: Mapping[str, Any],
        keep: int = 5,
        keep_every: int | None = None,
    ) -> None:
        for name, value in (("keep", keep), ("keep_every", keep_every)):
            if value is not None and value < 1:
                raise ValueError(
                    f"`{name}` must be at least 1. Received: {name}={value}"
                )
        self.directory = os.fspath(directory)
        # What a file can hold: tuples become lists.
        self._configuration = json.loads(json.dumps(dict(configuration)))
        self._keep = keep
        self._keep_every = keep_every

    def steps(self) -> list[int]:
        """The steps of the checkpoints that are there, oldest first."""
        if not tf.io.gfile.isdir(self.directory):
            return []
        matches = [
            _FOLDER.fullmatch(name.rstrip("/"))
            for name in tf.io.gfile.listdir(self.directory)
        ]
        return sorted(int(match[1]) for match in matches if match)

    def path(self, step: int) -> str:
        """The directory of the checkpoint of a step."""
        return os.path.join(self.directory, f"step-{step:08d}")

    def save(
        self,
        step: int,
        model: keras.Model,
        optimizer: keras.optimizers.Optimizer,
        *,
        notes: Mapping[str, Any] | None = None,
        chief: bool = True,
    ) -> None:
        """Saves a checkpoint and removes those that are no longer kept.

        All workers must call it, as reading some variables takes all of them;
        only the chief's is kept.

        Args:
            step: The number of completed optimizer steps.
            model: The model.
            optimizer: Its optimizer.
            notes: What to write down beside it; JSON values by name.
            chief: Whether this process is the chief.

        Raises:
            CheckpointError: If it cannot be written. Nothing is left of it,
                and the checkpoints that were there are as they were.
        """
        # Workers may share the directory, so each has a name of its own.
        temporary = os.path.join(
            self.directory, f"{_TEMPORARY}{step:08d}-{uuid.uuid4().hex}"
        )
        try:
            with _removed(temporary):
                tf.io.gfile.makedirs(temporary)
                checkpoint = _checkpoint(model, optimizer)
                checkpoint.write(os.path.join(temporary, _VARIABLES))
                if not chief:
                    return
                self._write_metadata(
                    temporary, step, model, optimizer, notes or {}
                )
                sync_tree(temporary)
                with self._set_aside(step):
                    tf.io.gfile.rename(temporary, self.path(step))
                sync_directory(self.directory)
        except _LOST_WORKER:
            # Reading variables takes all workers, and one is gone.
            raise
        except (tf.errors.OpError, OSError) as error:
            last = self.steps()
            raise CheckpointError(
                f"The checkpoint of step {step} could not be written to "
                f"{self.directory}: {_reason(error)}. "
                + (
                    f"That of step {last[-1]} is the last one that is there. "
                    if last
                    else "There is no other one. "
                )
                + "Make room or choose another directory, and run the same "
                "command again."
            ) from error
        self._remove_old(step)

    def _write_metadata(
        self,
        folder: str,
        step: int,
        model: keras.Model,
        optimizer: keras.optimizers.Optimizer,
        notes: Mapping[str, Any],
    ) -> None:
        files = {
            name: tf.io.gfile.stat(os.path.join(folder, name)).length
            for name in sorted(tf.io.gfile.listdir(folder))
        }
        metadata = {
            "step": step,
            "notes": dict(notes),
            "configuration": self._configuration,
            "versions": {
                "tensorflow": tf.__version__,
                "keras": keras.__version__,
            },
            "variables": variable_specs(model, optimizer),
            "files": files,
        }
        with tf.io.gfile.GFile(os.path.join(folder, _METADATA), "w") as file:
            file.write(json.dumps(metadata, indent=1) + "\n")

    def restore(
        self, model: keras.Model, optimizer: keras.optimizers.Optimizer
    ) -> dict[str, Any] | None:
        """Restores the newest checkpoint that is not damaged.

        Args:
            model: The model to restore into.
            optimizer: Its optimizer, built.

        Returns:
            Its "step" and notes, or None if there is no checkpoint.

        Raises:
            CheckpointError: If the checkpoint is of another configuration, or
                all that are there are damaged.
        """
        steps = self.steps()
        for step in reversed(steps):
            try:
                return self.restore_step(step, model, optimizer)
            except DamagedCheckpointError as damage:
                logging.warning(
                    "The checkpoint %s is damaged and not used: %s",
                    self.path(step),
                    damage,
                )
        if steps:
            raise CheckpointError(
                f"All checkpoints in {self.directory} are damaged: of steps "
                f"{steps}. Move them away to begin anew."
            )
        return None

    def restore_step(
        self,
        step: int,
        model: keras.Model,
        optimizer: keras.optimizers.Optimizer,
    ) -> dict[str, Any]:
        """Restores the checkpoint of one step.

        Args:
            step: One of `steps()`.
            model: The model to restore into.
            optimizer: Its optimizer, built.

        Returns:
            The "step" and notes that were saved with it.

        Raises:
            DamagedCheckpointError: If it is damaged.
            CheckpointError: If it is of another configuration, or cannot be
                read now.
        """
        with self._readable(step):
            return self._restore(step, model, optimizer)

    @contextlib.contextmanager
    def _readable(self, step: int) -> Iterator[None]:
        """Says so if a checkpoint cannot be read now, though not damaged."""
        try:
            yield
        except _NOT_DAMAGE as error:
            raise CheckpointError(
                f"The checkpoint {self.path(step)} cannot be read now: "
                f"{_reason(error)}. Run the same command again."
            ) from error

    def check(
        self,
        step: int,
        model: keras.Model,
        optimizer: keras.optimizers.Optimizer,
    ) -> None:
        """Looks at a checkpoint without restoring it.

        Args:
            step: One of `steps()`.
            model: The model that it could be restored into.
            optimizer: Its optimizer, built.

        Raises:
            DamagedCheckpointError: If it is seen to be damaged.
            CheckpointError: If it is of another configuration, or cannot be
                read now.
        """
        with self._readable(step):
            metadata = self._read_metadata(step)
        self._check(step, metadata, variable_specs(model, optimizer))

    def _restore(
        self,
        step: int,
        model: keras.Model,
        optimizer: keras.optimizers.Optimizer,
    ) -> dict[str, Any]:
        metadata = self._read_metadata(step)
        self._check(step, metadata, variable_specs(model, optimizer))
        checkpoint = _checkpoint(model, optimizer)
        try:
            status = checkpoint.read(os.path.join(self.path(step), _VARIABLES))
            status.assert_existing_objects_matched().assert_consumed()
        except _NOT_DAMAGE:
            raise
        # What TensorFlow raises depends on where the damage is: an IndexError,
        # for one.
        except Exception as error:
            raise DamagedCheckpointError(_reason(error)) from error
        found = int(keras.ops.convert_to_numpy(optimizer.iterations))
        if found != step:
            raise DamagedCheckpointError(f"it holds step {found}")
        return {"step": step, **metadata["notes"]}

    def _read_metadata(self, step: int) -> dict[str, Any]:
        folder = self.path(step)
        try:
            with tf.io.gfile.GFile(os.path.join(folder, _METADATA)) as file:
                metadata = json.loads(file.read())
            for name, size in metadata["files"].items():
                found = tf.io.gfile.stat(os.path.join(folder, name)).length
                if found != size:
                    raise DamagedCheckpointError(
                        f"{name} has {found} bytes in place of {size}"
                    )
            if metadata["step"] != step:
                raise DamagedCheckpointError(
                    f"{_METADATA} is of step {metadata['step']}"
                )
            return {
                key: dict(metadata[key])
                for key in ("notes", "configuration", "variables")
            }
        except _NOT_DAMAGE:
            raise
        except (tf.errors.OpError, OSError) as error:
            raise DamagedCheckpointError(_reason(error)) from error
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise DamagedCheckpointError(
                f"{_METADATA} cannot be read ({type(error).__name__}: {error})"
            ) from error

    def _check(
        self,
        step: int,
        metadata: Mapping[str, Any],
        variables: Mapping[str, Any],
    ) -> None:
        """Refuses a checkpoint of something else."""
        lines = [
            *diff(metadata["configuration"], self._configuration),
            *diff(metadata["variables"], variables),
        ]
        if not lines:
            return
        shown = "".join(f"\n  {line}" for line in lines[:20])
        more = len(lines) - 20
        raise CheckpointError(
            f"The checkpoint {self.path(step)} is of another configuration. "
            "Use the settings that it was made with, or another work "
            f"directory. Differences (there: in the checkpoint):{shown}"
            + (f"\n  and {more} more" if more > 0 else "")
        )

    def _remove_old(self, newest: int) -> None:
        # Those of later steps are damaged, as training began before them.
        steps = [step for step in self.steps() if step <= newest]
        for step in steps[: -self._keep]:
            if self._keep_every is None or step % self._keep_every:
                with (
                    contextlib.suppress(tf.errors.OpError),
                    self._set_aside(step),
                ):
                    pass

    @contextlib.contextmanager
    def _set_aside(self, step: int) -> Iterator[None]:
        """Removes a checkpoint, if it is there, once the scope succeeds.

        It has another name before: half a checkpoint is none.
        """
        path = self.path(step)
        if not tf.io.gfile.isdir(path):
            yield
            return
        old = os.path.join(self.directory, f"{_TEMPORARY}old")
        _remove(old)
        tf.io.gfile.rename(path, old)
        try:
            yield
        except BaseException:
            tf.io.gfile.rename(old, path)
            raise
        _remove(old)


def check_writable(directory: str | os.PathLike) -> None:
    """Refuses a work directory early in which nothing can be written.

    Args:
        directory: The directory; it is made if need be.

    Raises:
        CheckpointError: If it cannot be made or written to.
    """
    directory = os.fspath(directory)
    probe = os.path.join(directory, f".probe-{uuid.uuid4().hex}")
    try:
        tf.io.gfile.makedirs(directory)
        with tf.io.gfile.GFile(probe, "w") as file:
            file.write("\n")
        tf.io.gfile.remove(probe)
    except (tf.errors.OpError, OSError) as error:
        raise CheckpointError(
            f"The work directory {directory} cannot be written to: "
            f"{_reason(error)}. Choose another one, or change its permissions."
        ) from error


def remove_unfinished(directory: str | os.PathLike) -> None:
    """Removes what processes that were killed left of their checkpoints.

    Args:
        directory: That of the checkpoints. No other process may be writing.
    """
    directory = os.fspath(directory)
    if tf.io.gfile.isdir(directory):
        for name in tf.io.gfile.listdir(directory):
            if name.startswith(_TEMPORARY):
                _remove(os.path.join(directory, name.rstrip("/")))


def canonical_path(path: str) -> str:
    """The path of a variable without the numbers in its names.

    Keras numbers layers without a name, optimizers and seed generators through
    all of a process, so that the second model of one kind has other paths.
    """
    return _COUNTS.sub("", path)


def variable_specs(
    model: keras.Model, optimizer: keras.optimizers.Optimizer
) -> dict[str, str]:
    """What variables there are.

    Args:
        model: The model.
        optimizer: Its optimizer, built.

    Returns:
        The dtype and shape of each variable, by a path that is the same in
        every process; "(2)" and so on follow a path that stands for several.
    """
    found: dict[str, str] = {}
    prefix = f"{optimizer.name}/"
    named = [(canonical_path(v.path), v) for v in model.variables] + [
        (f"optimizer/{canonical_path(v.path.removeprefix(prefix))}", v)
        for v in optimizer.variables
    ]
    for path, variable in named:
        name, count = path, 1
        while name in found:
            count += 1
            name = f"{path} ({count})"
        shape = "x".join(str(size) for size in variable.shape) or "scalar"
        found[name] = f"{variable.dtype} {shape}"
    return found


def diff(
    saved: Mapping[str, Any], now: Mapping[str, Any], prefix: str = ""
) -> Iterator[str]:
    """Tells two descriptions or configurations apart.

    Args:
        saved: That of a checkpoint.
        now: That of the training which reads it.
        prefix: What to put in front of names.

    Yields:
        A line for each difference, such as `rate: 0.1 there, 0.2 now`.
    """
    for name in sorted({*saved, *now}):
        if name not in now:
            yield f"{prefix}{name}: {saved[name]!r} there, absent now"
        elif name not in saved:
            yield f"{prefix}{name}: absent there, {now[name]!r} now"
        elif isinstance(saved[name], dict) and isinstance(now[name], dict):
            yield from diff(saved[name], now[name], f"{prefix}{name}.")
        elif saved[name] != now[name]:
            yield f"{prefix}{name}: {saved[name]!r} there, {now[name]!r} now"


def _checkpoint(
    model: keras.Model, optimizer: keras.optimizers.Optimizer
) -> tf.train.Checkpoint:
    # The states of random generators, such as those of dropout layers, are
    # variables of a model that TensorFlow does not find in it.
    weights = {id(weight) for weight in model.weights}
    return tf.train.Checkpoint(
        model=model,
        optimizer=optimizer,
        seeds=[v.value for v in model.variables if id(v) not in weights],
    )


@contextlib.contextmanager
def _removed(folder: str) -> Iterator[None]:
    """Sees to it that a folder is not there before and after."""
    _remove(folder)
    try:
        yield
    finally:
        with contextlib.suppress(tf.errors.OpError):
            _remove(folder)


def _remove(folder: str) -> None:
    if tf.io.gfile.isdir(folder):
        tf.io.gfile.rmtree(folder)


def _reason(error: BaseException) -> str:
    text = error.message if isinstance(error, tf.errors.OpError) else str(error)
    lines = [line for line in text.strip().splitlines() if line]
    if not lines:
        return type(error).__name__
    # Without the names that TensorFlow has for what it was doing.
    return _OPERATION.sub("", lines[0]).rstrip(".")
