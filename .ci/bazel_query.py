"""Reads BUILD with Bazel and prints what its targets depend on.

`bazel query` needs no network: the rules and the third-party packages are
replaced by stubs in a temporary workspace, which only have the names and
attributes that BUILD may use. Unknown attributes, missing targets and packages
that requirements.txt does not pin are errors.
"""

import argparse
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
# No test rules: Bazel's own dependencies of these would be downloaded.
_RULES = """\
def _impl(ctx):
    pass

py_library = rule(_impl, attrs = {
    "data": attr.label_list(allow_files = True),
    "deps": attr.label_list(),
    "main_module": attr.string(),
    "srcs": attr.label_list(allow_files = [".py"]),
})

def py_binary(name, args = [], **kwargs):
    py_library(name = name, **kwargs)

def py_test(name, args = [], size = "medium", **kwargs):
    py_library(name = name, **kwargs)
"""
_PACKAGE = 'filegroup(name = "{name}", visibility = ["//visibility:public"])\n'


def _write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "utf-8")


def _make_stubs(folder):
    """Writes the repositories of rules and packages; returns their paths."""
    rules, packages = folder / "rules_python", folder / "pypi"
    _write(rules / "WORKSPACE", "")
    _write(rules / "python" / "BUILD", "")
    _write(rules / "python" / "defs.bzl", _RULES)
    _write(packages / "WORKSPACE", "")
    pinned = re.findall(
        r"^([\w.-]+)==", (ROOT / "requirements.txt").read_text("utf-8"), re.M
    )
    for name in {re.sub(r"[-_.]+", "_", name).lower() for name in pinned}:
        _write(packages / name / "BUILD", _PACKAGE.format(name=name))
    return rules, packages


def _make_workspace(folder):
    """Links what is checked in: Bazel would look into everything else too."""
    files = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True
    ).stdout.decode()
    for name in {name.partition("/")[0] for name in files.split("\0") if name}:
        (folder / name).symlink_to(ROOT / name)
    _write(folder / "WORKSPACE", "")


def main():
    """Runs the query; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "query", nargs="?", default="deps(//...)", help="(default: %(default)s)"
    )
    query = parser.parse_args().query
    if not shutil.which("bazel"):
        print(
            "bazel is not installed. On Debian: apt install bazel-bootstrap",
            file=sys.stderr,
        )
        return 1
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        rules, packages = _make_stubs(folder)
        workspace = folder / "workspace"
        workspace.mkdir()
        _make_workspace(workspace)
        return subprocess.run(
            [
                # No server stays behind, and no cache.
                *("bazel", "--batch", f"--output_user_root={folder / 'cache'}"),
                *("query", "--noimplicit_deps", "--noshow_progress"),
                "--incompatible_disallow_empty_glob",
                f"--override_repository=rules_python={rules}",
                f"--override_repository=pypi={packages}",
                query,
            ],
            cwd=workspace,
        ).returncode


if __name__ == "__main__":
    sys.exit(main())
