"""The program that translates files."""

import contextlib
import io
import json
import signal
import subprocess
import sys
import types

import keras
import numpy as np
import pytest

import sos.experiments
from models import partial_file, translate, translators, wmt
from sos.errors import StorageError, UsageError
from sos.experiments import config as config_lib
from sos.experiments.run_files import read_result
from sos.training.checkpoints import named_variables
from tests.models import wmt_test
from tests.support import processes, toy_experiment


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The directory of a finished run."""
    data = tmp_path_factory.mktemp("data")
    wmt_test.write_pairs(data)
    workdir = tmp_path_factory.mktemp("runs")
    config = wmt_test.tiny_config(
        data,
        "magnitude,train_steps=6",
        decode={"extra_length": 2, "sentences": 2},
        learning_rate={"warmup_steps": 1},
    )
    sos.experiments.run(config, workdir, quiet=True)
    # The run has all that is needed.
    for file in data.iterdir():
        file.unlink()
    wmt._load.cache_clear()
    wmt._learn.cache_clear()
    sos.experiments.run(config, workdir, mode="export", quiet=True)
    return workdir / config_lib.run_name(config)


@pytest.fixture(scope="module")
def export(run):
    return run / "export" / "6"


class Upper:
    """Translates to upper case, and can be interrupted.

    Args:
        fail_after: Number of calls that succeed.
        error: What the next one raises.
    """

    fingerprint = "upper"
    cut = failed = 0

    def __init__(self, fail_after=None, error=KeyboardInterrupt):
        self.lines = []
        self.calls = 0
        self.fail_after = fail_after
        self.error = error

    def __call__(self, lines, on_batch):
        if self.calls == self.fail_after:
            raise self.error
        self.calls += 1
        self.lines += lines
        on_batch(len(lines))
        return [line.upper() for line in lines]


@pytest.fixture
def program(monkeypatch, tmp_path):
    """Runs the program with a fake model in a directory of its own."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments, translator=None, stdin=b""):
        made = translator or Upper()
        monkeypatch.setattr(translate, "RunTranslator", lambda *_: made)
        fake = types.SimpleNamespace(buffer=io.BytesIO(stdin))
        monkeypatch.setattr(sys, "stdin", fake)
        return translate.main(["--run=fake", *arguments])

    return call


AWKWARD = (
    b"one\n"
    b"\n"
    b"crlf\r\n"
    b"inner\rreturn\n"
    b"bad \xff\xfe bytes\n"
    + "Привет 你好 مرحبا 😀 a\u2028b\n".encode()
    + b"   \n"
    + b"word " * 500
    + b"\nlast"
)
AWKWARD_LINES = 9


def test_translate_gives_a_line_for_each_line(program, tmp_path):
    (tmp_path / "in.txt").write_bytes(AWKWARD)
    assert program("--input=in.txt", "--output=out.txt") == 0
    lines = (tmp_path / "out.txt").read_bytes().decode().split("\n")
    assert lines.pop() == ""
    assert len(lines) == AWKWARD_LINES
    assert lines[:4] == ["ONE", "", "CRLF", "INNER RETURN"]
    assert lines[4] == "BAD \ufffd\ufffd BYTES"
    assert lines[5] == "ПРИВЕТ 你好 مرحبا 😀 A B"
    assert lines[6].strip() == ""
    assert lines[8] == "LAST"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "in.txt",
        "out.txt",
    ]


def test_translate_reads_and_writes_streams(program, capfdbinary):
    assert program(stdin=b"one\ntwo\n") == 0
    captured = capfdbinary.readouterr()
    assert captured.out == b"ONE\nTWO\n"
    assert b"2 lines" in captured.err


@pytest.mark.parametrize("stdin", [b"", b"\n"])
def test_translate_without_text_writes_as_many_lines(program, tmp_path, stdin):
    assert program("--output=out.txt", stdin=stdin) == 0
    assert (tmp_path / "out.txt").read_bytes() == stdin


