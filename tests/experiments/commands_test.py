"""The commands that read runs and published results."""

import sys

import pytest

from sos.__main__ import main


@pytest.fixture
def fails(capsys):
    def call(*arguments):
        with pytest.raises(SystemExit) as error:
            main([str(argument) for argument in arguments])
        assert error.value.code == 2
        captured = capsys.readouterr()
        assert captured.err.count("\n") == 1, captured.err
        assert captured.out == ""
        return captured.err

    return call


def drawn(folder):
    return {path.name for path in folder.iterdir()}


def test_figures_of_a_reference_draws_the_paper(tmp_path, capsys):
    main(["figures", "--reference=resnet50", f"--out={tmp_path / 'new'}"])
    expected = {"published_resnet50.png", "published_resnet50_branches.png"}
    assert drawn(tmp_path / "new") == expected
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(" ")[0] for line in lines] == ["Wrote", "Wrote"]


def test_figures_of_a_study_draws_all_of_its_figures(finished, tmp_path):
    main(["figures", str(finished), f"--out={tmp_path}"])
    assert {"tradeoff.png", "layerwise.png"} <= drawn(tmp_path)


def test_figures_of_a_study_and_a_reference_draws_both(finished, tmp_path):
    arguments = ["--reference=transformer", "--metric=accuracy"]
    main(["figures", str(finished), *arguments, f"--out={tmp_path}"])
    assert drawn(tmp_path) == {"published_transformer_runs.png"}


def test_figures_without_anything_to_draw_fails(fails):
    assert "--reference" in fails("figures")


def test_figures_with_a_metric_but_no_runs_fails(fails):
    message = fails("figures", "--reference=resnet50", "--metric=top5")
    assert "--metric=top5" in message


def test_compare_prints_a_table_and_writes_it(finished, tmp_path, capsys):
    path = tmp_path / "rows.csv"
    main(["compare", str(finished), "--reference=resnet50", f"--csv={path}"])
    assert "magnitude pruning" in capsys.readouterr().out
    assert len(path.read_text("utf-8").splitlines()) == 4


@pytest.mark.parametrize("command", ["figures", "compare"])
def test_command_without_finished_runs_fails(command, tmp_path, fails):
    message = fails(command, tmp_path, "--reference=resnet50")
    assert "no finished runs" in message


@pytest.mark.parametrize("command", ["figures", "compare", "results"])
@pytest.mark.parametrize("name", ["missing", "a file"])
def test_command_without_a_directory_fails(command, name, tmp_path, fails):
    (tmp_path / "a file").touch()
    arguments = ["--reference=resnet50"] * (command != "results")
    message = fails(command, tmp_path / name, *arguments)
    assert f"There is no directory {tmp_path / name}" in message


@pytest.mark.parametrize("command", ["figures", "compare"])
def test_command_unknown_reference_fails(command, finished, fails):
    assert "'vgg'" in fails(command, finished, "--reference=vgg")


@pytest.mark.parametrize("command", ["figures", "compare"])
def test_command_without_the_metric_fails(command, finished, fails):
    message = fails(command, finished, "--reference=transformer")
    assert "'study_bleu'" in message and "accuracy" in message


def test_compare_without_a_reference_fails(finished, fails):
    assert "--reference" in fails("compare", finished)


def test_compare_to_a_file_that_cannot_be_written_fails(
    finished, tmp_path, fails
):
    arguments = ("--reference=resnet50", f"--csv={tmp_path}")
    assert "could not be written" in fails("compare", finished, *arguments)


@pytest.mark.parametrize("command", ["figures", "compare"])
def test_command_without_the_extra_names_it(command, monkeypatch, fails):
    for name in list(sys.modules):
        if name.startswith("sos.experiments"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    message = fails(command, "runs", "--reference=resnet50")
    assert "pip install 'state-of-sparsity[study]'" in message
