from sos.experiments import tables
from tests.support.results import make_study


def test_accuracy_table_has_means_and_ranges():
    table = tables.accuracy_table(make_study(spread=0.01))
    assert table.headings == ["technique", "dense", "50 %", "90 %", "98 %"]
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows["dense"] == ["87.5 (87.0–88.0)", "", "", ""]
    assert rows["magnitude pruning"][:2] == ["", "86.5 (86.0–87.0)"]
    assert rows["scratch-e"][3] == "76.5 (76.0–77.0)"
    # At 98 %, between 97.9 and no point: the end is near enough.
    assert rows["l0 regularization"][3] == "84.5 (84.0–85.0)"


def test_table_markdown_has_a_line_for_each_row():
    table = tables.accuracy_table(make_study(seeds=[0], branches=False))
    assert table.markdown().splitlines()[:3] == [
        "| technique | dense | 50 % | 90 % | 98 % |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| dense | 87.0 |  |  |  |",
    ]
