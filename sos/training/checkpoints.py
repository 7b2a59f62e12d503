"""Saves and restores checkpoints atomically."""

import contextlib
import copy
import json
import math
import os
import re
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import keras
import numpy as np
import tensorflow as tf
from absl import logging

from sos.errors import (
    CheckpointError,
    DamagedCheckpointError,
    UsageError,
    reason,
)
from sos.files import sync_directory, sync_tree
from sos.training.strategies import is_lost_worker, several_workers
from sos.wrappers.base import sparse_layers

T = TypeVar("T")

#: The folder of the checkpoints in the directory of a training.
CHECKPOINTS = "checkpoints"

_FOLDER = re.compile(r"step-(\d{8,})")
_METADATA = "metadata.json"
_VARIABLES = "variables"
_TEMPORARY = ".writing-"
# Prefix of the names of an optimizer's variables.
_OPTIMIZER = "optimizer/"
# Errors that may not recur: the files need not be damaged.
_TRANSIENT_ERRORS = (
    tf.errors.AbortedError,
    tf.errors.CancelledError,
    tf.errors.DeadlineExceededError,
    tf.errors.PermissionDeniedError,
    tf.errors.ResourceExhaustedError,
    tf.errors.UnauthenticatedError,
    tf.errors.UnavailableError,
    MemoryError,
    PermissionError,
)
_NUMBERS = re.compile(r"_\d+(?=[/_]|$)")
_MAX_DIFFERENCES = 20
# Bytes of a variable's entries in the index, the object graph and metadata.
_ENTRY_BYTES = 256


