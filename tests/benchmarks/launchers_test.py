import pytest

from tests.support import benchmarks


@pytest.mark.slow
def test_launchers_prints_one_report_of_all_ways():
    report = benchmarks.run(
        "launchers", "--steps=10", "--seeds=1", "--techniques=MagnitudePruning"
    )
    assert report["runs"] == 3
    assert len(report["results"]) == 3
    for figures in report["results"].values():
        assert figures["seconds"] > 0
