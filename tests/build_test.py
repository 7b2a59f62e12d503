"""Keeps BUILD true: one target a module, and its deps are what it imports.

`python tests/build_test.py --write` brings BUILD up to date. It keeps what it
cannot know of each target: the comments above it and attributes other than
`srcs`, `main_module`, `args` and `deps`.
"""

import argparse
import ast
import difflib
import functools
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
FOLDERS = ("sos", "models", "configs", "benchmarks", "tests")
# Distributions that are not named like the module that they provide.
DISTRIBUTIONS = {"absl": "absl-py"}


def modules(root):
    """Returns the path of every module below `root`, by its dotted name."""
    found = {}
    for folder in FOLDERS:
        for path in sorted((root / folder).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            if parts[-1] == "__init__":
                parts = parts[:-1]
            found[".".join(parts)] = path
    return found


def declared(root, *names):
    """Returns the distributions in the named lists of `setup.py`."""
    found = set()
    for node in ast.parse((root / "setup.py").read_text("utf-8")).body:
        if isinstance(node, ast.Assign) and node.targets[0].id in names:
            requirements = ast.literal_eval(node.value)
            found |= {re.match(r"[\w.-]+", r).group() for r in requirements}
    return found


def imports(source, module, is_package, known):
    """Returns the modules that a source file needs.

    Args:
        source: The text of the file.
        module: Its dotted name, which relative imports start from.
        is_package: Whether the file is an `__init__.py`.
        known: Names of the modules of this repository.

    Returns:
        Dotted names from `known` and top-level names of everything else but
        the standard library. Imports below `if TYPE_CHECKING:` do not count,
        as they never run.
    """
    found = set()
    pending = [ast.parse(source)]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(
            node.test
        ):
            pending.extend(node.orelse)
            continue
        pending.extend(ast.iter_child_nodes(node))
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                parts = parts[: len(parts) - node.level + is_package]
                base = ".".join([*parts, base] if base else parts)
            for alias in node.names:
                name = f"{base}.{alias.name}"
                # `from package import module` needs the module only.
                found.add(name if name in known else base)
    needed = set()
    for name in found - {module}:
        top = name.partition(".")[0]
        if top in FOLDERS:
            needed.add(name)
        elif top not in sys.stdlib_module_names:
            needed.add(top)
    return needed - {"__future__", module}


def expected_targets(root):
    """Returns `(targets, problems)`: attributes by name, and complaints."""
    known = modules(root)
    names = {
        module: _target(path.relative_to(root))
        for module, path in known.items()
    }
    run = declared(root, "INSTALL_REQUIRES")
    test = run | declared(root, "TEST_REQUIRES")
    targets, problems = {}, []
    for module, path in known.items():
        relative = path.relative_to(root)
        source = path.read_text("utf-8")
        needed = imports(source, module, path.name == "__init__.py", known)
        target = {"rule": "py_library", "srcs": [str(relative)]}
        if path.name.endswith("_test.py"):
            # A file of pytest functions does nothing when it is run.
            target["rule"] = "py_test"
            target["main_module"] = "pytest"
            target["args"] = [str(relative)]
            needed.add("pytest")
            for folder in relative.parents:
                name = ".".join([*folder.parts, "conftest"])
                needed |= {name} & known.keys()
        elif '\nif __name__ == "__main__":' in source:
            target["rule"] = "py_binary"
        deps = set()
        for name in needed:
            if name.partition(".")[0] not in FOLDERS:
                name = DISTRIBUTIONS.get(name, name).replace("_", "-")
                if name not in (test if relative.parts[0] == "tests" else run):
                    problems.append(
                        f"{relative} imports {name}, which setup.py does not "
                        "declare. Add it there, or to DISTRIBUTIONS in "
                        "tests/build_test.py if it has another name."
                    )
                deps.add("@pypi//" + name.replace("-", "_"))
            elif name in names:
                deps.add(":" + names[name])
            else:
                problems.append(f"{relative} imports {name}: no such module.")
        target["deps"] = sorted(deps)
        targets[names[module]] = target
    return targets, problems


def _target(relative):
    """Returns the target's name: the path of the module or the package."""
    if relative.name == "__init__.py":
        return str(relative.parent)
    return str(relative.with_suffix(""))


class Build:
    """A parsed BUILD file.

    Attributes:
        header: The text before the first target.
        targets: Attributes of the targets by name, in order. Those that are
            not plain values are kept as `Verbatim` source text, and the lines
            of comments before the target are under "comment".
        problems: What is wrong with the file by itself.
    """

    def __init__(self, text):
        self.targets, self.problems = {}, []
        calls = [
            node.value
            for node in ast.parse(text).body
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
        ]
        calls = [call for call in calls if call.func.id.startswith("py_")]
        lines = text.splitlines(keepends=True)
        end = None
        for call in calls:
            start = call.lineno - 1
            while start and lines[start - 1].startswith("#"):
                start -= 1
            if end is None:
                self.header = "".join(lines[:start])
            attributes = {"rule": call.func.id}
            if comment := "".join(lines[start : call.lineno - 1]):
                attributes["comment"] = comment
            for keyword in call.keywords:
                try:
                    value = ast.literal_eval(keyword.value)
                except ValueError:
                    value = Verbatim(
                        ast.get_source_segment(text, keyword.value)
                    )
                attributes[keyword.arg] = value
            name = attributes.pop("name")
            if name in self.targets:
                self.problems.append(f"Two targets are named {name!r}.")
            self.targets[name] = attributes
            end = call.end_lineno
        if end is None:
            self.header = text.rstrip() + "\n\n" if text.strip() else ""


class Verbatim(str):
    """Source text of an attribute that is not a literal, such as a glob."""


def stanza(name, attributes):
    """Returns a target as buildifier would format it."""
    attributes = {"name": name, **attributes}
    rule = attributes.pop("rule")
    comment = attributes.pop("comment", "")
    deps = attributes.pop("deps", [])
    if deps:
        attributes["deps"] = deps
    lines = [f"{rule}("]
    for key, value in attributes.items():
        if isinstance(value, list) and len(value) > 1:
            lines.append(f"    {key} = [")
            lines.extend(f"        {_literal(item)}," for item in value)
            lines.append("    ],")
        else:
            lines.append(f"    {key} = {_literal(value)},")
    return comment + "\n".join([*lines, ")"]) + "\n"


def _literal(value):
    if isinstance(value, Verbatim):
        return value
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, list):
        return "[" + ", ".join(_literal(item) for item in value) + "]"
    return repr(value)