class Checkpoints:
    """Saves, lists, restores and removes the checkpoints in a directory.

    A checkpoint is a directory such as `step-00001000` with the variables, in
    the format of `tf.train.Checkpoint(model=..., optimizer=...)`, and
    `metadata.json`: the step, the configuration, and the names, dtypes and
    shapes of all variables. It is written under a temporary name and renamed,
    so it is complete or absent; sizes and checksums reveal later damage. On an
    object store such as `gs://`, where directories cannot be renamed
    atomically, a checkpoint is ignored until all its files are there.

    A checkpoint holds the whole state of training: weights, masks, optimizer
    slots and the step, from which the position in the input follows.

    `tf.train.CheckpointManager` is not used. It writes the files of a
    checkpoint one by one and lists them in another file, does not flush them to
    the disk, does not verify a configuration, restores only the newest
    checkpoint even if it is damaged, and keeps old ones by hours rather than by
    steps.

    Args:
        directory: The directory; created when a checkpoint is saved.
        configuration: Everything that determines the result, as JSON values by
            name. Restoring a checkpoint of another configuration raises
            `CheckpointError`.
        keep: Number of newest checkpoints that `save` keeps.
        keep_every: `save` also keeps checkpoints whose step is a multiple of
            this number; None to keep no others.
        keep_steps: Steps whose checkpoints `save` also keeps.

    Raises:
        UsageError: If `keep` or `keep_every` is below 1.

    Example:
    >>> import keras, sos.training
    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(8)])
    >>> optimizer = keras.optimizers.SGD()
    >>> optimizer.build(model.trainable_variables)
    >>> checkpoints = sos.training.Checkpoints(
    ...     "checkpoints", configuration={"units": 8}
    ... )
    >>> checkpoints.save(0, model, optimizer, metadata={"seconds": 1.5})
    >>> checkpoints.steps()
    [0]
    >>> checkpoints.restore(model, optimizer)
    {'step': 0, 'seconds': 1.5}
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        *,
        configuration: Mapping[str, Any],
        keep: int = 5,
        keep_every: int | None = None,
        keep_steps: Collection[int] = (),
    ) -> None:
        for name, value in (("keep", keep), ("keep_every", keep_every)):
            if value is not None and value < 1:
                raise UsageError(
                    f"`{name}` must be at least 1. Received: {name}={value}"
                )
        self.directory = os.fspath(directory)
        # As read from a file: tuples become lists.
        self._configuration = json.loads(json.dumps(dict(configuration)))
        self._keep = keep
        self._keep_every = keep_every
        self._keep_steps = frozenset(keep_steps)
        self._last_step: float = math.inf

    def up_to(self, step: int) -> "Checkpoints":
        """Returns the checkpoints without those of later steps.

        Args:
            step: The last step of `steps()`.
        """
        other = copy.copy(self)
        other._last_step = step
        return other

    def steps(self) -> list[int]:
        """Returns the steps of all checkpoints, in ascending order."""
        if not tf.io.gfile.isdir(self.directory):
            return []
        matches = [
            _FOLDER.fullmatch(name.rstrip("/"))
            for name in tf.io.gfile.listdir(self.directory)
        ]
        steps = sorted(int(match[1]) for match in matches if match)
        return [step for step in steps if step <= self._last_step]

    def path(self, step: int) -> str:
        """Returns the directory of the checkpoint of a step."""
        return os.path.join(self.directory, f"step-{step:08d}")

    @staticmethod
    def nbytes(
        model: keras.Model, optimizer: keras.optimizers.Optimizer
    ) -> int:
        """Estimates the bytes that one checkpoint takes on disk.

        Args:
            model: The model.
            optimizer: Its optimizer, built.

        Returns:
            Number of bytes: the values of all variables, and about 250 bytes
            per variable for its entries in the index and the metadata.
        """
        variables = [*model.variables, *optimizer.variables]
        return sum(
            tf.TensorShape(v.shape).num_elements() * tf.as_dtype(v.dtype).size
            + _ENTRY_BYTES
            for v in variables
        )

    def save(
        self,
        step: int,
        model: keras.Model,
        optimizer: keras.optimizers.Optimizer,
        *,
        metadata: Mapping[str, Any] | None = None,
        chief: bool = True,
    ) -> None:
        """Saves a checkpoint and removes old ones.

        All workers must call this method, because reading some variables
        involves all of them. Only the chief's checkpoint stays.

        Args:
            step: Number of completed optimizer steps.
            model: The model.
            optimizer: Its optimizer.
            metadata: Further JSON values by name, returned by `restore`.
            chief: Whether this process is the chief.

        Raises:
            CheckpointError: If the checkpoint cannot be written. It leaves no
                files, and the other checkpoints are unchanged.
        """
        # Workers may share the directory: each needs its own name.
        temporary = os.path.join(
            self.directory, f"{_TEMPORARY}{step:08d}-{uuid.uuid4().hex}"
        )
        try:
            with _removing(temporary):
                tf.io.gfile.makedirs(temporary)
                checkpoint = _checkpoint(model, optimizer)
                checkpoint.write(os.path.join(temporary, _VARIABLES))
                if not chief:
                    return
                self._write_metadata(
                    temporary, step, model, optimizer, metadata or {}
                )
                sync_tree(temporary)
                with self._set_aside(step):
                    tf.io.gfile.rename(temporary, self.path(step))
                sync_directory(self.directory)
        except (tf.errors.OpError, OSError) as error:
            # Reading variables involves all workers, and one may be lost.
            if several_workers() and is_lost_worker(error):
                raise
            steps = self.steps()
            raise CheckpointError(
                f"The checkpoint of step {step} could not be written to "
                f"{self.directory}: {reason(error)}. "
                + (
                    f"The newest checkpoint is of step {steps[-1]}. "
                    if steps
                    else "There is no other checkpoint. "
                )
                + "Free disk space or choose another directory, and run the "
                "same command again."
            ) from error
        self._remove_old(step)

    def _write_metadata(
        self,
        folder: str,
        step: int,
        model: keras.Model,
        optimizer: keras.optimizers.Optimizer,
        metadata: Mapping[str, Any],
    ) -> None:
        files = {
            name: tf.io.gfile.stat(os.path.join(folder, name)).length
            for name in sorted(tf.io.gfile.listdir(folder))
        }
        content = {
            "step": step,
            "metadata": dict(metadata),
            "configuration": self._configuration,
            "versions": {
                "tensorflow": tf.__version__,
                "keras": keras.__version__,
            },
            "variables": variable_specs(model, optimizer),
            "files": files,
        }
        with tf.io.gfile.GFile(os.path.join(folder, _METADATA), "w") as file:
            file.write(json.dumps(content, indent=1) + "\n")

    def restore(
        self, model: keras.Model, optimizer: keras.optimizers.Optimizer
    ) -> dict[str, Any] | None:
        """Restores the newest undamaged checkpoint.

        Args:
            model: The model to restore into.
            optimizer: Its optimizer, built.

        Returns:
            The "step" and the metadata that was passed to `save`; None if there
            is no checkpoint.

        Raises:
            CheckpointError: If the checkpoint is of another configuration,
                cannot be read at the moment, or all checkpoints are damaged.
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
                f"{steps}. Move them away to start from step 0."
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
            The "step" and the metadata that was passed to `save`.

        Raises:
            DamagedCheckpointError: If the checkpoint is damaged.
            CheckpointError: If it is of another configuration, or cannot be
                read at the moment.
        """
        with self._readable(step):
            metadata = self._read_metadata(step)
            self._verify(step, metadata, variable_specs(model, optimizer))
            self._read_variables(step, model, optimizer)
        return {"step": step, **metadata["metadata"]}

    @contextlib.contextmanager
    def average(
        self, model: keras.Model, last: int = 5, *, after: int = 0
    ) -> Iterator[tuple[int, ...]]:
        """Gives a model the mean of the newest checkpoints for a while.

        The mean of the last checkpoints often scores better than the last one
        (Vaswani et al. 2017, arXiv 1706.03762, section 6.1). All float
        variables are averaged, trainable or not, in float64; integers, such as
        masks and counters, are those of the newest checkpoint. Damaged
        checkpoints are skipped. If there are fewer than asked for, those that
        exist are averaged, with a warning.

        Args:
            model: The model, with the variables of the saved one. At the end,
                also after an exception, its variables have the values that they
                had before.
            last: Maximum number of checkpoints.
            after: The step at which training began. Its checkpoint is kept as
                well, but holds initial weights: it, and earlier ones, are only
                used if there is no later one.

        Yields:
            The steps of the averaged checkpoints, in ascending order.

        Raises:
            UsageError: If `last` is below 1.
            DamagedCheckpointError: If no checkpoint can be averaged.
            CheckpointError: If a checkpoint is of another configuration, or
                cannot be read at the moment.

        Example:
        >>> import keras, sos.training
        >>> layer = keras.layers.Dense(1, kernel_initializer="ones")
        >>> model = keras.Sequential([keras.Input((1,)), layer])
        >>> optimizer = keras.optimizers.SGD()
        >>> optimizer.build(model.trainable_variables)
        >>> checkpoints = sos.training.Checkpoints(
        ...     "averaged", configuration={}
        ... )
        >>> for step in (0, 1, 2):
        ...     _ = optimizer.iterations.assign(step)
        ...     _ = layer.kernel.assign([[float(step)]])
        ...     checkpoints.save(step, model, optimizer)
        >>> with checkpoints.average(model, last=2) as steps:
        ...     steps, layer.kernel.numpy().item()
        ((1, 2), 1.5)
        >>> layer.kernel.numpy().item()
        2.0
        """
        if last < 1:
            raise UsageError(
                f"`last` must be at least 1. Received: last={last}"
            )
        before = _values(model)
        try:
            steps = self._read_average(model, last, after)
            if len(steps) < last:
                logging.warning(
                    "Averaging %d instead of %d checkpoints, of steps %s: "
                    "there are no others in %s.",
                    len(steps),
                    last,
                    ", ".join(map(str, steps)),
                    self.directory,
                )
            yield steps
        finally:
            assign(model.variables, before)

    def _read_average(
        self, model: keras.Model, last: int, after: int
    ) -> tuple[int, ...]:
        """Assigns the mean of checkpoints to a model; returns their steps."""
        steps: list[int] = []
        newest: list[np.ndarray] = []
        sums: dict[int, np.ndarray] = {}
        for step in reversed(self.steps()):
            if steps and step <= after:
                break
            try:
                self._read_model(step, model)
            except DamagedCheckpointError as damage:
                logging.warning(
                    "The checkpoint %s is damaged and not averaged: %s",
                    self.path(step),
                    damage,
                )
                continue
            values = _values(model)
            newest = newest or values
            for index, variable in enumerate(model.variables):
                if keras.backend.is_float_dtype(variable.dtype):
                    value = values[index].astype(np.float64)
                    sums[index] = value + sums.get(index, 0.0)
            steps.append(step)
            if len(steps) == last:
                break
        if not steps:
            raise DamagedCheckpointError(
                f"{self.directory} has no checkpoint that can be averaged"
            )
        for index, total in sums.items():
            mean = total / len(steps)
            newest[index] = mean.astype(newest[index].dtype)
        assign(model.variables, newest)
        return tuple(reversed(steps))

    def _read_model(self, step: int, model: keras.Model) -> None:
        """Restores the variables of a model without those of its optimizer."""
        with self._readable(step):
            metadata = self._read_metadata(step)
            specs = {
                name: spec
                for name, spec in metadata["variables"].items()
                if not name.startswith(_OPTIMIZER)
            }
            self._verify(
                step, {**metadata, "variables": specs}, variable_specs(model)
            )
            checkpoint = _checkpoint(model)
            with _damage():
                status = checkpoint.read(
                    os.path.join(self.path(step), _VARIABLES)
                )
                status.assert_existing_objects_matched().expect_partial()

    def check(
        self,
        step: int,
        model: keras.Model,
        optimizer: keras.optimizers.Optimizer,
    ) -> None:
        """Verifies a checkpoint's metadata without restoring it.

        Args:
            step: One of `steps()`.
            model: The model to compare with.
            optimizer: Its optimizer, built.

        Raises:
            DamagedCheckpointError: If the metadata is damaged, or a file is
                missing or has another size.
            CheckpointError: If it is of another configuration, or cannot be
                read at the moment.
        """
        with self._readable(step):
            metadata = self._read_metadata(step)
        self._verify(step, metadata, variable_specs(model, optimizer))

    def remove(self, step: int) -> None:
        """Removes the checkpoint of a step, even if `save` would keep it.

        Renames it first, so that a process that is killed meanwhile leaves no
        incomplete checkpoint.

        Args:
            step: The step. Nothing is done if it has no checkpoint.

        Raises:
            CheckpointError: If the checkpoint cannot be removed.
        """
        try:
            with self._set_aside(step):
                pass
        except (tf.errors.OpError, OSError) as error:
            raise CheckpointError(
                f"The checkpoint {self.path(step)} could not be removed: "
                f"{reason(error)}. Change the permissions of its directory."
            ) from error

    @contextlib.contextmanager
    def _readable(self, step: int) -> Iterator[None]:
        """Converts errors that may not recur to `CheckpointError`."""
        try:
            yield
        except _TRANSIENT_ERRORS as error:
            raise CheckpointError(
                f"The checkpoint {self.path(step)} cannot be read now: "
                f"{reason(error)}. Run the same command again."
            ) from error

    def _read_variables(
        self,
        step: int,
        model: keras.Model,
        optimizer: keras.optimizers.Optimizer,
    ) -> None:
        checkpoint = _checkpoint(model, optimizer)
        with _damage():
            status = checkpoint.read(os.path.join(self.path(step), _VARIABLES))
            status.assert_existing_objects_matched().assert_consumed()
        restored = int(keras.ops.convert_to_numpy(optimizer.iterations))
        if restored != step:
            raise DamagedCheckpointError(
                f"its variables are of step {restored}"
            )

    def _read_metadata(self, step: int) -> dict[str, Any]:
        folder = self.path(step)
        try:
            with tf.io.gfile.GFile(os.path.join(folder, _METADATA)) as file:
                metadata = json.loads(file.read())
            for name, size in metadata["files"].items():
                length = tf.io.gfile.stat(os.path.join(folder, name)).length
                if length != size:
                    raise DamagedCheckpointError(
                        f"{name} has {length} bytes instead of {size}"
                    )
            if metadata["step"] != step:
                raise DamagedCheckpointError(
                    f"{_METADATA} is of step {metadata['step']}"
                )
            return {
                key: dict(metadata[key])
                for key in ("metadata", "configuration", "variables")
            }
        except _TRANSIENT_ERRORS:
            raise
        except (tf.errors.OpError, OSError) as error:
            raise DamagedCheckpointError(reason(error)) from error
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise DamagedCheckpointError(
                f"{_METADATA} cannot be read ({type(error).__name__}: {error})"
            ) from error

    def _verify(
        self,
        step: int,
        metadata: Mapping[str, Any],
        variables: Mapping[str, Any],
    ) -> None:
        """Raises `CheckpointError` if the configuration or variables differ."""
        lines = [
            *diff(metadata["configuration"], self._configuration),
            *diff(metadata["variables"], variables),
        ]
        if lines:
            raise CheckpointError(
                f"The checkpoint {self.path(step)} is of another "
                "configuration. Use the configuration that it was saved with, "
                "or another work directory. "
                f"Differences:{format_differences(lines)}"
            )

    def _remove_old(self, newest: int) -> None:
        # Newer ones are damaged: training restarted from an earlier one.
        steps = [step for step in self.steps() if step <= newest]
        for step in steps[: -self._keep]:
            if not self._is_kept(step):
                with contextlib.suppress(CheckpointError):
                    self.remove(step)

    def _is_kept(self, step: int) -> bool:
        return step in self._keep_steps or (
            self._keep_every is not None and step % self._keep_every == 0
        )

    @contextlib.contextmanager
    def _set_aside(self, step: int) -> Iterator[None]:
        """Renames a checkpoint, if it exists, and removes it on success.

        Without the renaming, an interrupted removal would leave a damaged one.
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


