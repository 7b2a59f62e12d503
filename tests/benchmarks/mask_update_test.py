import pytest

from tests.support import benchmarks


@pytest.mark.slow
def test_mask_update_prints_one_report_of_all_contestants():
    report = benchmarks.run("mask_update", "--model=convnet", "--repeats=1")
    assert report["tensors"] == 5
    assert report["weights"] == 155_536
    assert set(report["results"]) == {
        "sos",
        "sos, device path on CPU",
        "XLA's sort on CPU",
        "tfmot",
        "numpy.partition",
    }
    for figures in report["results"].values():
        assert 0 < figures["min_ms"] <= figures["max_ms"]
    assert report["results"]["tfmot"]["times_faster_than_tfmot"] == 1