def merge(name, expected, existing):
    """Returns the expected target with the other attributes it has already."""
    ours = ("rule", "srcs", "main_module", "args", "deps")
    kept = {k: v for k, v in existing.get(name, {}).items() if k not in ours}
    return {**expected, **kept}


def cycle(targets):
    """Returns one circle of dependencies as names, or nothing."""
    done = set()

    def visit(name, path):
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done or name not in targets:
            return []
        for dep in targets[name]["deps"]:
            if found := visit(dep.removeprefix(":"), [*path, name]):
                return found
        done.add(name)
        return []

    for name in targets:
        if found := visit(name, []):
            return found
    return []


def generate(root, text):
    """Returns the text that BUILD should have, given the one it has."""
    build = Build(text)
    targets, _ = expected_targets(root)
    stanzas = [
        stanza(name, merge(name, target, build.targets))
        for name, target in targets.items()
    ]
    return build.header + "\n".join(stanzas)


@functools.cache
def _here():
    return Build((ROOT / "BUILD").read_text("utf-8")), *expected_targets(ROOT)


def test_build_has_a_target_for_every_module():
    build, expected, _ = _here()
    assert not build.problems
    holders = {}
    for name, target in build.targets.items():
        for source in target.get("srcs", []):
            holders.setdefault(source, []).append(name)
    wanted = {t["srcs"][0]: name for name, t in expected.items()}
    problems = [
        f"{source} is in no target. Add:\n{stanza(name, expected[name])}"
        for source, name in wanted.items()
        if source not in holders
    ]
    problems += [
        f"{source} is in {', '.join(names)}: keep one of them."
        for source, names in holders.items()
        if len(names) > 1
    ]
    problems += [
        f"{', '.join(names)} has {source}, which does not exist."
        for source, names in holders.items()
        if not (ROOT / source).is_file()
    ]
    assert not problems, _complain(problems)