@pytest.mark.parametrize("source", ["file", "stream"])
def test_interrupted_translation_continues(program, tmp_path, source, capsys):
    lines = [f"line {number}" for number in range(10)]
    text = "".join(f"{line}\n" for line in lines).encode()
    (tmp_path / "in.txt").write_bytes(text)
    arguments = ["--output=out.txt", "--chunk_lines=3"]
    if source == "file":
        arguments.append("--input=in.txt")
    broken = Upper(fail_after=2)
    assert program(*arguments, translator=broken, stdin=text) == 130
    assert "Run the same command again" in capsys.readouterr().err
    assert broken.lines == lines[:6]
    assert not (tmp_path / "out.txt").exists()
    partial = tmp_path / "out.txt.partial"
    assert partial.read_text() == "".join(f"LINE {n}\n" for n in range(6))
    # As after a power cut in the middle of a chunk.
    with partial.open("a") as file:
        file.write("LINE 6\nLI")
    rest = Upper()
    assert program(*arguments, translator=rest, stdin=text) == 0
    assert "Continuing after 6 lines" in capsys.readouterr().err
    assert rest.lines == lines[6:]
    assert (tmp_path / "out.txt").read_bytes() == text.upper()
    assert not list(tmp_path.glob("*.partial*"))
    # Again from the beginning, over the old file.
    again = Upper()
    assert program(*arguments, translator=again, stdin=text) == 0
    assert again.lines == lines


def interrupt(program, tmp_path):
    """Leaves the translation of two of three lines."""
    (tmp_path / "in.txt").write_text("a\nb\nc\n")
    arguments = ("--input=in.txt", "--output=out.txt", "--chunk_lines=1")
    assert program(*arguments, translator=Upper(fail_after=2)) == 130
    return arguments


def test_another_model_or_input_is_noticed(program, tmp_path, capsys):
    arguments = interrupt(program, tmp_path)
    other = Upper()
    other.fingerprint = "another"
    capsys.readouterr()
    assert program(*arguments, translator=other) == 1
    assert "begun with another model" in capsys.readouterr().err
    (tmp_path / "in.txt").write_text("a\nB\nc\n")
    assert program(*arguments) == 1
    error = capsys.readouterr().err
    assert "begun with another input: its first 2 lines" in error
    (tmp_path / "in.txt").write_text("a\n")
    assert program(*arguments) == 1
    assert "begun with another input" in capsys.readouterr().err
    # What follows may differ.
    (tmp_path / "in.txt").write_text("a\nb\nd\ne\n")
    assert program(*arguments) == 0
    assert (tmp_path / "out.txt").read_text() == "A\nB\nD\nE\n"


def test_damaged_state_is_noticed(program, tmp_path, capsys):
    arguments = interrupt(program, tmp_path)
    (tmp_path / "out.txt.partial.json").write_text("{")
    assert program(*arguments) == 1
    assert "partial.json is damaged" in capsys.readouterr().err
    state = {"model": "upper", "lines": 2, "input": "", "bytes": 99}
    (tmp_path / "out.txt.partial.json").write_text(json.dumps(state))
    assert program(*arguments) == 1
    assert "is shorter" in capsys.readouterr().err
    (tmp_path / "out.txt.partial").unlink()
    assert program(*arguments) == 0


def test_state_of_a_finished_file_is_forgotten(program, tmp_path):
    """As after a kill between the two last operations."""
    arguments = interrupt(program, tmp_path)
    (tmp_path / "out.txt.partial").unlink()
    other = Upper(fail_after=0)
    other.fingerprint = "another"
    assert program(*arguments, translator=other) == 130
    assert not (tmp_path / "out.txt.partial.json").exists()


