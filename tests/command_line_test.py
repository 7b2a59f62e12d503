"""The command line, and what it makes of damaged files."""

import contextlib
import io
import os
import pathlib
import sys
import zipfile

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import sos
from sos.__main__ import main


def sparse_model():
    model = keras.Sequential(
        [keras.Input((3,)), layers.Dense(2, name="a")], name="small"
    )
    return sos.sparsify(model, "FixedMask", sparsity=0.5)


def fails(capsys, *arguments):
    with pytest.raises(SystemExit) as error:
        main(["report", *map(str, arguments)])
    assert error.value.code == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1, captured.err
    assert captured.out == ""
    return captured.err


@pytest.mark.parametrize("arguments", [[], ["-h"]])
def test_command_line_without_a_command_prints_its_usage(arguments, capsys):
    with contextlib.suppress(SystemExit):
        main(arguments)
    captured = capsys.readouterr()
    assert "usage:" in captured.out
    assert "report" in captured.out
    assert captured.err == ""


@pytest.mark.parametrize("arguments", [["rapport"], ["report"], ["--no"]])
def test_command_line_wrong_ends_with_one_line(arguments, capsys):
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "error" in message


@pytest.mark.parametrize("program", ["sos/__main__.py", "bin/sos"])
def test_command_line_as_module_and_as_script_runs(
    program, tmp_path, capsys, monkeypatch
):
    path = tmp_path / "model.keras"
    sparse_model().save(path)
    monkeypatch.setattr(sys, "argv", [program, "report", str(path)])
    main()
    assert "Sparsity of small" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [program, "report"])
    with pytest.raises(SystemExit):
        main()
    expected = "sos report: " if program == "bin/sos" else "python -m sos"
    assert capsys.readouterr().err.startswith(expected)


def test_command_line_interrupted_exits_with_130(monkeypatch, capsys):
    def interrupt(options):
        raise KeyboardInterrupt

    monkeypatch.setattr("sos.commands.report.run", interrupt)
    with pytest.raises(SystemExit) as error:
        main(["report", "model.keras"])
    assert error.value.code == 130
    assert capsys.readouterr().err == "\nInterrupted.\n"


def test_command_line_reader_that_ends_exits_quietly(monkeypatch, capfd):
    monkeypatch.setattr("sos.commands.report.run", lambda options: "a line")
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as output:
        monkeypatch.setattr(sys, "stdout", output)
        with pytest.raises(SystemExit) as error:
            main(["report", "model.keras"])
    assert error.value.code == 141
    assert capfd.readouterr().err == ""


def test_command_csv_that_cannot_be_written_ends_with_one_line(
    tmp_path, capsys
):
    path = tmp_path / "model.keras"
    sparse_model().save(path)
    message = fails(capsys, path, "--csv", path / "rows.csv")
    assert "rows.csv" in message


