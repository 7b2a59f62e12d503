"""Writes files and directories completely or not at all."""

import contextlib
import errno
import glob
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import tensorflow as tf

from sos.errors import DirectoryInUseError, StorageError, reason

# What file systems without locks answer.
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)


@contextlib.contextmanager
def storage_errors(failure: str) -> Iterator[None]:
    """Raises `StorageError` for errors of the file system within the scope.

    Args:
        failure: What failed, the beginning of the message, for example
            "The table could not be written to results.csv".

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
        # TensorFlow raises it for operations, not for files: a bug.
        raise
    except (OSError, tf.errors.OpError) as error:
        raise StorageError(
            f"{failure}: {reason(error)}. Free disk space or choose another "
            "directory, and run the same command again."
        ) from error


def check_writable(directory: str | os.PathLike) -> None:
    """Creates a directory and checks that files can be written to it.

    Args:
        directory: The directory; `gs://` works too.

    Raises:
        StorageError: If it cannot be created or written to.
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
        # The permissions of an ordinary new file, not mkstemp's private ones.
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
    """Writes a text file that is complete or absent.

    Args:
        path: The file; `gs://` works too. Its directory must exist there.
        text: Its content.

    Raises:
        StorageError: If it cannot be written; an earlier file is unchanged.
    """
    with storage_errors(f"{path} could not be written"):
        if "://" not in path:
            with atomic_write(path) as temporary:
                temporary.write_text(text, "utf-8")
            return
        temporary = f"{path}.{uuid.uuid4().hex}"
        with tf.io.gfile.GFile(temporary, "w") as file:
            file.write(text)
        tf.io.gfile.rename(temporary, path, overwrite=True)


@contextlib.contextmanager
def atomic_directory(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary path that is renamed to `path` on success.

    An existing directory is replaced. This takes two renames: a process that
    is killed between them leaves the old directory under a hidden name, from
    which the next call restores it. Only one process may write at a time.

    Args:
        path: The directory to write; if it is a link, its target.

    Yields:
        A path in the same directory that does not exist yet. If the scope
        raises, it is removed and `path` is unchanged.
    """
    target = Path(path).resolve()
    old = target.with_name(f".{target.name}.old")
    if old.exists() and not target.exists():
        old.rename(target)
    digits = "[0-9a-f]" * len(uuid.uuid4().hex)
    for left in target.parent.glob(f".{glob.escape(target.name)}.{digits}.new"):
        shutil.rmtree(left, ignore_errors=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.new")
    try:
        yield temporary
        sync_tree(temporary)
        # `rename` does not replace a directory that is not empty.
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
def only_process(
    directory: str | os.PathLike, role: str = "train"
) -> Iterator[None]:
    """Locks a directory against other processes of the same role.

    The operating system releases the lock when the process ends, however it
    ends. On file systems without locks, such as object stores, this does
    nothing.

    Args:
        directory: An existing directory; the lock is its file `.ROLE.lock`.
        role: What the process does there. Processes of other roles may work
            in the directory at the same time.

    Yields:
        Nothing.

    Raises:
        DirectoryInUseError: If another process of this role holds the lock.
        StorageError: If the lock file cannot be written.
    """
    try:
        # Not on every system.
        import fcntl
    except ImportError:
        fcntl = None
    if fcntl is None or not os.path.isdir(directory):
        yield
        return
    path = os.path.join(directory, f".{role}.lock")
    with contextlib.ExitStack() as stack:
        with storage_errors(f"The lock {path} could not be taken"):
            file = stack.enter_context(open(path, "w"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise DirectoryInUseError(
                    f"Another process ({role}) is working in "
                    f"{os.fspath(directory)}, and two would overwrite each "
                    "other's files. Stop it, or choose another directory."
                ) from None
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
        yield


def sync_tree(directory: str | os.PathLike) -> None:
    """Flushes a local directory and all its files to the disk.

    After a power failure they are complete. Does nothing elsewhere than on
    local disks.

    Args:
        directory: The directory.
    """
    for folder, _, names in os.walk(directory):
        for name in names:
            with open(os.path.join(folder, name), "rb") as file:
                os.fsync(file.fileno())
        sync_directory(folder)


def sync_directory(directory: str | os.PathLike) -> None:
    """Flushes the entries of a local directory to the disk, as after a rename.

    Args:
        directory: The directory; nothing is done if it is not a local one.
    """
    if os.path.isdir(directory):
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
