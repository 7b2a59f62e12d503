import re
import sys

import keras
import pytest

from benchmarks import tpu_compile
from benchmarks.compilers import OutOfMemory
from tests.support import benchmarks


@pytest.fixture(autouse=True)
def dtype_policy():
    """Puts back what the benchmark sets."""
    yield
    keras.config.set_dtype_policy("float32")


def test_tpu_compile_lower_only_prints_one_report_of_all_batch_sizes():
    report = benchmarks.run(
        "tpu_compile",
        "--technique=L0Regularization",
        "--replicas=2",
        "--batch_size=2,4",
        "--lower_only",
    )
    assert report["compiler"] is None
    assert report["errors"] == {}
    assert list(report["results"]) == [
        "L0Regularization, 2",
        "L0Regularization, 4",
    ]
    for figures in report["results"].values():
        assert figures["batch_arguments"] == 2
        assert figures["stablehlo_kib"] > 1


def test_tpu_compile_config_lowers_the_step_of_a_run():
    report = benchmarks.run(
        "tpu_compile",
        "--config=configs/fashion_mnist.py:variational_dropout",
        "--set=dtype_policy=mixed_bfloat16",
        "--replicas=2",
        "--batch_size=4",
        "--lower_only",
    )
    assert report["errors"] == {}
    figures = report["results"]["variational_dropout, 4"]
    # The images and the labels.
    assert figures["batch_arguments"] == 2
    assert figures["stablehlo_kib"] > 1


@pytest.mark.parametrize(
    "override, message",
    [
        ("data.nam=x", "--set must be NAME=VALUE.*data.nam=x"),
        ("train_steps=many", "--set must be NAME=VALUE.*train_steps=many"),
        ("train_steps", "--set must be NAME=VALUE.*Received: train_steps"),
        ("data=18", "--set must be NAME=VALUE.*data=18"),
        ("loss.label_smoothing=2.0", "label_smoothing.*Received: 2.0"),
        ("gradient_accumulation_steps=3", "gradient_accumulation_steps=3"),
    ],
)
def test_tpu_compile_with_a_wrong_override_names_it(
    override, message, monkeypatch
):
    arguments = (
        *("tpu_compile", "--config=configs/fashion_mnist.py"),
        *("--replicas=2", "--batch_size=4", "--lower_only"),
        f"--set={override}",
    )
    monkeypatch.setattr(sys, "argv", list(arguments))
    with pytest.raises(SystemExit, match=message):
        tpu_compile.main()


def test_tpu_compile_step_that_does_not_fit_is_a_result(monkeypatch, capsys):
    def run_worker(*arguments):
        raise OutOfMemory("RESOURCE_EXHAUSTED: 16.4G exceeds 15.75G")

    monkeypatch.setattr(tpu_compile, "run_worker", run_worker)
    monkeypatch.setattr(
        tpu_compile, "make_environment", lambda *arguments: "python"
    )
    report = benchmarks.run(
        "tpu_compile", "--technique=dense", "--replicas=1", "--batch_size=1"
    )
    assert report["results"] == report["errors"] == {}
    assert "16.4G" in report["out_of_memory"]["dense, 1"]
    assert "dense, 1: RESOURCE_EXHAUSTED" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argument, message",
    [
        ("--technique=dense,L1", "L0Regularization.*Received: 'L1'"),
        ("--batch_size=2,0", "--batch_size must be at least 1. Received: 0"),
        ("--batch_size=2,", "--batch_size: invalid"),
        ("--topology=v5e", "v5e:2x2.*Received: v5e"),
    ],
)
def test_tpu_compile_with_a_wrong_flag_names_it(
    argument, message, monkeypatch, capsys
):
    monkeypatch.setattr(sys, "argv", ["tpu_compile", argument])
    with pytest.raises(SystemExit) as error:
        tpu_compile.main()
    assert error.value.code == 2
    assert re.search(message, capsys.readouterr().err)


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
