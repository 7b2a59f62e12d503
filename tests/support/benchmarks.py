"""Benchmarks as users run them, or their main functions in this process."""

import contextlib
import importlib
import io
import json
import os
import subprocess
import sys
import unittest.mock

from tests.support.processes import PATIENCE, ROOT


def run(name, *arguments, process=False):
    """Runs a benchmark with `--json` and returns what it printed.

    Args:
        name: The module's name in `benchmarks`.
        *arguments: Its arguments, which should choose a tiny size.
        process: Whether it is to run as `python -m`, which takes seconds to
            import TensorFlow.
    """
    arguments = [*arguments, "--json"]
    output = (_start if process else _call)(f"benchmarks.{name}", arguments)
    # Raises if there is anything besides one object.
    report = json.loads(output)
    assert report["benchmark"] == name
    assert report["machine"]["cores"] >= 1
    return report


def _call(module, arguments):
    main = importlib.import_module(module).main
    output = io.StringIO()
    with (
        unittest.mock.patch.object(sys, "argv", [module, *arguments]),
        contextlib.redirect_stdout(output),
    ):
        main()
    return output.getvalue()


def _start(module, arguments):
    result = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env={**os.environ, "KERAS_BACKEND": "tensorflow"},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout
