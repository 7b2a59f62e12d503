from tests.support import benchmarks


def test_tpu_compile_lower_only_prints_one_report_of_the_technique():
    report = benchmarks.run(
        "tpu_compile",
        "--technique=L0Regularization",
        "--replicas=2",
        "--batch_size=2",
        "--lower_only",
    )
    assert report["compiler"] is None
    assert report["refused"] == {}
    (figures,) = report["results"].values()
    assert figures["batch_arguments"] == 2
    assert figures["stablehlo_kib"] > 1
