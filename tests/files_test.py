import os
import pathlib

import pytest

from sos.files import atomic_write


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