# Damaged files.


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The bytes of a small saved model."""
    path = tmp_path_factory.mktemp("saved") / "model.keras"
    sparse_model().save(path)
    return path.read_bytes()


def outcome(capsys, path):
    """Whether the command read a file; otherwise it must fail in one line."""
    try:
        main(["report", str(path)])
    except SystemExit as error:
        assert error.code == 2
        captured = capsys.readouterr()
        assert captured.err.count("\n") == 1, captured.err
        assert captured.out == ""
        return False
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "a/kernel" in captured.out
    return True


def test_command_file_with_a_flipped_bit_is_reported_or_one_line(
    saved, tmp_path, capsys
):
    path = tmp_path / "model.keras"
    generator = np.random.default_rng(0)
    read = 0
    with zipfile.ZipFile(io.BytesIO(saved)) as archive:
        directory = archive.start_dir
    # Most bits are of weights. Names, sizes and flags stand at the end.
    places = [
        *generator.integers(0, len(saved), 60),
        *generator.integers(directory, len(saved), 60),
    ]
    for place in places:
        damaged = bytearray(saved)
        damaged[place] ^= 1 << generator.integers(8)
        path.write_bytes(damaged)
        read += outcome(capsys, path)
    # Such as those of a date.
    assert 0 < read < len(places) / 2


def test_command_file_cut_short_ends_with_one_line(saved, tmp_path, capsys):
    path = tmp_path / "model.keras"
    for size in [0, 1, 22, 30, *range(100, len(saved), len(saved) // 9)]:
        path.write_bytes(saved[:size])
        assert not outcome(capsys, path)


def members_of(saved):
    with zipfile.ZipFile(io.BytesIO(saved)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def damaged_weights(content, seed):
    generator = np.random.default_rng(seed)
    content = bytearray(content)
    for place in generator.integers(0, len(content), 40):
        content[place] = generator.integers(256)
    return bytes(content)


WEIGHTS = "model.weights.h5"
WRONG_MEMBERS = {
    "none": lambda members: {},
    "other": lambda members: {"notes.txt": b"text"},
    "no config": lambda members: drop(members, "config.json"),
    "no weights": lambda members: drop(members, WEIGHTS),
    "empty config": lambda members: {**members, "config.json": b""},
    "no JSON": lambda members: {**members, "config.json": b'{"module": '},
    "no text": lambda members: {**members, "config.json": b"\xff\xfe\x00"},
    "other JSON": lambda members: {**members, "config.json": b"[1, 2]"},
    "number": lambda members: {**members, "config.json": b"7"},
    "deep": lambda members: {**members, "config.json": b"[" * 100_000},
    "no class": lambda members: {
        **members,
        "config.json": members["config.json"].replace(b"units", b"unots"),
    },
    "other shape": lambda members: {
        **members,
        "config.json": members["config.json"].replace(
            b'"units": 2', b'"units": 5'
        ),
    },
    "no h5": lambda members: {**members, WEIGHTS: b"text"},
    "empty h5": lambda members: {**members, WEIGHTS: b""},
    "half h5": lambda members: {
        **members,
        WEIGHTS: members[WEIGHTS][: len(members[WEIGHTS]) // 2],
    },
}


def drop(members, name):
    return {key: value for key, value in members.items() if key != name}


@pytest.mark.parametrize("case", WRONG_MEMBERS)
def test_command_file_with_wrong_members_ends_with_one_line(
    case, saved, tmp_path, capsys
):
    path = tmp_path / "model.keras"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in WRONG_MEMBERS[case](members_of(saved)).items():
            archive.writestr(name, content)
    assert not outcome(capsys, path)


def test_command_file_with_damaged_weights_is_reported_or_one_line(
    saved, tmp_path, capsys
):
    path = tmp_path / "model.keras"
    members = members_of(saved)
    for seed in range(20):
        damaged = damaged_weights(members[WEIGHTS], seed)
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in {**members, WEIGHTS: damaged}.items():
                archive.writestr(name, content)
        outcome(capsys, path)


def test_command_encrypted_file_ends_with_one_line(saved, tmp_path, capsys):
    path = tmp_path / "model.keras"
    encrypted = bytearray(saved)
    # The flag of every member, in its own header and in the directory.
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        place = encrypted.find(signature)
        while place >= 0:
            encrypted[place + offset] |= 1
            place = encrypted.find(signature, place + 4)
    path.write_bytes(encrypted)
    with pytest.raises(SystemExit):
        main(["report", str(path)])
    assert "encrypted" in capsys.readouterr().err


def test_command_damaged_checkpoint_ends_with_one_line(tmp_path, capsys):
    prefix = tf.train.Checkpoint(model=sparse_model()).save(tmp_path / "c")
    index = pathlib.Path(f"{prefix}.index")
    content = index.read_bytes()
    for size in range(0, len(content), len(content) // 5 + 1):
        index.write_bytes(content[:size])
        fails(capsys, prefix)
    index.write_bytes(content)
    data = pathlib.Path(f"{prefix}.data-00000-of-00001")
    data.write_bytes(data.read_bytes()[:50])
    fails(capsys, prefix)