def remove_unfinished(directory: str | os.PathLike) -> None:
    """Removes unfinished checkpoints of killed processes.

    Args:
        directory: The directory of the checkpoints. No other process may be
            writing to it.

    Raises:
        CheckpointError: If they cannot be removed.
    """
    directory = os.fspath(directory)
    if not tf.io.gfile.isdir(directory):
        return
    for name in tf.io.gfile.listdir(directory):
        if not name.startswith(_TEMPORARY):
            continue
        path = os.path.join(directory, name.rstrip("/"))
        try:
            _remove(path)
        except (tf.errors.OpError, OSError) as error:
            raise CheckpointError(
                f"The unfinished checkpoint {path} could not be removed: "
                f"{reason(error)}. Change the permissions of its directory."
            ) from error


def canonical_path(path: str) -> str:
    """Returns the path of a variable without Keras's numbers.

    Keras numbers unnamed layers, optimizers and seed generators across the
    process, so a second model of the same kind has other paths.

    Args:
        path: The path, for example "sequential_1/dense_12/kernel".

    Returns:
        The path without numbers, for example "sequential/dense/kernel".
    """
    return _NUMBERS.sub("", path)


def latest_prefix(directory: str | os.PathLike) -> str | None:
    """Returns the newest checkpoint in a directory, as TensorFlow reads it.

    Args:
        directory: The directory of a training, its folder of checkpoints, or
            the folder of one checkpoint.

    Returns:
        The prefix of the files; None if there is no checkpoint.
    """
    directory = os.fspath(directory)
    for folder in (directory, os.path.join(directory, CHECKPOINTS)):
        checkpoints = Checkpoints(folder, configuration={})
        steps = checkpoints.steps()
        for parent in (folder, *(checkpoints.path(n) for n in steps[-1:])):
            prefix = os.path.join(parent, _VARIABLES)
            if tf.io.gfile.exists(f"{prefix}.index"):
                return prefix
    return None


