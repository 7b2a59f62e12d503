import pytest

from tests.support import benchmarks

pytest.importorskip("tensorflow_datasets")


@pytest.mark.slow
def test_input_pipeline_prints_one_report_of_all_contestants():
    report = benchmarks.run(
        "input_pipeline", "--images=256", "--repeats=1", "--warm_up=0"
    )
    assert 90_000 < report["image_bytes"] < 130_000
    assert report["threads"] >= 1
    assert set(report["results"]) == {
        "bare kernels",
        "PIL",
        "TfdsImages.train",
        "TfdsImages.eval",
    }
    bound = report["results"]["bare kernels"]
    assert bound["of_bound"] == bound["processor_of_bound"] == 1.0
    for figures in report["results"].values():
        assert figures["images_per_second"] > 0
        assert 0 < figures["cores_for_h100"] < 1000
        assert figures["cores_for_h100"] == pytest.approx(
            5.6 * figures["processor_ms"], abs=0.1
        )
