import ast
import json
import os
import pathlib
import re
import subprocess
import sys

import keras
import pytest

from benchmarks import gpu_step
from tests.support import benchmarks
from tests.support.processes import PATIENCE


@pytest.fixture(autouse=True)
def dtype_policy():
    """Puts back what the benchmark sets."""
    yield
    keras.config.set_dtype_policy("float32")


def run_main(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["gpu_step", *map(str, arguments)])
    gpu_step.main()


def write_results(folder, results, action="run"):
    """Writes a folder as `--export` and the worker do."""
    rows = {
        "dense_8": ("results", "dense, 8", "dense_8", None),
        "L0_8": ("results", "L0, 8", "dense_8", None),
        "masks_copy": ("mask_update", "copy", "masks_copy", None),
        "masks_sos": ("mask_update", "sos", "masks_copy", None),
        "tiny": ("results", "tiny", "tiny", "float64"),
    }
    keys = ("table", "label", "base", "policy")
    plan = {
        "action": action,
        "model": "resnet50",
        "size": 224,
        "gpu": "h100",
        "compiler": "jax",
        "rounds": max(
            len((r or {}).get("rounds_ms", [])) for r in results.values()
        ),
        "names": list(results),
        "rows": {
            name: dict(zip(keys, rows[name], strict=True)) for name in results
        },
    }
    measured = {name: result for name, result in results.items() if result}
    (folder / "plan.json").write_text(json.dumps(plan))
    (folder / "results.json").write_text(json.dumps(measured))


def measured(rounds, gib, **others):
    return {
        "rounds_ms": rounds,
        "total": gib * 2**30,
        "bytes": 3e9,
        "flops": 5e9,
        "kernels": 7,
        "compile_s": 1.23,
        **others,
    }


def test_results_compares_medians_of_ratios_within_rounds(tmp_path):
    write_results(
        tmp_path,
        {
            "dense_8": measured([10.0, 20.0, 10.0], 2, device="H100"),
            "L0_8": measured([11.0, 24.0, 14.0], 3),
        },
    )
    report = benchmarks.run("gpu_step", f"--results={tmp_path}")
    assert report["device"] == "H100"
    assert report["results"]["L0, 8"] == {
        "milliseconds": 14,
        "times_base": 1.2,
        "memory_gib": 3,
        "memory_times_base": 1.5,
        "gigabytes": 3,
        "kernels": 7,
        "compile_s": 1.2,
    }


def test_results_cut_off_prints_what_was_reached(tmp_path, monkeypatch, capsys):
    compiled = measured([], 2)
    del compiled["rounds_ms"]
    write_results(tmp_path, {"dense_8": compiled, "L0_8": None})
    with pytest.raises(SystemExit) as error:
        run_main(monkeypatch, f"--results={tmp_path}")
    assert error.value.code == 1
    output = capsys.readouterr()
    assert "dense, 8" in output.out
    assert "L0, 8: was not reached" in output.err


def test_results_cut_off_between_rounds_says_so(tmp_path, monkeypatch, capsys):
    write_results(
        tmp_path,
        {"dense_8": measured([1.0, 1.0], 2), "L0_8": measured([2.0], 2)},
    )
    with pytest.raises(SystemExit) as error:
        run_main(monkeypatch, f"--results={tmp_path}")
    assert error.value.code == 1
    output = capsys.readouterr()
    assert "L0, 8: was cut off after 1 of 2 rounds" in output.err
    assert "dense, 8: " not in output.err


def test_results_out_of_memory_is_no_error(tmp_path):
    write_results(
        tmp_path,
        {
            "dense_8": {"error": "RESOURCE_EXHAUSTED: too big"},
            "L0_8": measured([1.0], 1),
        },
    )
    report = benchmarks.run("gpu_step", f"--results={tmp_path}")
    assert report["out_of_memory"] == {
        "dense, 8": "RESOURCE_EXHAUSTED: too big"
    }
    assert report["results"]["L0, 8"]["times_base"] is None
    assert report["results"]["L0, 8"]["memory_times_base"] is None


def test_results_with_other_masks_than_the_host_fails(
    tmp_path, monkeypatch, capsys
):
    write_results(
        tmp_path,
        {
            "masks_copy": measured([1.0], 1),
            "masks_sos": measured([2.0], 1, equal=False),
        },
    )
    with pytest.raises(SystemExit):
        run_main(monkeypatch, f"--results={tmp_path}")
    assert "sos: differs from the masks of the host" in capsys.readouterr().err


