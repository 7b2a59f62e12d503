"""Writing files so that they are complete or absent."""

import errno
import glob
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_NO_CLAIMS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)


@contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """Gives a temporary path that takes the name `path` on success.

    Args:
        path: The file to write. Its directory is made if need be.

    Yields:
        A path in the same directory to write to. If the scope is left with an
        error, it is removed and `path` stays as it was.
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


@contextmanager
def atomic_directory(path: str | os.PathLike) -> Iterator[Path]:
    """Gives a new directory that takes the name `path` on success.

    A directory that is there is replaced then. As that takes two renames, a
    process that is killed between them leaves it under a hidden name, from
    which the next call brings it back. One process at a time may write.

    Args:
        path: The directory to write; if it is a link, its target.

    Yields:
        A path in the same directory, where nothing is yet. If the scope is left
        with an error, it is removed and `path` stays as it was.
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
        # A directory with something in it cannot be renamed over.
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


@contextmanager
def only_process(
    directory: str | os.PathLike, role: str = "train"
) -> Iterator[None]:
    """Keeps a directory from two processes that would write the same files.

    The operating system gives the claim up when the process ends, however it
    ends. Where there are no such claims, as on object stores, it does nothing.

    Args:
        directory: The directory, which exists; it gets the file `.ROLE.lock`.
        role: What the process does there. Others may do something else.

    Raises:
        BlockingIOError: If another process claims the directory for this.
    """
    try:
        # Not on every system.
        import fcntl
    except ImportError:
        fcntl = None
    if fcntl is None or not os.path.isdir(directory):
        yield
        return
    with open(os.path.join(directory, f".{role}.lock"), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(
                f"Another process ({role}) is at work in "
                f"{os.fspath(directory)}, and two would spoil each other's "
                "files. Stop it, or choose another work directory."
            ) from None
        except OSError as error:
            # File systems that know no claims say so.
            if error.errno not in _NO_CLAIMS:
                raise
        yield


def sync_tree(directory: str | os.PathLike) -> None:
    """Brings a directory and all files in it to the disk.

    So that a power cut finds them complete. Elsewhere than on local disks it
    does nothing.
    """
    for folder, _, names in os.walk(directory):
        for name in names:
            with open(os.path.join(folder, name), "rb") as file:
                os.fsync(file.fileno())
        sync_directory(folder)


def sync_directory(directory: str | os.PathLike) -> None:
    """Brings the names in a local directory to the disk, as of a rename."""
    if os.path.isdir(directory):
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
