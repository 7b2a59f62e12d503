"""Training programs in processes of their own, to be stopped and killed."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import tensorflow as tf

ROOT = pathlib.Path(__file__).resolve().parents[2]

# Programs share the machine with others, and importing TensorFlow alone takes
# seconds of a processor.
PATIENCE = 240.0

_LIMITED = """
import os, resource, sys
size = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


class Program:
    """A Python module that runs as a program, with its output in a file.

    Args:
        module: The module, as for `python -m`.
        *arguments: Its arguments.
        log: Where its output goes; further programs append to it.
        environment: Variables to set.
        file_size: The size in bytes that no file it writes may exceed, which
            to a program looks like a disk that is full.
    """

    def __init__(
        self, module, *arguments, log, environment=None, file_size=None
    ):
        self.log = pathlib.Path(log)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        inherited = {k: v for k, v in os.environ.items() if k != "TF_CONFIG"}
        # The limit is set by the program itself, as Popen's `preexec_fn` is
        # not safe in a process with threads.
        limited = [] if file_size is None else ["-c", _LIMITED, file_size]
        command = [sys.executable, *limited, "-m", module, *arguments]
        with self.log.open("ab") as output:
            self._begin = output.tell()
            self.process = subprocess.Popen(
                [str(part) for part in command],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={
                    **inherited,
                    "CUDA_VISIBLE_DEVICES": "-1",
                    "KERAS_BACKEND": "tensorflow",
                    "PYTHONUNBUFFERED": "1",
                    **(environment or {}),
                },
            )

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.kill()

    @property
    def output(self):
        """What it has written."""
        with self.log.open("rb") as file:
            file.seek(self._begin)
            return file.read().decode()

    @property
    def running(self):
        return self.process.poll() is None

    def kill(self):
        """Ends it as a power cut would."""
        self.process.kill()
        self.process.wait()

    def stop(self, signum=signal.SIGTERM):
        """Asks it to end."""
        self.process.send_signal(signum)

    def wait(self, timeout=PATIENCE):
        """Returns its exit code."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(
                f"Still running after {timeout:g} s:\n{self.output}"
            ) from None

    def wait_until(self, condition, timeout=PATIENCE, poll=0.01):
        """Waits until a condition is met while it runs."""
        deadline = time.monotonic() + timeout
        while not condition():
            if not self.running and not condition():
                raise AssertionError(
                    f"It ended with {self.process.returncode}:\n{self.output}"
                )
            if time.monotonic() > deadline:
                raise AssertionError(
                    f"Nothing for {timeout:g} s:\n{self.output}"
                )
            time.sleep(poll)


def succeed(module, *arguments, **options):
    """Runs a program to its end and returns what it wrote."""
    with Program(module, *arguments, **options) as program:
        code = program.wait()
        assert code == 0, program.output
        return program.output


_EACH = """
import contextlib, importlib, io, json, sys
from absl import app, flags
from absl.testing import flagsaver
from tests.support.toy_experiment import SerialLauncher
module = importlib.import_module(sys.argv[1])
module.LocalLauncher = SerialLauncher
ended = []
for arguments in json.load(sys.stdin):
    output = io.StringIO()
    with (
        flagsaver.flagsaver(),
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(output),
    ):
        flags.FLAGS.unparse_flags()
        try:
            app.run(
                module.main,
                argv=[module.__name__, *arguments],
                flags_parser=module._CONFIG.parse_flags,
            )
        except SystemExit as end:
            code = end.code or 0
            if isinstance(code, str):
                # As the interpreter does when it ends.
                print(code)
                code = 1
    ended.append((code, output.getvalue()))
print(json.dumps(ended))
"""


def run_each(module, command_lines):
    """Runs a module's `main` with each of some command lines, in one process.

    Where it uses a `LocalLauncher`, runs are trained in that process.

    Args:
        module: A module in `models`.
        command_lines: For each run the arguments.

    Returns:
        For each run the exit code and the output.
    """
    result = subprocess.run(
        [sys.executable, "-c", _EACH, module],
        cwd=ROOT,
        input=json.dumps(command_lines),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env={**os.environ, "KERAS_BACKEND": "tensorflow"},
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def checkpoint_steps(workdir):
    """The steps of the checkpoints in a work directory, oldest first."""
    folder = pathlib.Path(workdir, "checkpoints")
    return sorted(
        int(path.name.removeprefix("step-")) for path in folder.glob("step-*")
    )


def checkpoint_path(workdir, step):
    return pathlib.Path(workdir, "checkpoints", f"step-{step:08d}")


def checkpoint_values(workdir, step):
    """The variables of a checkpoint by path, as TensorFlow alone reads them."""
    reader = tf.train.load_checkpoint(
        str(checkpoint_path(workdir, step) / "variables")
    )
    return {
        name.removeprefix("variables/")
        .removesuffix("/.ATTRIBUTES/VARIABLE_VALUE")
        # As TensorFlow writes a slash in a name.
        .replace(".S", "/"): reader.get_tensor(name)
        for name in reader.get_variable_to_shape_map()
        if name != "_CHECKPOINTABLE_OBJECT_GRAPH"
    }


def records(workdir, kind="train"):
    """The records of a training's JSON lines."""
    path = pathlib.Path(workdir, f"{kind}.jsonl")
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def differences(first, second):
    """What differs in any bit between two dictionaries of arrays."""
    assert first.keys() == second.keys()
    return [
        name
        for name in first
        if first[name].dtype != second[name].dtype
        or first[name].shape != second[name].shape
        or first[name].tobytes() != second[name].tobytes()
    ]


def cluster(workers):
    """TF_CONFIG for each worker of a job on this machine."""
    sockets = [socket.socket() for _ in range(workers)]
    for each in sockets:
        each.bind(("localhost", 0))
    addresses = [f"localhost:{each.getsockname()[1]}" for each in sockets]
    for each in sockets:
        each.close()
    return [
        json.dumps(
            {
                "cluster": {"worker": addresses},
                "task": {"type": "worker", "index": index},
            }
        )
        for index in range(workers)
    ]
