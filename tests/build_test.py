"""Checks that BUILD names every source file, and as `deps` what it imports."""

import ast
import graphlib
import pathlib
import re
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
FOLDERS = ("sos", "models", "configs", "benchmarks", "tests")
# Distributions that are not named like the module that they provide.
DISTRIBUTIONS = {
    "absl": "absl_py",
    "PIL": "pillow",
    "skimage": "scikit_image",
    "sklearn": "scikit_learn",
}


def _glob(patterns, exclude=()):
    paths = [path for pattern in patterns for path in ROOT.glob(pattern)]
    names = {path.relative_to(ROOT).as_posix() for path in paths}
    return sorted(names - set(exclude))


def _targets():
    """Returns the attributes of BUILD's targets, by name."""
    found = {}

    def rule(kind):
        def add(name, **attributes):
            assert name not in found, f"Two targets are named {name!r}."
            found[name] = {"rule": kind, **attributes}

        return add

    scope = {"glob": _glob}
    for name in ("exports_files", "filegroup", "load", "package"):
        scope[name] = lambda *args, **kwargs: None
    for kind in ("py_library", "py_binary", "py_test"):
        scope[kind] = rule(kind)
    # Of the language of BUILD files, this one uses what is also Python.
    exec((ROOT / "BUILD").read_text("utf-8"), scope)
    return found


TARGETS = _targets()
# The targets that hold each source file.
HOLDERS = {
    path: [name for name, t in TARGETS.items() if path in t.get("srcs", ())]
    for path in _glob(f"{folder}/**/*.py" for folder in FOLDERS)
}
# The label of the target that holds each module.
LABELS = {
    re.sub(r"(/__init__)?\.py$", "", path).replace("/", "."): f":{names[0]}"
    for path, names in HOLDERS.items()
    if names
}


def _imported(path):
    """Yields the labels of what a source file imports."""
    for node in ast.walk(ast.parse((ROOT / path).read_text("utf-8"))):
        if isinstance(node, ast.Import):
            imports = [(alias.name,) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            # `from package import module` imports the module.
            imports = [
                (f"{node.module}.{alias.name}", node.module)
                for alias in node.names
            ]
        else:
            continue
        for names in imports:
            top = names[0].partition(".")[0]
            if top in FOLDERS:
                found = (LABELS[name] for name in names if name in LABELS)
                yield next(found, f"no target of {names[-1]}")
            elif top not in sys.stdlib_module_names:
                yield f"@pypi//{DISTRIBUTIONS.get(top, top)}"


def _declared():
    """Returns the labels of the distributions in each list of setup.py."""
    return {
        node.targets[0].id: {
            "@pypi//" + re.match(r"[\w-]+", line).group().replace("-", "_")
            for line in ast.literal_eval(node.value)
        }
        for node in ast.parse((ROOT / "setup.py").read_text("utf-8")).body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.List)
    }


def test_every_source_file_is_in_one_target():
    assert {p: names for p, names in HOLDERS.items() if len(names) != 1} == {}


@pytest.mark.parametrize("name", TARGETS)
def test_deps_are_what_the_sources_import(name):
    target = TARGETS[name]
    if target["rule"] == "py_binary":
        assert LABELS[target["main_module"]] in target["deps"]
        return
    expected = set()
    if target["rule"] == "py_test":  # With pytest and tests/conftest.py.
        expected = {"@pypi//pytest", ":tests/support"}
    for path in target["srcs"]:
        expected.update(_imported(path))
    deps = sorted(expected - {f":{name}"})
    assert target["deps"] == deps, f"deps of {name!r} in BUILD must be {deps}"


@pytest.mark.parametrize("name", TARGETS)
def test_third_party_deps_are_declared_in_setup(name):
    declared = _declared()
    allowed = declared["INSTALL_REQUIRES"]
    if name not in ("sos", "sos/datasets", "sos/training"):
        allowed |= declared["STUDY_REQUIRES"]
    if name == "benchmarks" or name.startswith("tests/"):
        allowed |= declared["TFDS_REQUIRES"] | declared["IMAGENET_REQUIRES"]
    if name == "models" or name.startswith("tests/"):
        allowed |= declared["TRANSLATION_REQUIRES"]
    if name.startswith("tests/"):
        allowed |= declared["TEST_REQUIRES"]
    assert {d for d in TARGETS[name]["deps"] if d[0] == "@"} <= allowed


def test_deps_have_no_cycle():
    graph = {f":{name}": target["deps"] for name, target in TARGETS.items()}
    graphlib.TopologicalSorter(graph).prepare()  # Raises CycleError.
