import pytest

from benchmarks import launchers
from tests.support import benchmarks
from tests.support.toy_experiment import SerialLauncher


@pytest.mark.slow
def test_launchers_prints_one_report_of_all_ways(monkeypatch):
    monkeypatch.setattr(launchers, "LocalLauncher", SerialLauncher)
    report = benchmarks.run(
        "launchers", "--steps=2", "--seeds=1", "--techniques="
    )
    assert report["runs"] == 1
    assert len(report["results"]) == 3
    for figures in report["results"].values():
        assert figures["seconds"] > 0