def variable_specs(
    model: keras.Model, optimizer: keras.optimizers.Optimizer | None = None
) -> dict[str, str]:
    """Returns the dtype and shape of every variable.

    Args:
        model: The model.
        optimizer: Its optimizer, built; None for the model's variables only.

    Returns:
        Strings such as "float32 3x2" by canonical path. Paths of further
        variables with the same canonical path end in "(2)" and so on.
    """
    return {
        name: format_spec(variable.shape, variable.dtype)
        for name, variable in named_variables(model, optimizer).items()
    }


def named_variables(
    model: keras.Model, optimizer: keras.optimizers.Optimizer | None = None
) -> dict[str, keras.Variable]:
    """Returns every variable by canonical path.

    Equal models with equal optimizers have equal names, also in other
    processes.

    Args:
        model: The model.
        optimizer: Its optimizer, built; None for the model's variables only.

    Returns:
        The variables. Names of the optimizer's begin with "optimizer/". Paths
        of further variables with the same canonical path end in "(2)" and so
        on.
    """
    named = [(canonical_path(v.path), v) for v in model.variables]
    if optimizer is not None:
        prefix = f"{optimizer.name}/"
        named += [
            (_OPTIMIZER + canonical_path(v.path.removeprefix(prefix)), v)
            for v in optimizer.variables
        ]
    return _distinct(named)


