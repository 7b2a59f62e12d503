"""`python -m sos results`."""

import pandas as pd
import pytest

from sos.__main__ import main
from sos.experiments import results
from tests.support.results import in_bleu, make_study


@pytest.fixture(autouse=True)
def runs(monkeypatch, tmp_path):
    """Runs that seem to be in any directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    study = make_study()
    monkeypatch.setattr("sos.experiments.collect", lambda workdirs: study)
    return study


def _output(capsys, *arguments):
    main(["results", "runs", *arguments])
    return capsys.readouterr().out


def _error(capsys, *arguments):
    with pytest.raises(SystemExit) as error:
        main(["results", "runs", *arguments])
    assert error.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    return message


def test_results_prints_a_row_for_each_run(capsys, runs):
    lines = _output(capsys).splitlines()
    assert len(lines) == 2 + len(runs)
    assert "branch" not in lines[0]
    assert "0.872" in lines[3]


def test_results_where_keeps_runs_that_meet_the_condition(capsys):
    condition = "technique == 'MagnitudePruning' and sparsity >= 0.9"
    lines = _output(
        capsys, "--where", condition, "--columns=label,sparsity,seed"
    ).splitlines()[2:]
    assert [line.split() for line in lines] == [
        ["magnitude", "pruning", sparsity, seed]
        for sparsity in ("0.9", "0.98")
        for seed in "01"
    ]
    # The name of an entry of the config.
    condition = "`sparsity.penalty_weight` > 0.002 and seed == 1"
    lines = _output(capsys, "--where", condition).splitlines()[2:]
    assert [line.split()[2] for line in lines] == ["0.979"]


def test_results_mean_has_a_row_for_each_point(capsys):
    lines = _output(
        capsys, "--mean", "--columns=label,seeds,accuracy", "--sort=-accuracy"
    ).splitlines()[2:]
    assert lines[0].split() == ["dense", "2", "0.871"]
    assert len(lines) == 1 + 3 * 3 + 4 * 3


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--where", "accuracy >"], "accuracy >"),
        (["--where", "accuracy"], "not a condition"),
        (["--where", "speed > 1"], "speed"),
        (["--where", "accuracy > 1"], "none of the 44 runs"),
        (["--sort=-speed"], "speed"),
        (["--columns=label,speed"], "speed"),
    ],
)
def test_results_wrong_argument_ends_with_one_line(capsys, arguments, part):
    assert part in _error(capsys, *arguments)


def test_results_without_runs_names_the_directory(capsys, monkeypatch):
    monkeypatch.setattr("sos.experiments.collect", lambda workdirs: [])
    assert "finished runs in runs" in _error(capsys)


def test_results_exported_files_have_all_columns(capsys, tmp_path, runs):
    csv, parquet = tmp_path / "a.csv", tmp_path / "a.parquet"
    _output(capsys, f"--csv={csv}", f"--parquet={parquet}", "--columns=label")
    for table in (pd.read_csv(csv), pd.read_parquet(parquet)):
        assert list(table.columns) == list(results.frame(runs).columns)
        assert table["accuracy"].tolist() == [
            run.result.metrics["accuracy"] for run in runs
        ]
        assert table["branch"].iloc[-1] == "lottery_ticket"
    assert {path.name for path in tmp_path.iterdir()} == {
        csv.name,
        parquet.name,
        "runs",
    }


def test_results_parquet_column_of_mixed_values_is_text(capsys, tmp_path, runs):
    runs[2].config["sparsity"]["sparsity"] = "2:4"
    path = tmp_path / "a.parquet"
    _output(capsys, f"--parquet={path}")
    values = pd.read_parquet(path)["sparsity.sparsity"]
    assert values.iloc[2:5].tolist() == ["2:4", "0.5", "0.9"]


def test_results_file_that_cannot_be_written_ends_with_one_line(
    capsys, tmp_path
):
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "a.csv"
    assert str(path) in _error(capsys, f"--csv={path}")


def test_results_markdown_is_the_table_of_the_report(capsys):
    text = _output(capsys, "--markdown=scores")
    assert "| magnitude pruning |  | 86.1 (86.0–86.2) |" in text
    text = _output(capsys, "--markdown=findings")
    assert (
        "| Longer training from scratch helps | yes | +1.0 [+1.0, +1.0] |"
        in text
    )


def test_results_of_bleu_have_its_column(capsys, monkeypatch, runs):
    study = in_bleu(runs)
    monkeypatch.setattr("sos.experiments.collect", lambda workdirs: study)
    heading, _, first, *_ = _output(capsys, "--sort=-bleu").splitlines()
    assert (
        heading.split()
        == "label sparsity achieved_sparsity bleu loss seed seconds".split()
    )
    assert "26.16" in first
    assert "| dense | 26.1 (26.1–26.2) |" in _output(
        capsys, "--markdown=scores"
    )


def test_results_markdown_of_two_scores_ends_with_one_line(
    capsys, monkeypatch, runs
):
    study = [*runs, *in_bleu(runs)]
    monkeypatch.setattr("sos.experiments.collect", lambda workdirs: study)
    assert "accuracy" in _output(capsys)
    assert "accuracy, BLEU" in _error(capsys, "--markdown=scores")
    text = _output(capsys, "--markdown=scores", "--where=bleu > 0")
    assert "| dense | 26.1 (26.1–26.2) |" in text