def test_check_beyond_the_bound_fails(tmp_path, monkeypatch, capsys):
    result = {"largest": 2e-11, "median": 1e-15}
    write_results(tmp_path, {"tiny": result}, action="check")
    with pytest.raises(SystemExit):
        run_main(monkeypatch, f"--results={tmp_path}")
    message = "tiny: the largest difference .* 2.0e-11, more than 1.0e-11"
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--technique=L1"], "VariationalDropout.*Received: 'L1'"),
        (["--batch_size=8,0"], "--batch_size must be at least 1. Received: 0"),
        (["--size=31"], "--size must be at least 32. Received: 31"),
        (["--check", "--mask_update"], "without it"),
        (["--check", "--compile_only"], "not allowed with"),
        (["--gpu=b200"], "h100"),
        (["--export=/"], "new folder"),
    ],
)
def test_gpu_step_with_a_wrong_flag_names_it(
    arguments, message, monkeypatch, capsys
):
    with pytest.raises(SystemExit) as error:
        run_main(monkeypatch, *arguments)
    assert error.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_results_of_an_empty_folder_says_what_is_missing(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="plan.json is missing.*--export"):
        run_main(monkeypatch, f"--results={tmp_path}")


def test_export_writes_all_that_another_machine_needs(tmp_path, monkeypatch):
    folder = tmp_path / "modules"
    run_main(
        monkeypatch,
        "--model=convnet",
        "--technique=dense,MagnitudePruning",
        "--batch_size=2",
        "--mask_update",
        f"--export={folder}",
    )
    plan = json.loads((folder / "plan.json").read_text())
    assert plan["action"] == "run"
    assert plan["names"] == [
        "dense_2",
        "MagnitudePruning_2",
        "masks_copy",
        "masks_sort",
        "masks_sos",
    ]
    for name in plan["names"]:
        assert (folder / f"{name}.mlirbc").stat().st_size > 1000
    arguments = json.loads((folder / "MagnitudePruning_2.json").read_text())[
        "arguments"
    ]
    assert arguments[0]["shape"] == [2, 28, 28, 1]
    densities = [a["parameters"] for a in arguments if a["kind"] == "mask"]
    assert len(densities) == 5
    for (density,) in densities:
        assert density == pytest.approx(0.1, abs=0.01)
    metadata = json.loads((folder / "masks_sos.json").read_text())
    assert metadata["digest_results"] == 5
    # Weights, masks and counts.
    assert len(metadata["arguments"]) == 5 + 5 + 1


@pytest.mark.parametrize("name", gpu_step.PROGRAMS)
def test_programs_of_the_export_import_nothing_of_the_project(name):
    path = pathlib.Path(gpu_step.__file__).with_name(name)
    imported = {
        module.partition(".")[0]
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for module in (
            [node.module]
            if isinstance(node, ast.ImportFrom)
            else [alias.name for alias in node.names]
        )
    }
    assert imported <= {"numpy", *sys.stdlib_module_names}


@pytest.fixture(scope="module")
def jax_environment(tmp_path_factory):
    """The benchmark's environment, or a twentieth of it: JAX for CPUs."""
    if (gpu_step.ENVIRONMENT / ".ready").is_file():
        return gpu_step.ENVIRONMENT
    folder = tmp_path_factory.mktemp("jax")
    gpu_step.make_environment(folder, "jax==0.10.2", "100 MB")
    (folder / ".ready").write_text(gpu_step.REQUIREMENT, "utf-8")
    return folder


@pytest.mark.slow
def test_check_of_a_technique_agrees_with_tensorflow(jax_environment):
    report = benchmarks.run(
        "gpu_step",
        # It has a product, a look-up and a composite layer.
        "--model=attention",
        "--check",
        "--technique=VariationalDropout",
        f"--venv={jax_environment}",
    )
    assert report["errors"] == {}
    assert len(report["results"]) == 3
    exact, *_ = report["results"].values()
    assert exact["largest"] < 1e-11


@pytest.mark.slow
def test_exported_folder_measures_itself(
    tmp_path, monkeypatch, jax_environment
):
    folder = tmp_path / "modules"
    run_main(
        monkeypatch,
        "--model=convnet",
        "--technique=dense",
        "--batch_size=2",
        "--mask_update",
        f"--export={folder}",
    )
    done = subprocess.run(
        [
            jax_environment / "bin" / "python",
            folder / gpu_step.WORKER.name,
            folder,
        ],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr
    report = benchmarks.run("gpu_step", f"--results={folder}")
    assert report["errors"] == {}
    assert report["results"]["dense, 2"]["times_base"] == 1
    assert list(report["mask_update"]) == [
        "one read and write",
        "sorting each tensor",
        "sos",
    ]


@pytest.mark.slow
@pytest.mark.skipif(
    not (gpu_step.ENVIRONMENT / ".ready").is_file(),
    reason="the environment of benchmarks.gpu_step, 5.5 GB, is not installed",
)
def test_compile_only_needs_no_gpu():
    report = benchmarks.run(
        "gpu_step",
        "--model=convnet",
        "--technique=dense",
        "--batch_size=8",
        "--compile_only",
    )
    assert report["device"] == "h100"
    figures = report["results"]["dense, 8"]
    assert 0 < figures["memory_gib"] < 1
    assert figures["kernels"] > 10
