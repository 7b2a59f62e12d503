"""Writes files and directories atomically: complete or not at all."""

import contextlib
import errno
import glob
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import tensorflow as tf

from sos.errors import DirectoryInUseError, StorageError, reason

# Errors of file systems without locks.
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)


@contextlib.contextmanager
def storage_errors(message: str) -> Iterator[None]:
    """Converts errors of the file system within the scope to `StorageError`.

    Args:
        message: Beginning of the error message, for example "The table could
            not be written to results.csv".

    Yields:
        Nothing.

    Raises:
        StorageError: If the scope raises `OSError` or an error of TensorFlow's
            file systems. A `StorageError` passes unchanged.
    """
    try:
        yield
    except StorageError:
        raise
    except tf.errors.InvalidArgumentError:
        # A bug: TensorFlow raises it for operations, not for files.
        raise
    except (OSError, tf.errors.OpError) as error:
        raise StorageError(
            f"{message}: {reason(error)}. Free disk space or choose another "
            "directory, and run the same command again."
        ) from error


def check_writable(directory: str | os.PathLike) -> None:
    """Creates a directory and checks that files can be written to it.

    Args:
        directory: The directory; may be a `gs://` path.

    Raises:
        StorageError: If the directory cannot be created or written to.
    """
    directory = os.fspath(directory)
    probe = os.path.join(directory, f".probe-{uuid.uuid4().hex}")
    try:
        tf.io.gfile.makedirs(directory)
        with tf.io.gfile.GFile(probe, "w") as file:
            file.write("\n")
        tf.io.gfile.remove(probe)
    except (tf.errors.OpError, OSError) as error:
        raise StorageError(
            f"The directory {directory} cannot be written to: "
            f"{reason(error)}. Choose another one, or change its permissions."
        ) from error


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary path that is renamed to `path` on success.

    Args:
        path: The file to write. Its directory is created if needed.

    Yields:
        A path in the same directory to write to. If the scope raises, it is
        removed and `path` is unchanged.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(
        dir=path.parent, prefix=f".{path.stem}.", suffix=path.suffix
    )
    os.close(handle)
    temporary = Path(name)
    try:
        # mkstemp's permissions are private: set those of an ordinary new file.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str, text: str) -> None:
    """Writes a text file atomically, in UTF-8; see `write_bytes`."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: str, content: bytes) -> None:
    """Writes a file atomically.

    Args:
        path: The file. If it is a `gs://` path, its directory must exist.
        content: Content of the file.

    Raises:
        StorageError: If the file cannot be written. An earlier file is
            unchanged.
    """
    with storage_errors(f"{path} could not be written"):
        if "://" not in path:
            with atomic_write(path) as temporary:
                temporary.write_bytes(content)
            return
        temporary = f"{path}.{uuid.uuid4().hex}"
        with tf.io.gfile.GFile(temporary, "wb") as file:
            file.write(content)
        tf.io.gfile.rename(temporary, path, overwrite=True)


@contextlib.contextmanager
def atomic_directory(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary path that is renamed to `path` on success.

    Replaces an existing directory by two renames. If the process is killed
    between them, the old directory is left under a hidden name, and the next
    call restores it. Only one process may write at a time.

    Args:
        path: The directory to write. If it is a link, its target is replaced.

    Yields:
        A path in the same directory that does not exist yet. If the scope
        raises, it is removed and `path` is unchanged.
    """
    target = Path(path).resolve()
    old = target.with_name(f".{target.name}.old")
    if old.exists() and not target.exists():
        old.rename(target)
    digits = "[0-9a-f]" * len(uuid.uuid4().hex)
    pattern = f".{glob.escape(target.name)}.{digits}.new"
    for unfinished in target.parent.glob(pattern):
        shutil.rmtree(unfinished, ignore_errors=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.new")
    try:
        yield temporary
        sync_tree(temporary)
        # `rename` cannot replace a non-empty directory.
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
            target.rename(old)
        try:
            temporary.rename(target)
        except BaseException:
            if old.exists():
                old.rename(target)
            raise
        sync_directory(target.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def lock_directory(
    directory: str | os.PathLike, role: str = "train"
) -> Iterator[None]:
    """Locks a directory against other processes of the same role.

    The operating system releases the lock when the process ends, even if it is
    killed. Does nothing on file systems without locks, such as object stores.

    Args:
        directory: An existing directory. The lock is the file `.ROLE.lock` in
            it.
        role: Task of the process. Processes of other roles may work in the
            directory at the same time.

    Yields:
        Nothing.

    Raises:
        DirectoryInUseError: If another process of the same role holds the
            lock.
        StorageError: If the lock file cannot be written.
    """
    if not os.path.isdir(directory):
        yield
        return
    path = os.path.join(directory, f".{role}.lock")
    with contextlib.ExitStack() as stack:
        with storage_errors(f"The lock {path} could not be taken"):
            file = stack.enter_context(open(path, "w"))
            if not lock_file(file):
                raise DirectoryInUseError(
                    f"Another process ({role}) is working in "
                    f"{os.fspath(directory)}. Two processes would overwrite "
                    "each other's files: stop the other one, or choose "
                    "another directory."
                )
        yield


def lock_file(file: IO) -> bool:
    """Locks an open file against other processes until it is closed.

    Does nothing where files cannot be locked.

    Args:
        file: The file, open for writing.

    Returns:
        False if another process, or another open file of this one, holds the
        lock; else True, also where files cannot be locked.
    """
    try:
        # Absent on Windows.
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return True


def sync_tree(directory: str | os.PathLike) -> None:
    """Flushes a local directory and all its files to the disk.

    Once it returns, a power failure does not damage them.

    Args:
        directory: The directory. Nothing is done if it is not a local one.
    """
    for folder, _, names in os.walk(directory):
        for name in names:
            with open(os.path.join(folder, name), "rb") as file:
                os.fsync(file.fileno())
        sync_directory(folder)


def sync_directory(directory: str | os.PathLike) -> None:
    """Flushes the entries of a local directory to the disk.

    Call it after a rename in the directory.

    Args:
        directory: The directory. Nothing is done if it is not a local one.
    """
    if os.path.isdir(directory):
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
