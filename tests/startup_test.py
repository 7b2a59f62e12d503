"""TensorFlow's start-up lines: hidden in programs, untouched elsewhere."""

import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import keras
import pytest

from sos import startup

ROOT = pathlib.Path(__file__).resolve().parents[1]
# As absl and TensorFlow write them.
START_UP_LINE = re.compile(
    r"WARNING: All log messages before|[IWE]\d{4} \d\d:\d\d|"
    r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d+: [IWE] |To enable the following"
)
# The module alone: importing the package would import TensorFlow.
LOAD = (
    "import importlib.util, os, sys\n"
    "spec = importlib.util.spec_from_file_location('startup', "
    f"{str(ROOT / 'sos' / 'startup.py')!r})\n"
    "startup = importlib.util.module_from_spec(spec)\n"
    "spec.loader.exec_module(startup)\n"
)
NATIVE = "    os.system('echo native >&2')\n"


def environment(log_level=None):
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in ("TF_CPP_MIN_LOG_LEVEL", "CUDA_VISIBLE_DEVICES")
    }
    if log_level is not None:
        inherited["TF_CPP_MIN_LOG_LEVEL"] = log_level
    return inherited


def run(*arguments, log_level=None, cwd=ROOT):
    return subprocess.run(
        [sys.executable, *(str(argument) for argument in arguments)],
        cwd=cwd,
        env=environment(log_level),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )


def run_quiet(body, log_level="2"):
    """Runs code that is indented, in the scope of `quiet`."""
    return run(
        "-c", f"{LOAD}with startup.quiet():\n{body}", log_level=log_level
    )


# The scope.


@pytest.mark.parametrize("log_level", ["1", "2", "3"])
def test_quiet_hides_what_native_code_writes(log_level):
    done = run_quiet(
        f"{NATIVE}print('after', file=sys.stderr)\n", log_level=log_level
    )
    assert (done.returncode, done.stderr) == (0, "after\n")


@pytest.mark.parametrize("log_level", [None, "0", "", "all"])
def test_quiet_without_a_log_level_changes_nothing(log_level):
    done = run_quiet(NATIVE, log_level=log_level)
    assert (done.returncode, done.stderr) == (0, "native\n")


def test_quiet_left_with_an_error_writes_what_was_hidden():
    done = run_quiet(
        f"{NATIVE}    print('python', file=sys.stderr)\n"
        "    raise ImportError('no TensorFlow')\n"
    )
    assert done.returncode == 1
    assert done.stderr.startswith("native\npython\nTraceback")
    assert done.stderr.endswith("ImportError: no TensorFlow\n")


def test_quiet_keeps_what_was_written_before():
    program = f"{LOAD}sys.stderr = open(2, 'w', buffering=99, closefd=False)\n"
    done = run(
        "-c",
        f"{program}sys.stderr.write('before ')\n"
        f"with startup.quiet():\n{NATIVE}sys.stderr.write('after')\n",
        log_level="2",
    )
    assert done.stderr == "before after"


@pytest.mark.parametrize("stderr", ["sys.stderr", "None"])
def test_quiet_without_a_standard_error_does_nothing(stderr):
    done = run(
        "-c",
        f"{LOAD}os.close(2)\nsys.stderr = {stderr}\nwith startup.quiet():\n"
        "    os.system('echo native >&2')\n    print('in')\nprint('out')\n",
        log_level="2",
    )
    assert (done.returncode, done.stdout) == (0, "in\nout\n")


@pytest.mark.skipif(os.name == "nt", reason="POSIX limits")
def test_quiet_on_a_full_disk_does_nothing():
    done = run(
        "-c",
        f"{LOAD}import resource\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))\n"
        f"with startup.quiet():\n{NATIVE}",
        log_level="2",
    )
    assert (done.returncode, done.stderr) == (0, "native\n")


INTERRUPTED = (
    "    os.kill(os.getpid(), __import__('signal').SIGINT)\n"
    "    __import__('time').sleep(60)\n"
)
# As in a module that makes named tuples.
INTERRUPTED_EXEC = f"    exec({INTERRUPTED.replace('    ', '')!r})\n"


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize("interrupted", [INTERRUPTED, INTERRUPTED_EXEC])
def test_quiet_interrupted_ends_a_program_with_one_line(interrupted, tmp_path):
    program = f"{LOAD}with startup.quiet():\n{NATIVE}{interrupted}"
    (tmp_path / "program.py").write_text(program)
    done = run("-m", "program", log_level="2", cwd=tmp_path)
    assert done.returncode == 130
    assert done.stderr == "\nInterrupted while TensorFlow was starting.\n"


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_quiet_interrupted_in_an_interactive_session_raises():
    body = "".join(f"    {line}\n" for line in INTERRUPTED.splitlines())
    done = run(
        "-c",
        f"{LOAD}sys.ps1 = '>>> '\n"
        f"try:\n    with startup.quiet():\n{body}"
        "except KeyboardInterrupt:\n    print('raised')\n",
        log_level="2",
    )
    assert (done.stdout, done.stderr) == ("raised\n", "")


