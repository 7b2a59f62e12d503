from sos.experiments import tables
from tests.support.results import in_bleu, make_study, make_toy_run


def test_score_table_has_means_and_ranges():
    table = tables.score_table(make_study(spread=0.01))
    assert table.sparsities == ["dense", "50 %", "90 %", "98 %"]
    rows = {
        label: [str(cell or "") for cell in cells]
        for label, cells in table.rows
    }
    assert rows["dense"] == ["87.5 (87.0–88.0)", "", "", ""]
    assert rows["magnitude pruning"][:2] == ["", "86.5 (86.0–87.0)"]
    assert rows["scratch-e"][3] == "76.5 (76.0–77.0)"
    # It reaches 97.9 %, which is near enough.
    assert rows["l0 regularization"][3] == "84.5 (84.0–85.0)"


def test_score_table_labels_without_accuracy_have_no_row():
    runs = [make_toy_run("dense", 0.9, 0), make_toy_run("l0", None, 0, 0.9)]
    runs[1].result.metrics.pop("accuracy")
    assert [label for label, _ in tables.score_table(runs).rows] == ["dense"]


def test_cell_of_equal_rounded_ends_has_no_range():
    assert str(tables.Cell(86.9, 86.88, 86.92)) == "86.9"
    assert str(tables.Cell(86.9, 86.8, 87.0)) == "86.9 (86.8–87.0)"


def test_score_table_markdown_has_a_line_for_each_row():
    table = tables.score_table(make_study(seeds=[0], branches=False))
    assert table.markdown().splitlines()[:4] == [
        "|  | dense | 50 % | 90 % | 98 % |",
        "| --- | --- | --- | --- | --- |",
        "| dense | 87.0 |  |  |  |",
        "| magnitude pruning |  | 86.0 | 85.0 | 78.0 |",
    ]


def test_score_table_of_bleu_is_in_its_own_unit():
    runs = in_bleu(make_study(seeds=[0], branches=False))
    table = tables.score_table(runs)
    assert table.score.label == "BLEU"
    # 30 times 0.87, 0.86, 0.85 and 0.78.
    assert table.markdown().splitlines()[2:4] == [
        "| dense | 26.1 |  |  |  |",
        "| magnitude pruning |  | 25.8 | 25.5 | 23.4 |",
    ]
