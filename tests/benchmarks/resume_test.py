import pytest

from tests.support import benchmarks


@pytest.mark.slow
def test_resume_prints_one_report_of_all_contestants():
    report = benchmarks.run(
        "resume",
        "--model=small",
        "--files=4",
        "--records=100",
        "--repeats=1",
    )
    assert {name.partition(":")[0] for name in report["results"]} == {
        "save",
        "restore",
        "records",
    }
    for figures in report["results"].values():
        assert 0 < figures["min_ms"] <= figures["max_ms"]