def _distinct(named: Iterable[tuple[str, T]]) -> dict[str, T]:
    """Returns a dictionary; further equal names end in "(2)" and so on."""
    values: dict[str, T] = {}
    for path, value in named:
        name, count = path, 1
        while name in values:
            count += 1
            name = f"{path} ({count})"
        values[name] = value
    return values


def format_spec(shape: Sequence[int], dtype: Any) -> str:
    """Returns the dtype and shape of a variable or array as text.

    Args:
        shape: The shape.
        dtype: The dtype.

    Returns:
        A string such as "float32 3x2".
    """
    return f"{dtype} {'x'.join(map(str, shape)) or 'scalar'}"


def diff(
    saved: Mapping[str, Any], now: Mapping[str, Any], prefix: str = ""
) -> Iterator[str]:
    """Yields the differences between two configurations or variable specs.

    Args:
        saved: The saved values.
        now: The values of this process.
        prefix: Prefix of all names.

    Yields:
        One line per difference, for example `rate: 0.1 saved, 0.2 now`.
    """
    for name in sorted({*saved, *now}):
        if name not in now:
            yield f"{prefix}{name}: {saved[name]!r} saved, absent now"
        elif name not in saved:
            yield f"{prefix}{name}: not saved, {now[name]!r} now"
        elif isinstance(saved[name], dict) and isinstance(now[name], dict):
            yield from diff(saved[name], now[name], f"{prefix}{name}.")
        elif saved[name] != now[name]:
            yield f"{prefix}{name}: {saved[name]!r} saved, {now[name]!r} now"