def test_lines_that_were_cut_or_failed_are_counted(program, tmp_path, capsys):
    translator = Upper()
    translator.cut, translator.failed = 2, 1
    assert program("--output=out.txt", translator=translator, stdin=b"a") == 0
    error = capsys.readouterr().err
    assert "2 lines were cut to 1,024 subwords" in error
    assert "1 lines have no translation, as logits are NaN" in error
    stopped = Upper(fail_after=0)
    stopped.cut = 3
    assert program("--output=out.txt", translator=stopped, stdin=b"a") == 130
    assert "3 lines were cut" in capsys.readouterr().err


def test_two_processes_cannot_write_one_file(tmp_path):
    path = str(tmp_path / "out.txt")
    first = partial_file.PartialFile(path, "model")
    with contextlib.closing(first):
        with pytest.raises(StorageError, match="Another process"):
            partial_file.PartialFile(path, "model")
    partial_file.PartialFile(path, "model").close()


def test_memory_is_bounded_by_the_chunk(program):
    held = []

    class Counting(Upper):
        def __call__(self, lines, on_batch):
            held.append(len(lines))
            return super().__call__(lines, on_batch)

    text = b"line\n" * 25
    assert (
        program(
            "--chunk_lines=10",
            "--output=out.txt",
            translator=Counting(),
            stdin=text,
        )
        == 0
    )
    assert held == [10, 10, 5]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--input=missing.txt"], ["--input", "missing.txt", "No such file"]),
        (["--input=."], ["--input", "directory"]),
        (["--output=."], ["--output", "directory"]),
        (["--output=gs://b/out"], ["--output", "local", "gs://b/out"]),
        (["--input=gs://b/in"], ["--input", "local", "gs://b/in"]),
        (["--batch_size=0"], ["--batch_size", "at least 1", "0"]),
        (["--chunk_lines=x"], ["--chunk_lines", "at least 1", "x"]),
        (["--model=x"], ["not allowed with", "--help"]),
        (["extra"], ["extra"]),
    ],
)
def test_mistakes_are_named_in_one_line(program, arguments, parts, capsys):
    assert program(*arguments) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("FATAL ")
    for part in parts:
        assert part in line


def test_translate_without_a_model_names_both(capsys):
    assert translate.main([]) == 1
    error = capsys.readouterr().err
    assert "--run" in error
    assert "--model" in error


# With models.


def text_of(run):
    lines = ["Close the file.", "", "What is this?", "Привет 😀", "x" * 40]
    return "".join(f"{line}\n" for line in lines).encode()