@pytest.mark.parametrize(
    ("orig_argv", "argv", "expected"),
    [
        (["python", "-m", "sos", "report", "x"], ["-m", "report", "x"], "2"),
        (["python", "-msos", "x"], ["-m", "x"], "2"),
        (["python", "-m", "sos.training.main"], ["-m"], "2"),
        (["python", "/usr/bin/sos", "x"], ["/usr/bin/sos", "x"], "2"),
        (["python", "-m", "sosage", "x"], ["-m", "x"], None),
        (["python", "-m", "theirs", "sos"], ["-m", "sos"], None),
        (["python", "sos.py"], ["sos.py"], None),
        (["python"], [""], None),
    ],
)
def test_import_by_commands_of_the_package_sets_the_log_level(
    orig_argv, argv, expected
):
    program = LOAD.replace("'startup', ", "'sos.startup', ", 1)
    done = run(
        "-c",
        f"import sys\nsys.orig_argv, sys.argv = {orig_argv}, {argv}\n{program}"
        "print(os.environ.get('TF_CPP_MIN_LOG_LEVEL'))\n",
    )
    assert done.stdout == f"{expected}\n", done.stderr


# Programs.


def programs():
    """The modules that are run with `python -m`, wherever they are."""
    for folder in ("sos", "models", "benchmarks", "tests/support"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if '\nif __name__ == "__main__":' in path.read_text("utf-8"):
                name = path.relative_to(ROOT).with_suffix("").as_posix()
                # They do not import TensorFlow themselves.
                if not name.endswith("_worker") and name != (
                    "tests/support/examples"
                ):
                    yield name.replace("/", ".")


def test_programs_in_the_folders_are_found():
    found = set(programs())
    assert {"sos.__main__", "models.train"} <= found
    assert {"benchmarks.mask_update", "tests.support.soak"} <= found


# One that hides them itself, and one whose package does: each takes seconds.
STARTED = ["models.train", "benchmarks.mask_update"]


def test_programs_all_hide_the_lines_of_tensorflow():
    """By `quiet`, in the module or, for benchmarks, in their package."""
    assert set(STARTED) <= set(programs())
    for program in programs():
        path = ROOT / f"{program.replace('.', '/')}.py"
        if program.startswith("benchmarks."):
            path = path.with_name("__init__.py")
        if not program.startswith("sos."):
            text = path.read_text("utf-8")
            before = text.partition("import tensorflow as tf")[0]
            assert re.search(r"^with .*startup\.quiet\(\):$", before, re.M), (
                path
            )


@pytest.mark.slow
@pytest.mark.parametrize("program", STARTED)
def test_program_started_writes_no_lines_of_tensorflow(program):
    done = run("-m", program, "--help")
    # Those that use absl exit with 1.
    assert done.returncode in (0, 1), done.stderr
    assert "--" in done.stdout
    assert done.stderr == ""


def test_report_command_writes_no_lines_of_tensorflow(tmp_path):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    model.save(tmp_path / "model.keras")
    done = run("-m", "sos", "report", tmp_path / "model.keras")
    assert done.returncode == 0, done.stderr
    assert done.stdout
    assert done.stderr == ""


@pytest.mark.slow
def test_import_in_a_script_changes_nothing_that_tensorflow_prints():
    lines = {}
    for module in ("sos", "tensorflow"):
        done = run("-c", f"import {module}")
        assert done.returncode == 0, done.stderr
        lines[module] = len(START_UP_LINE.findall(done.stderr))
    # There is something to hide.
    assert lines["sos"] == lines["tensorflow"] > 0
    assert run("-c", "import sos", log_level="2").stderr == ""


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_command_interrupted_while_it_imports_ends_with_one_line():
    with subprocess.Popen(
        [sys.executable, "-m", "sos", "report", "nowhere"],
        cwd=ROOT,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        # Python itself is up, and TensorFlow is not.
        time.sleep(0.7)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stderr == "\nInterrupted while TensorFlow was starting.\n"


# The backend.


def import_under(home=None, setup="", **variables):
    """The last line that an import of `sos` prints, and its exit status."""
    inherited = environment()
    inherited.pop("KERAS_BACKEND", None)
    inherited.pop("KERAS_HOME", None)
    if home is not None:
        inherited["KERAS_HOME"] = str(home)
    done = subprocess.run(
        [sys.executable, "-c", f"{setup}\nimport sos"],
        cwd=ROOT,
        env={**inherited, **variables},
        capture_output=True,
        text=True,
    )
    return done.returncode, (done.stderr.splitlines() or [""])[-1]


@pytest.mark.parametrize("backend", ["jax", "torch", "openvino", "nothing"])
def test_import_under_another_backend_raises_before_keras_does(backend):
    code, line = import_under(KERAS_BACKEND=backend)
    assert code == 1
    assert line.startswith("sos.errors.BackendError: ")
    assert f"Received: backend='{backend}'" in line
    assert "KERAS_BACKEND=tensorflow" in line


def test_import_under_a_keras_json_of_another_backend_raises(tmp_path):
    path = tmp_path / "keras.json"
    path.write_text('{"backend": "torch", "floatx": "float32"}')
    code, line = import_under(tmp_path)
    assert code == 1
    assert f"Received: backend='torch', from {path}" in line


@pytest.mark.slow
@pytest.mark.parametrize("text", [None, "{", '{"backend": "jax"}'])
def test_import_under_tensorflow_works_whatever_keras_json_holds(
    tmp_path, text
):
    variables = {}
    if text is not None:
        (tmp_path / "keras.json").write_text(text)
        if "jax" in text:
            variables["KERAS_BACKEND"] = "tensorflow"
    code, line = import_under(tmp_path, **variables)
    assert code == 0, line


def test_check_backend_asks_the_keras_that_is_imported(monkeypatch):
    startup.check_backend()
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    startup.check_backend()
    monkeypatch.setattr(keras.config, "backend", lambda: "torch")
    with pytest.raises(ImportError, match="backend='torch', from the Keras"):
        startup.check_backend()
