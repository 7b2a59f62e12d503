from tests.support import benchmarks


def test_frozen_prints_one_report_of_all_contestants():
    report = benchmarks.run(
        "frozen", "--vocabulary=50", "--width=4", "--steps=2", "--repeats=1"
    )
    assert len(report["results"]) == 7
    for figures in report["results"].values():
        assert figures["milliseconds"] > 0
