import re

import pytest
from absl import flags
from absl.testing import flagsaver

from models import learn_vocabulary
from sos.datasets import libreoffice_help, subwords
from sos.errors import StorageError, UsageError
from tests.support import processes

pytest.importorskip("sentencepiece")
pytest.importorskip("tensorflow_text")


@pytest.fixture
def run():
    """Runs the program in this process."""

    def call(*arguments, **values):
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        with flagsaver.flagsaver(**values):
            learn_vocabulary._run(list(arguments))

    return call


@pytest.fixture
def data(tmp_path):
    """A directory of text files with 300 of the embedded pairs."""
    directory = tmp_path / "data"
    directory.mkdir()
    pairs = libreoffice_help.load().train
    for split in ("train", "validation", "test"):
        for language, side in (("en", pairs.source), ("de", pairs.target)):
            text = "\n".join(side[:300])
            (directory / f"{split}.{language}").write_text(text, "utf-8")
    return str(directory)


def test_learn_vocabulary_writes_exactly_as_many_entries(
    run, data, tmp_path, capsys
):
    output = tmp_path / "new" / "vocabulary.model"
    run(data=data, size=600, output=str(output))
    vocabulary = subwords.Subwords.load(output)
    assert vocabulary.size == 600
    text = capsys.readouterr().out
    assert f"Wrote {output}: 600 entries" in text
    assert vocabulary.fingerprint in text
    pairs = libreoffice_help.load().train
    sentences = [*pairs.source[:300], *pairs.target[:300]]
    assert vocabulary.model == subwords.learn(sentences, 600)
    lengths = vocabulary.tokenize(sentences).row_lengths().numpy()
    means = lengths[:300].mean(), lengths[300:].mean()
    assert f"{means[0]:.1f} (en), {means[1]:.1f} (de)" in text
    assert "(300 pairs in" in text


def test_learn_vocabulary_again_keeps_it(run, data, tmp_path, capsys):
    output = tmp_path / "vocabulary.model"
    arguments = {"data": data, "output": str(output)}
    run(**arguments, size=600)
    written = output.stat().st_mtime_ns
    run(**arguments, size=600)
    assert f"Kept {output}" in capsys.readouterr().out
    with pytest.raises(UsageError, match="not replaced by another"):
        run(**arguments, size=601)
    assert output.stat().st_mtime_ns == written


def test_learn_vocabulary_from_some_pairs(run, data, tmp_path, capsys):
    output = tmp_path / "vocabulary.model"
    run(data=data, size=500, output=str(output), pairs=100)
    pairs = libreoffice_help.load().train
    model = subwords.learn([*pairs.source[:300:3], *pairs.target[:300:3]], 500)
    assert subwords.Subwords.load(output).model == model
    text = capsys.readouterr().out
    assert "learned from 100 pairs" in text and "(300 pairs in" in text


def test_learn_vocabulary_prints_the_fill_of_other_rows(
    run, data, tmp_path, capsys
):
    run(
        data=data,
        size=600,
        output=str(tmp_path / "vocabulary.model"),
        source="de",
        target="en",
        source_length=100,
        target_length=20,
    )
    text = capsys.readouterr().out
    assert "of 100 (de)" in text and "of 20 (en)" in text
    assert "; 0 dropped)" not in text


def test_learn_vocabulary_whose_pairs_fit_no_row_is_written(
    run, data, tmp_path, capsys
):
    output = tmp_path / "vocabulary.model"
    run(data=data, size=600, output=str(output), source_length=1)
    assert subwords.Subwords.load(output).size == 600
    assert (
        "No pair fits into rows of 1 and 256 tokens" in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"data": None}, "--data is required, such as --data=libre"),
        ({"output": ""}, "--output is required"),
        ({"output": "."}, "which is a directory"),
        ({"size": 10}, "size=10"),
        ({"data": "/absent"}, "'/absent', which is none of these"),
    ],
    ids=str,
)
def test_learn_vocabulary_with_an_invalid_flag_raises(
    run, tmp_path, changed, message
):
    output = str(tmp_path / "vocabulary.model")
    values = {"data": "libreoffice_help", "size": 600, "output": output}
    with pytest.raises(UsageError, match=message):
        run(**{**values, **changed})


def test_learn_vocabulary_that_cannot_be_written_raises_first(
    run, data, tmp_path, monkeypatch
):
    monkeypatch.setattr(subwords, "learn", pytest.fail)
    tmp_path.joinpath("file").touch()
    with pytest.raises(StorageError, match="cannot be written"):
        run(data=data, size=600, output=f"{tmp_path}/file/words.model")


def test_learn_vocabulary_with_arguments_raises(run):
    with pytest.raises(UsageError, match="only flags. Received: file.en"):
        run("file.en")


@pytest.mark.slow
def test_learn_vocabulary_as_a_program_prints_what_it_made(tmp_path):
    program = processes.Program(
        "models.learn_vocabulary",
        "--data=libreoffice_help",
        "--size=4000",
        f"--output={tmp_path / 'vocabulary.model'}",
        log=tmp_path / "log",
    )
    assert program.process.wait(processes.PATIENCE) == 0
    lines = (tmp_path / "log").read_text().splitlines()
    # Besides the log, nothing of TensorFlow and its relatives.
    lines = [line for line in lines if not re.match(r"I\d{4} ", line)]
    assert [line.split()[0] for line in lines] == [
        *("Reading", "Learning", "Wrote", "Tokens", "Places")
    ]
    assert subwords.Subwords.load(tmp_path / "vocabulary.model").size == 4000
