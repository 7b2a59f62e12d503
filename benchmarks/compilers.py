"""Compilers in virtual environments of their own, and programs that use them.

JAX brings compilers for TPUs and GPUs that TensorFlow's packages lack. Its
versions need other versions of packages than this project.
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import venv
from typing import Any

# Environments that are created by default.
FOLDER = pathlib.Path.home() / ".cache" / "sos"


class OutOfMemory(RuntimeError):
    """The device has too little memory, which is a result."""

    #: What the messages of such errors contain.
    code = "RESOURCE_EXHAUSTED"


def make_environment(
    folder: pathlib.Path, requirement: str, size: str
) -> pathlib.Path:
    """Creates a compiler's virtual environment, unless it exists.

    Args:
        folder: Directory of the environment.
        requirement: What pip installs there.
        size: Size of the download, for the message.

    Returns:
        Path of its Python.

    Raises:
        SystemExit: If it cannot be created.
    """
    folder = folder.expanduser().resolve()
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    ready = folder / ".ready"
    # Written last: an interrupted installation is repeated.
    if ready.is_file() and ready.read_text("utf-8") == requirement:
        return python
    if folder.exists() and not (folder / "pyvenv.cfg").is_file():
        if not folder.is_dir() or any(folder.iterdir()):
            raise SystemExit(
                f"{folder} is not empty and not a virtual environment. Choose "
                "another --venv."
            )
    print(
        f"Installing {requirement} into {folder}, once ({size} to download)",
        file=sys.stderr,
        flush=True,
    )
    pip = [python, "-m", "pip", "--disable-pip-version-check", "install"]
    try:
        venv.create(folder, with_pip=True, clear=True)
        subprocess.run(
            [*pip, "--quiet", "--no-input", requirement],
            check=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=clean_environment(),
        )
    except (OSError, subprocess.CalledProcessError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        output = getattr(error, "stderr", None) or str(error)
        lines = [line for line in output.splitlines() if "ERROR" in line]
        reason = (lines or output.splitlines() or ["unknown"])[-1].strip()
        raise SystemExit(
            f"The compiler's environment {folder} cannot be created: {reason}. "
            "It needs the network and a writable directory."
        ) from None
    ready.write_text(requirement, "utf-8")
    return python


def run_worker(
    python: pathlib.Path, worker: pathlib.Path, *arguments: Any
) -> dict[str, Any]:
    """Runs a program in a process of its own, because compilers may abort.

    Args:
        python: Path of Python in the compiler's environment.
        worker: The program. The last line that it prints must be a JSON object,
            its results or an "error". Earlier lines go to the standard error.
        *arguments: Its arguments.

    Returns:
        Its results.

    Raises:
        OutOfMemory: If what it compiles does not fit the device's memory.
        RuntimeError: If it fails otherwise.
    """
    command = [str(part) for part in (python, worker, *arguments)]
    last = ""
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8") as errors,
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=clean_environment(),
        ) as process,
    ):
        for line in process.stdout:
            if last:
                print(last, file=sys.stderr, flush=True)
            last = line.rstrip()
        code = process.wait()
        errors.seek(0)
        lines = errors.read().strip().splitlines() or ["no output"]
    try:
        results = json.loads(last)
    except ValueError:
        results = {"error": f"exit code {code}: {lines[-1]}"}
    if "error" in results:
        text = results["error"]
        raise (OutOfMemory if OutOfMemory.code in text else RuntimeError)(text)
    return results


def clean_environment() -> dict[str, str]:
    """Returns the environment variables without those of this environment.

    Unlike this process, others see the machine's GPUs: see `benchmarks`.
    """
    excluded = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "LD_LIBRARY_PATH")
    variables = {k: v for k, v in os.environ.items() if k not in excluded}
    del variables["CUDA_VISIBLE_DEVICES"]
    if visible_gpus() != "all":
        variables["CUDA_VISIBLE_DEVICES"] = visible_gpus()
    return variables


def visible_gpus() -> str:
    """Returns which GPUs other processes may use, "all" for all."""
    return os.environ["BENCHMARKS_GPUS"]