def test_run_and_export_translate_alike(run, export, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.txt").write_bytes(text_of(run))
    for name, model in ("run", run), ("export", export):
        kind = "run" if name == "run" else "model"
        code = translate.main(
            [f"--{kind}={model}", "--input=in.txt", f"--output={name}.txt"]
        )
        assert code == 0
    lines = (tmp_path / "run.txt").read_text()
    assert lines.count("\n") == 5
    assert (tmp_path / "export.txt").read_text() == lines


def table_of(run, step):
    """Returns the table of the embedding in a checkpoint."""
    values = processes.checkpoint_values(run, step)
    return values["transformer/embedding/embeddings"]


def test_run_translator_has_the_weights_of_the_checkpoint(run):
    found = translators.RunTranslator(str(run), 3)
    table = found._decoder.model.embedding.embeddings
    np.testing.assert_array_equal(table, table_of(run, 6))
    report = sos.sparsity_report(found._decoder.model)
    assert report.sparsity == read_result(str(run)).sparsity > 0.7
    again = translators.RunTranslator(str(run), 64)
    vocabulary = (run / wmt.VOCABULARY).read_bytes()
    assert found._decoder._subwords.model == vocabulary
    assert again.fingerprint == found.fingerprint


@pytest.mark.slow
def test_run_translator_keeps_the_mean_of_checkpoints(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    wmt_test.write_pairs(data)
    config = wmt_test.tiny_config(
        data,
        "dense,train_steps=2",
        decode={"average_checkpoints": 2, "extra_length": 0, "sentences": 2},
        learning_rate={"warmup_steps": 1},
        keep="all",
    )
    sos.experiments.run(config, tmp_path, quiet=True, save_checkpoints_steps=1)
    sos.experiments.run(config, tmp_path, quiet=True, mode="export")
    directory = tmp_path / config_lib.run_name(config)
    found = translators.RunTranslator(str(directory), 3)
    values = [processes.checkpoint_values(directory, step) for step in (1, 2)]
    weights = {
        name: np.array(variable)
        for name, variable in named_variables(found._decoder.model).items()
        if keras.backend.is_float_dtype(variable.dtype)
    }
    # Blocks are in a list of the network.
    assert "transformer/encoder/feed_forward/expansion/kernel" in weights
    for name, weight in weights.items():
        first, second = (each[name] for each in values)
        assert not np.array_equal(first, second)
        np.testing.assert_allclose(weight, (first + second) / 2, rtol=1e-5)
    exported = translators.ExportTranslator(str(directory / "export" / "2"), 3)
    lines = ["What is this?", "Close the file."]
    assert found(lines, int) == exported(lines, int)


def test_directory_that_is_no_translation_raises(run, tmp_path):
    with pytest.raises(UsageError, match="config.json"):
        translators.RunTranslator(str(tmp_path), 3)
    with pytest.raises(UsageError, match="--mode=export"):
        translators.ExportTranslator(str(tmp_path), 3)
    config = toy_experiment.config(train_steps=1)
    sos.experiments.run(config, tmp_path, quiet=True)
    other = tmp_path / config_lib.run_name(config_lib.resolve(config))
    with pytest.raises(UsageError, match="that translates"):
        translators.RunTranslator(str(other), 3)


def test_export_batches_have_every_line(export):
    found = translators.ExportTranslator(str(export), 2)
    lines = ["What is this?", "", "Close the file.", "a", "b"]
    counts = []
    texts = found(lines, counts.append)
    assert sum(counts) == len(lines)
    assert max(counts) <= 2
    assert [found([line], counts.append)[0] for line in lines] == texts
    assert (found.cut, found.failed) == (0, 0)
    found(["a" * 3000, "b"], counts.append)
    assert (found.cut, found.failed) == (1, 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)]
)
def test_program_stops_at_a_signal_and_continues(run, tmp_path, signum, code):
    source = tmp_path / "in.txt"
    source.write_text("".join(f"Close file {n}.\n" for n in range(400)))
    output = tmp_path / "out.txt"
    arguments = (f"--run={run}", f"--input={source}", "--chunk_lines=8")

    def start(path):
        return processes.Program(
            "models.translate",
            *arguments,
            f"--output={path}",
            log=tmp_path / f"{path.name}.log",
        )

    partial = tmp_path / "out.txt.partial.json"
    with start(output) as program:
        program.wait_until(partial.exists)
        program.stop(signum)
        assert program.wait() == code, program.output
    assert "Run the same command again" in program.output
    assert not output.exists()
    with start(output) as program:
        program.wait_until(
            lambda: json.loads(partial.read_text())["lines"] > 100
        )
        program.kill()
    with start(output) as program:
        assert program.wait() == 0, program.output
    assert "Continuing after" in program.output
    whole = tmp_path / "whole.txt"
    with start(whole) as program:
        assert program.wait() == 0, program.output
    assert output.read_bytes() == whole.read_bytes()
    assert output.read_text().count("\n") == 400


@pytest.mark.slow
def test_program_ends_quietly_if_nobody_reads(run):
    command = f"yes Close the file. | {sys.executable} -m models.translate "
    command += f"--run={run} --chunk_lines=4 | head -3"
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=processes.ROOT,
        capture_output=True,
        text=True,
        timeout=processes.PATIENCE,
    )
    assert done.stdout.count("\n") == 3
    assert "Traceback" not in done.stderr
