import keras
import pytest

from tests.support import benchmarks


@pytest.fixture(autouse=True)
def dtype_policy():
    """Puts back what the benchmark sets."""
    yield
    keras.config.set_dtype_policy("float32")


def test_tpu_compile_lower_only_prints_one_report_of_the_technique():
    report = benchmarks.run(
        "tpu_compile",
        "--technique=L0Regularization",
        "--replicas=2",
        "--batch_size=2",
        "--lower_only",
    )
    assert report["compiler"] is None
    assert report["errors"] == {}
    (figures,) = report["results"].values()
    assert figures["batch_arguments"] == 2
    assert figures["stablehlo_kib"] > 1


@pytest.mark.slow
def test_tpu_compile_prints_memory_and_operations(tmp_path):
    report = benchmarks.run(
        "tpu_compile",
        "--model=attention",
        "--technique=VariationalDropout",
        "--batch_size=2",
        f"--venv={tmp_path / 'compiler'}",
    )
    assert report["errors"] == {}
    (figures,) = report["results"].values()
    assert 0 < figures["total_mib"] < figures["limit_mib"]
    assert figures["gflop"] > 0
