"""Runs the examples of Markdown files: every block marked as `python`.

    python tests/support/examples.py README.md docs/*.md

runs them in the current folder, which is how they are tried against an
installed package; pytest is not needed for that. Each block is a program of its
own, in a fresh namespace. Mark fragments, output and shell commands otherwise
(`text`, `console`).

A block that begins with `# slow` runs with `--slow` only. One that begins with
`# requires: models` needs the checkout, and with `# requires: study` what the
extra of that name installs: `--without=models,study` leaves them out.
"""

import argparse
import pathlib
import re
import sys
import time
import traceback
import types
from collections.abc import Iterable

_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_REQUIRES = re.compile(r"# requires: (\w+)")

#: The line at which a block begins, counted from 1, and its code.
Block = tuple[int, str]


def blocks(text: str) -> list[Block]:
    """Returns every python block of a text."""
    return [
        (text.count("\n", 0, match.start(1)) + 1, match.group(1))
        for match in _BLOCK.finditer(text)
    ]


def select(
    found: Iterable[Block], *, slow: bool = False, without: Iterable[str] = ()
) -> list[Block]:
    """Returns the blocks that are to run.

    Args:
        found: The blocks of a file.
        slow: Returns the slow blocks if true, the others if not.
        without: Names of requirements that are not met.
    """
    selected = []
    for line, code in found:
        requires = _REQUIRES.match(code)
        if requires and requires.group(1) in without:
            continue
        if code.startswith("# slow\n") == slow:
            selected.append((line, code))
    return selected


def run(
    paths: Iterable[pathlib.Path],
    *,
    slow: bool = False,
    without: Iterable[str] = (),
) -> int:
    """Runs the blocks of files and prints how it went.

    Args:
        paths: The files.
        slow: As for `select`.
        without: As for `select`.

    Returns:
        The exit status: 0 if there are blocks and all of them work.
    """
    count = failures = 0
    for path in paths:
        found = blocks(path.read_text("utf-8"))
        for line, code in select(found, slow=slow, without=without):
            count += 1
            failures += not _run_block(path, line, code)
    if not count:
        print("There is no python block to run. There should be one.")
        return 1
    print(f"{count - failures} of {count} examples work.")
    return 1 if failures else 0


def _run_block(path: pathlib.Path, line: int, code: str) -> bool:
    print(f"{path.name}:{line}: running", flush=True)
    start = time.process_time()
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
        print(f"{path.name}:{line}: FAILED", flush=True)
        return False
    seconds = time.process_time() - start
    print(f"{path.name}:{line}: ok, {seconds:.1f} s of CPU time", flush=True)
    return True


def main() -> int:
    """Runs the files of the command line."""
    parser = argparse.ArgumentParser(
        description="Runs the python blocks of Markdown files."
    )
    parser.add_argument("paths", nargs="+", type=pathlib.Path)
    parser.add_argument("--slow", action="store_true")
    parser.add_argument("--without", default="")
    arguments = parser.parse_args()
    return run(
        [path.resolve() for path in arguments.paths],
        slow=arguments.slow,
        without=arguments.without.split(","),
    )


if __name__ == "__main__":
    sys.exit(main())
