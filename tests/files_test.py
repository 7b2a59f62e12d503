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


def test_success_leaves_exactly_one_file(tmp_path):
    path = tmp_path / "new" / "file.csv"
    for text in ("first", "second"):
        with atomic_write(path) as temporary:
            assert temporary.parent == path.parent
            temporary.write_text(text)
        assert path.read_text() == text
        assert list(path.parent.iterdir()) == [path]


def test_an_error_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "file.csv"
    path.write_text("old")
    with pytest.raises(KeyError), atomic_write(path) as temporary:
        temporary.write_text("half")
        raise KeyError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failing_replacement_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file.csv"
    path.write_text("old")

    def fail(self, target):
        raise PermissionError(target)

    monkeypatch.setattr(pathlib.Path, "replace", fail)
    with pytest.raises(PermissionError), atomic_write(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_permissions_are_those_of_an_ordinary_new_file(tmp_path):
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


def test_a_directory_is_replaced_as_a_whole(tmp_path):
    for text in ("first", "second"):
        write(tmp_path / "new", text)
        assert read(tmp_path / "new") == text
        assert list(tmp_path.iterdir()) == [tmp_path / "new"]


# Each child is killed after a number of renames.
KILLED = """
import os, pathlib, sys
from sos.files import atomic_directory

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
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Directories in which processes were killed, by number of renames."""
    root = tmp_path_factory.mktemp("killed")
    for renames in range(3):
        write(root / str(renames) / "new", "first")
        write(root / str(renames) / "new.other", "another")
    subprocess.run([sys.executable, "-c", KILLED], cwd=root, check=True)
    return root


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_what_a_killed_process_leaves_is_cleared_up(killed, renames):
    folder = killed / str(renames)
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


def test_others_that_are_being_written_stay(tmp_path):
    with atomic_directory(tmp_path / "new.v2") as other:
        other.mkdir()
        write(tmp_path / "new", "text")
        (other / "file").write_text("mine")
    assert (tmp_path / "new.v2" / "file").read_text() == "mine"


# One process at a time.


def test_a_directory_is_claimed_by_one_process(tmp_path):
    program = (
        "import time\n"
        "from sos.files import lock_directory\n"
        "with lock_directory('.'):\n"
        "    print('mine', flush=True)\n"
        "    time.sleep(600)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout.readline() == "mine\n"
        with (
            pytest.raises(DirectoryInUseError, match=f"working in {tmp_path}"),
            lock_directory(tmp_path),
        ):
            pass
        # However it ends, its claim ends with it.
        other.kill()
    with lock_directory(tmp_path):
        pass


def test_file_systems_without_claims_refuse_nothing(tmp_path, monkeypatch):
    def flock(file, operation):
        raise OSError(code, "flock")

    monkeypatch.setattr(fcntl, "flock", flock)
    code = errno.ENOSYS
    with lock_directory(tmp_path):
        pass
    code = errno.EIO
    with pytest.raises(StorageError, match="flock"), lock_directory(tmp_path):
        pass


def test_where_there_are_no_claims_nothing_is_refused(tmp_path):
    for path in ("ram://somewhere", tmp_path / "not there"):
        with lock_directory(path), lock_directory(path):
            pass


def test_lock_directory_within_its_scope_raises_what_the_scope_raises(tmp_path):
    with pytest.raises(FileNotFoundError), lock_directory(tmp_path):
        raise FileNotFoundError


def test_lock_directory_unwritable_lock_raises_storage_error(tmp_path):
    (tmp_path / ".train.lock").mkdir()
    with pytest.raises(StorageError, match="lock .* could not be taken: .*dir"):
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
            StorageError, match="^Saving failed: .*No space.* Free disk space"
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
        with pytest.raises(StorageError, match=f"{path} cannot be written to"):
            check_writable(path)
    assert (tmp_path / "file").read_text() == ""


def test_check_writable_without_permission_raises(tmp_path, monkeypatch):
    class Refused(tf.io.gfile.GFile):
        def write(self, content):
            raise tf.errors.PermissionDeniedError(None, None, "Read-only")

    monkeypatch.setattr(tf.io.gfile, "GFile", Refused)
    with pytest.raises(StorageError, match=f"{tmp_path}.*: Read-only. Choo"):
        check_writable(tmp_path)