def test_deps_are_what_the_sources_import():
    build, expected, _ = _here()
    problems = []
    for name in sorted(expected.keys() & build.targets.keys()):
        existing = stanza(name, build.targets[name])
        wanted = stanza(name, merge(name, expected[name], build.targets))
        if existing != wanted:
            diff = difflib.unified_diff(
                existing.splitlines(), wanted.splitlines(), "BUILD", name, n=9
            )
            problems.append("\n".join([*diff, "It should be:", wanted]))
    problems += [
        f"{name} in BUILD matches no module: remove it."
        for name in build.targets.keys() - expected.keys()
    ]
    assert not problems, _complain(problems)


def test_imports_are_declared_and_exist():
    problems = _here()[2]
    assert not problems, _complain(problems)


def test_dependencies_have_no_circle():
    found = cycle(_here()[1])
    assert not found, "Circular imports: " + " -> ".join(found)


def _complain(problems):
    problems.append("`python tests/build_test.py --write` updates BUILD.")
    return "\n\n".join(["", *problems])


KNOWN = {"sos", "sos.masks", "sos.wrappers", "sos.wrappers.base"}


def _imports(source, module="sos.schedules", is_package=False):
    return imports(source, module, is_package, KNOWN)


def test_reads_every_form_of_import():
    assert _imports("import sos") == {"sos"}
    assert _imports("import sos.masks as m, os.path") == {"sos.masks"}
    assert _imports("from sos import masks, strip") == {"sos.masks", "sos"}
    assert _imports("from sos.wrappers.base import A") == {"sos.wrappers.base"}
    assert _imports("import tensorflow.python.x") == {"tensorflow"}
    assert _imports("from absl import flags") == {"absl"}
    assert _imports("def f():\n    import keras") == {"keras"}
    assert _imports("from . import masks") == {"sos.masks"}
    assert _imports("from .masks import score") == {"sos.masks"}
    assert _imports("from .base import A", "sos.wrappers", True) == {
        "sos.wrappers.base"
    }
    assert _imports("from ..masks import A", "sos.wrappers.base") == {
        "sos.masks"
    }


def test_ignores_what_does_not_run_or_is_its_own():
    source = "if typing.TYPE_CHECKING:\n    import a\nelse:\n    import b"
    assert _imports(source) == {"b"}
    assert _imports("from __future__ import annotations\nimport sys") == set()
    assert _imports("from sos import __version__", "sos", True) == set()


def test_generating_keeps_what_was_written_by_hand(tmp_path):
    (tmp_path / "sos").mkdir()
    (tmp_path / "tests").mkdir()
    (tmp_path / "setup.py").write_text(
        "INSTALL_REQUIRES = ['keras>=3']\nTEST_REQUIRES = ['pytest']\n"
    )
    (tmp_path / "sos" / "__init__.py").write_text("from sos.a import f\n")
    (tmp_path / "sos" / "a.py").write_text("import keras\nimport flax\n")
    (tmp_path / "tests" / "a_test.py").write_text("import sos\n")
    before = """# Header.
load("@rules_python//python:defs.bzl", "py_library")

# About sos.
py_library(
    name = "sos",
    srcs = ["gone.py"],
    visibility = ["//visibility:public"],
    data = glob(["data/*"]),
)
"""
    after = """# Header.
load("@rules_python//python:defs.bzl", "py_library")

# About sos.
py_library(
    name = "sos",
    srcs = ["sos/__init__.py"],
    visibility = ["//visibility:public"],
    data = glob(["data/*"]),
    deps = [":sos/a"],
)

py_library(
    name = "sos/a",
    srcs = ["sos/a.py"],
    deps = [
        "@pypi//flax",
        "@pypi//keras",
    ],
)

py_test(
    name = "tests/a_test",
    srcs = ["tests/a_test.py"],
    main_module = "pytest",
    args = ["tests/a_test.py"],
    deps = [
        ":sos",
        "@pypi//pytest",
    ],
)
"""
    assert generate(tmp_path, before) == after
    assert generate(tmp_path, after) == after
    problems = expected_targets(tmp_path)[1]
    assert len(problems) == 1
    assert "sos/a.py imports flax, which setup.py does not" in problems[0]


def test_finds_a_circle():
    def target(*deps):
        return {"deps": list(deps)}

    targets = {"a": target(":b"), "b": target(":c", "@pypi//x"), "c": target()}
    assert cycle(targets) == []
    targets["c"] = target(":b")
    assert cycle(targets) == ["b", "c", "b"]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="update BUILD")
    build = ROOT / "BUILD"
    text = generate(ROOT, build.read_text("utf-8"))
    if parser.parse_args().write:
        build.write_text(text, "utf-8")
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
