import os
import pathlib
import re
import sys

import pytest

from benchmarks import compilers
from benchmarks.compilers import OutOfMemory, make_environment, run_worker


@pytest.fixture
def worker(tmp_path):
    """Returns a function that runs lines of Python as a worker."""

    def run(*lines, arguments=()):
        path = tmp_path / "worker.py"
        path.write_text("\n".join(lines), "utf-8")
        return run_worker(pathlib.Path(sys.executable), path, *arguments)

    return run


def test_run_worker_returns_the_last_line_and_prints_the_others(worker, capsys):
    results = worker(
        "import json, sys",
        "print('half done')",
        "print(json.dumps(sys.argv[1:]))",
        "print(json.dumps({'arguments': sys.argv[1:]}))",
        arguments=["a b", 3],
    )
    assert results == {"arguments": ["a b", "3"]}
    assert capsys.readouterr().err == 'half done\n["a b", "3"]\n'


def test_run_worker_of_a_failure_raises_its_error(worker):
    with pytest.raises(RuntimeError, match="^no such device$") as error:
        worker("""print('{"error": "no such device"}')""")
    assert not isinstance(error.value, OutOfMemory)


def test_run_worker_out_of_memory_raises_an_error_of_its_own(worker):
    with pytest.raises(OutOfMemory, match="16.4G exceeds 15.8G"):
        worker(
            """print('{"error": "RESOURCE_EXHAUSTED: 16.4G exceeds 15.8G"}')"""
        )


def test_run_worker_that_aborts_raises_the_last_line_of_its_errors(worker):
    with pytest.raises(RuntimeError, match="exit code 3: compiler bug"):
        worker(
            "import os, sys",
            "print('compiling', flush=True)",
            "print('a warning', 'compiler bug', sep='\\n', file=sys.stderr)",
            "sys.stderr.flush()",
            "os._exit(3)",
        )


@pytest.mark.parametrize("chosen", ["all", "1", ""])
def test_clean_environment_shows_the_gpus_that_the_user_chose(
    chosen, monkeypatch
):
    monkeypatch.setenv("BENCHMARKS_GPUS", chosen)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "-1"
    variables = compilers.clean_environment()
    assert variables.get("CUDA_VISIBLE_DEVICES", "all") == chosen
    assert "PYTHONPATH" not in variables


def test_make_environment_in_a_folder_of_other_files_refuses(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    message = f"{re.escape(str(tmp_path))} is not empty.*--venv"
    with pytest.raises(SystemExit, match=message):
        make_environment(tmp_path, "nothing", "0 MB")
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_make_environment_that_is_ready_returns_its_python(tmp_path):
    (tmp_path / ".ready").write_text("nothing")
    python = make_environment(tmp_path, "nothing", "0 MB")
    assert python.is_relative_to(tmp_path)
