"""Benchmarks as users run them."""

import json
import os
import subprocess
import sys

from tests.support.processes import PATIENCE, ROOT


def run(name, *arguments):
    """Runs a benchmark with `--json` and returns what it printed.

    Args:
        name: The module's name in `benchmarks`.
        *arguments: Its arguments, which should choose a tiny size.
    """
    result = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", *arguments, "--json"],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env={**os.environ, "KERAS_BACKEND": "tensorflow"},
    )
    assert result.returncode == 0, result.stderr
    # Raises if there is anything besides one object.
    report = json.loads(result.stdout)
    assert report["benchmark"] == name
    assert report["machine"]["cores"] >= 1
    return report
