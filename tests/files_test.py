import collections
import errno
import fcntl
import os
import pathlib
import subprocess
import sys

import pytest
import tensorflow as tf

from sos.errors import DirectoryInUseError, StorageError
from sos.files import (
    atomic_directory,
    atomic_write,
    check_writable,
    lock_directory,
    storage_errors,
)


def test_atomic_write_that_succeeds_leaves_exactly_one_file(tmp_path):
    path = tmp_path / "new" / "file.csv"
    for text in ("first", "second"):
        with atomic_write(path) as temporary:
            assert temporary.parent == path.parent
            temporary.write_text(text)
        assert path.read_text() == text
        assert list(path.parent.iterdir()) == [path]


def test_atomic_write_that_fails_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "file.csv"
    path.write_text("old")
    with pytest.raises(KeyError), atomic_write(path) as temporary:
        temporary.write_text("half")
        raise KeyError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_atomic_write_that_cannot_replace_leaves_the_old_file(
    tmp_path, monkeypatch
):
    path = tmp_path / "file.csv"
    path.write_text("old")

    def fail(self, target):
        raise PermissionError(target)

    monkeypatch.setattr(pathlib.Path, "replace", fail)
    with pytest.raises(PermissionError), atomic_write(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_atomic_write_gives_the_permissions_of_an_ordinary_new_file(tmp_path):
    ordinary, path = tmp_path / "ordinary", tmp_path / "file"
    before = os.umask(0o027)
    try:
        ordinary.write_text("")
        with atomic_write(path) as temporary:
            temporary.write_text("")
    finally:
        os.umask(before)
    assert path.stat().st_mode == ordinary.stat().st_mode
    assert path.stat().st_mode & 0o777 == 0o640


# Directories.


def write(path, text):
    with atomic_directory(path) as temporary:
        (temporary / "inner").mkdir(parents=True)
        (temporary / "inner" / "file").write_text(text)


def read(path):
    return (path / "inner" / "file").read_text()


def test_atomic_directory_is_replaced_as_a_whole(tmp_path):
    for text in ("first", "second"):
        write(tmp_path / "new", text)
        assert read(tmp_path / "new") == text
        assert list(tmp_path.iterdir()) == [tmp_path / "new"]


# Each child is killed after a number of renames. Then the process claims a
# directory: one process for both, as it takes seconds to start.
PROGRAM = """
import os, pathlib, sys, time
from sos.files import atomic_directory, lock_directory

rename = pathlib.Path.rename

def kill_after(renames):
    left = renames
    def killed(self, target):
        nonlocal left
        if left:
            rename(self, target)
        left -= 1
        if left <= 0:
            os.kill(os.getpid(), 9)
    pathlib.Path.rename = killed
    with atomic_directory(f"{renames}/new") as temporary:
        (temporary / "inner").mkdir(parents=True)
        (temporary / "inner" / "file").write_text("second")

for renames in range(3):
    if (child := os.fork()) == 0:
        kill_after(renames)
    assert os.waitpid(child, 0)[1] == 9
with lock_directory('.'):
    print('mine', flush=True)
    time.sleep(600)
"""
Other = collections.namedtuple("Other", ["root", "process"])


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A process that claims a directory.

    In directories of the names 0, 1 and 2, others were killed after that many
    renames.
    """
    root = tmp_path_factory.mktemp("other")
    for renames in range(3):
        write(root / str(renames) / "new", "first")
        write(root / str(renames) / "new.other", "another")
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        cwd=root,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout.readline() == "mine\n"
        yield Other(root, process)
        process.kill()


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_atomic_directory_of_a_killed_process_is_cleared_up(other, renames):
    folder = other.root / str(renames)
    path = folder / "new"
    if renames == 1:
        assert not path.exists()
    else:
        assert read(path) == ("second" if renames == 2 else "first")
    # A failure keeps what was there last, and a success is the new one.
    with pytest.raises(KeyError), atomic_directory(path):
        raise KeyError
    assert read(path) == ("second" if renames == 2 else "first")
    write(path, "third")
    assert read(path) == "third"
    assert read(folder / "new.other") == "another"
    assert len(list(folder.iterdir())) == 2


def test_atomic_directory_leaves_others_that_are_being_written(tmp_path):
    with atomic_directory(tmp_path / "new.v2") as other:
        other.mkdir()
        write(tmp_path / "new", "text")
        (other / "file").write_text("mine")
    assert (tmp_path / "new.v2" / "file").read_text() == "mine"


# One process at a time.


def test_lock_directory_where_another_works_raises_until_it_ends(other):
    root, process = other
    with (
        pytest.raises(DirectoryInUseError, match=str(root)),
        lock_directory(root),
    ):
        pass
    # However it ends, its claim ends with it.
    process.kill()
    process.wait()
    with lock_directory(root):
        pass


def test_lock_directory_without_file_locks_raises_nothing(
    tmp_path, monkeypatch
):
    def flock(file, operation):
        raise OSError(code, "flock")

    monkeypatch.setattr(fcntl, "flock", flock)
    code = errno.ENOSYS
    with lock_directory(tmp_path):
        pass
    code = errno.EIO
    with pytest.raises(StorageError, match="flock"), lock_directory(tmp_path):
        pass


def test_lock_directory_without_a_local_directory_raises_nothing(tmp_path):
    for path in ("ram://somewhere", tmp_path / "not there"):
        with lock_directory(path), lock_directory(path):
            pass


def test_lock_directory_with_an_error_inside_raises_that_error(tmp_path):
    with pytest.raises(FileNotFoundError), lock_directory(tmp_path):
        raise FileNotFoundError


def test_lock_directory_unwritable_lock_raises_storage_error(tmp_path):
    (tmp_path / ".train.lock").mkdir()
    with pytest.raises(StorageError, match=r"\.train\.lock.*dir"):
        with lock_directory(tmp_path):
            pass


# Errors.


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        tf.errors.ResourceExhaustedError(None, None, "No space left on device"),
        tf.errors.UnavailableError(None, None, "No space left on device"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_storage_errors_of_file_systems_become_one_class(error):
    with (
        pytest.raises(
            StorageError, match="^Saving failed: .*No space"
        ) as raised,
        storage_errors("Saving failed"),
    ):
        raise error
    assert raised.value.__cause__ is error
    assert isinstance(raised.value, OSError)


@pytest.mark.parametrize(
    "error",
    [
        DirectoryInUseError("in use"),
        ValueError("a bug"),
        tf.errors.InvalidArgumentError(None, None, "wrong shape"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_storage_errors_leaves_others_unchanged(error):
    with pytest.raises(type(error)) as raised, storage_errors("Saving failed"):
        raise error
    assert raised.value is error


def test_check_writable_creates_the_directory(tmp_path):
    for _ in range(2):
        check_writable(tmp_path / "a" / "b")
        assert list((tmp_path / "a" / "b").iterdir()) == []


def test_check_writable_below_a_file_raises(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "work"):
        with pytest.raises(StorageError, match=str(path)):
            check_writable(path)
    assert (tmp_path / "file").read_text() == ""


def test_check_writable_without_permission_raises(tmp_path, monkeypatch):
    class Refused(tf.io.gfile.GFile):
        def write(self, content):
            raise tf.errors.PermissionDeniedError(None, None, "Read-only")

    monkeypatch.setattr(tf.io.gfile, "GFile", Refused)
    with pytest.raises(StorageError, match=f"{tmp_path}.*Read-only"):
        check_writable(tmp_path)
