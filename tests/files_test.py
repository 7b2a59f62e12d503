import errno
import fcntl
import os
import pathlib
import subprocess
import sys

import pytest

from sos.files import atomic_directory, atomic_write, only_process


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


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_what_a_killed_process_leaves_is_cleared_up(tmp_path, renames):
    path = tmp_path / "new"
    write(path, "first")
    write(tmp_path / "new.other", "another")
    program = (
        "import os, pathlib\n"
        "from sos.files import atomic_directory\n"
        "rename = pathlib.Path.rename\n"
        f"left = {renames}\n"
        "def killed(self, target):\n"
        "    global left\n"
        "    if left: rename(self, target)\n"
        "    left -= 1\n"
        "    if left <= 0: os.kill(os.getpid(), 9)\n"
        "pathlib.Path.rename = killed\n"
        "with atomic_directory('new') as temporary:\n"
        "    (temporary / 'inner').mkdir(parents=True)\n"
        "    (temporary / 'inner' / 'file').write_text('second')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path)
    assert done.returncode == -9
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
    assert read(tmp_path / "new.other") == "another"
    assert len(list(tmp_path.iterdir())) == 2


# One process at a time.


def test_a_directory_is_claimed_by_one_process(tmp_path):
    program = (
        "import time\n"
        "from sos.files import only_process\n"
        "with only_process('.'):\n"
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
            pytest.raises(BlockingIOError, match=f"at work in {tmp_path}"),
            only_process(tmp_path),
        ):
            pass
        # However it ends, its claim ends with it.
        other.kill()
    with only_process(tmp_path):
        pass


def test_file_systems_without_claims_refuse_nothing(tmp_path, monkeypatch):
    def flock(file, operation):
        raise OSError(code, "flock")

    monkeypatch.setattr(fcntl, "flock", flock)
    code = errno.ENOSYS
    with only_process(tmp_path):
        pass
    code = errno.EIO
    with pytest.raises(OSError, match="flock"), only_process(tmp_path):
        pass


def test_others_that_are_being_written_stay(tmp_path):
    with atomic_directory(tmp_path / "new.v2") as other:
        other.mkdir()
        write(tmp_path / "new", "text")
        (other / "file").write_text("mine")
    assert (tmp_path / "new.v2" / "file").read_text() == "mine"


def test_where_there_are_no_claims_nothing_is_refused(tmp_path):
    for path in ("ram://somewhere", tmp_path / "not there"):
        with only_process(path), only_process(path):
            pass
