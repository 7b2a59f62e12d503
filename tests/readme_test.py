"""Runs the README's examples: every block that is marked as `python`.

Each block has to be a program of its own. Mark fragments, output and shell
commands otherwise (`text`, `console`). As a program,
`python tests/readme_test.py README.md` runs the blocks in the current folder,
which is how the examples are tried against an installed package; pytest is
not needed for that.
"""

import os
import pathlib
import re
import subprocess
import sys
import time
import traceback
import types

ROOT = pathlib.Path(__file__).resolve().parent.parent

_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(text):
    """Returns `(line, code)` of every python block, lines counted from 1."""
    return [
        (text.count("\n", 0, match.start(1)) + 1, match.group(1))
        for match in _BLOCK.finditer(text)
    ]


def run(path):
    """Runs the blocks of a file, each in a fresh namespace.

    Returns:
        The exit status: 0 when there are blocks and all of them work.
    """
    found = blocks(path.read_text("utf-8"))
    if not found:
        print(f"{path.name} has no ```python block. There should be one.")
        return 1
    failures = 0
    for line, code in found:
        print(f"{path.name}:{line}: running", flush=True)
        start = time.monotonic()
        try:
            # The blank lines make tracebacks name the lines of the file.
            program = compile("\n" * (line - 1) + code, str(path), "exec")
            # Blocks share the process, as TensorFlow takes seconds to import.
            try:
                # Classes of the example are looked up there by name.
                sys.modules["__main__"] = types.ModuleType("__main__")
                exec(program, vars(sys.modules["__main__"]))
            except SystemExit as end:
                if end.code:
                    raise
        except (Exception, SystemExit):
            traceback.print_exc(file=sys.stdout)
            failures += 1
            print(f"{path.name}:{line}: FAILED", flush=True)
        else:
            seconds = time.monotonic() - start
            print(f"{path.name}:{line}: ok, {seconds:.1f} s", flush=True)
    print(f"{len(found) - failures} of {len(found)} examples work.")
    return 1 if failures else 0


def _run_in_process(path, folder):
    return subprocess.run(
        # -P: the folder of this file holds no modules for the examples.
        [sys.executable, "-P", str(pathlib.Path(__file__)), str(path)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_examples_of_the_readme_work(tmp_path):
    readme = ROOT / "README.md"
    assert readme.exists(), "README.md is missing."
    result = _run_in_process(readme, tmp_path)
    assert result.returncode == 0, result.stdout


def test_finds_blocks_and_their_lines():
    text = (
        "# A\n\n```python\na = 1\n```\n\n```console\n$ b\n```\n```python\n```\n"
    )
    assert blocks(text) == [(4, "a = 1\n"), (11, "")]


def test_blocks_do_not_see_each_other(tmp_path):
    path = tmp_path / "A.md"
    path.write_text("```python\na = 1\n```\n\n```python\n\nprint(a)\n```\n")
    result = _run_in_process(path, tmp_path)
    assert result.returncode == 1
    assert 'A.md", line 7' in result.stdout
    assert "NameError: name 'a' is not defined" in result.stdout
    assert "1 of 2 examples work." in result.stdout


def test_no_block_is_a_failure(tmp_path):
    path = tmp_path / "A.md"
    path.write_text("# Nothing to run\n\n```console\n$ ls\n```\n")
    result = _run_in_process(path, tmp_path)
    assert result.returncode == 1
    assert "A.md has no ```python block" in result.stdout


if __name__ == "__main__":
    sys.exit(run(pathlib.Path(sys.argv[1]).resolve()))
