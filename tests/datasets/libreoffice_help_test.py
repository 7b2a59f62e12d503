import lzma

import pytest

from sos.datasets import libreoffice_help
from sos.errors import StorageError


def test_load_has_all_pairs():
    data = libreoffice_help.load()
    counts = [len(data.train), len(data.validation), len(data.test)]
    assert counts == [20_267, 1_049, 848]
    for pairs in (data.train, data.validation, data.test):
        for sentence in [*pairs.source, *pairs.target]:
            assert sentence.strip() and "\t" not in sentence
    assert data.test.source[0] != data.test.target[0]
    assert any("ü" in sentence for sentence in data.test.target)


def test_load_splits_share_no_pair():
    data = libreoffice_help.load()
    splits = [
        set(zip(pairs.source, pairs.target, strict=True))
        for pairs in (data.train, data.validation, data.test)
    ]
    assert len(set.union(*splits)) == 20_267 + 1_049 + 848


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (None, "FileNotFoundError"),
        (b"no archive", "LZMAError"),
        (lzma.compress(b"a\tb\n" * 848)[:-8], "EOFError|LZMAError"),
        (lzma.compress(b"a\tb\n" * 7), "7 lines, where 848"),
        (lzma.compress(b"a b\n" * 848), "848 lines, where 848 with one tab"),
        (lzma.compress(b"\xff\tb\n" * 848), "UnicodeDecodeError"),
    ],
)
def test_load_with_a_damaged_file_raises(tmp_path, monkeypatch, content, cause):
    for name, _ in libreoffice_help._FILES.values():
        original = libreoffice_help._DIRECTORY.joinpath(name).read_bytes()
        if ".test." not in name:
            (tmp_path / name).write_bytes(original)
        elif content is not None:
            (tmp_path / name).write_bytes(content)
    monkeypatch.setattr(libreoffice_help, "_DIRECTORY", tmp_path)
    with pytest.raises(StorageError, match=cause) as caught:
        libreoffice_help.load()
    assert "libreoffice_help.test.en-de.tsv.xz" in str(caught.value)
    assert "install `state-of-sparsity` again" in str(caught.value)


def test_notice_names_the_licence_and_the_owners():
    name = "libreoffice_help.NOTICE.txt"
    notice = libreoffice_help._DIRECTORY.joinpath(name).read_text("utf-8")
    assert "LibreOffice contributors" in notice
    assert "Mozilla Public License Version 2.0" in notice
    for file, count in libreoffice_help._FILES.values():
        assert file in notice
        assert f"{count:,}" in notice