def format_differences(lines: Sequence[str]) -> str:
    """Formats the lines of `diff` for an error message; at most 20 of them."""
    shown = "".join(f"\n  {line}" for line in lines[:_MAX_DIFFERENCES])
    more = len(lines) - _MAX_DIFFERENCES
    return shown + (f"\n  and {more} more" if more > 0 else "")


def _checkpoint(
    model: keras.Model, optimizer: keras.optimizers.Optimizer | None = None
) -> tf.train.Checkpoint:
    parts = {} if optimizer is None else {"optimizer": optimizer}
    return tf.train.Checkpoint(
        # All of them. From a model alone, TensorFlow finds neither the layers
        # in lists of a layer nor the states of random generators.
        variables=named_variables(model, optimizer),
        # For `sos report`: which variables belong to one technique.
        sparse_layers=_distinct(
            (canonical_path(layer.path or layer.name), layer)
            for layer in sparse_layers(model)
        ),
        model=model,
        **parts,
    )


@contextlib.contextmanager
def _damage() -> Iterator[None]:
    """Converts errors of reading to `DamagedCheckpointError`."""
    try:
        yield
    except _TRANSIENT_ERRORS:
        raise
    # TensorFlow's error depends on where the damage is. It can be an
    # IndexError.
    except Exception as error:
        raise DamagedCheckpointError(reason(error)) from error


def _values(model: keras.Model) -> list[np.ndarray]:
    """Returns copies of the values of a model's variables."""
    return [
        np.array(keras.ops.convert_to_numpy(variable))
        for variable in model.variables
    ]


def assign(variables: Sequence[keras.Variable], values: Sequence[Any]) -> None:
    """Assigns a value to each variable."""
    for variable, value in zip(variables, values, strict=True):
        variable.assign(keras.ops.convert_to_tensor(value))


@contextlib.contextmanager
def _removing(folder: str) -> Iterator[None]:
    """Removes a folder when the scope ends, if it exists."""
    try:
        yield
    finally:
        with contextlib.suppress(tf.errors.OpError):
            _remove(folder)


def _remove(folder: str) -> None:
    if tf.io.gfile.isdir(folder):
        tf.io.gfile.rmtree(folder)
