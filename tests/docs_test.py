"""Checks the documentation: examples, links, names, site and notebook."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

import sos
import sos.training
from tests.support import examples

ROOT = pathlib.Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
NOTEBOOK = DOCS / "prune_mobilenet.ipynb"

_FENCED = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\]\((?!https?://)([^)\s]*)\)")
_HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
# A tag that loads something, and an address on another host.
_LOADED = re.compile(
    r"<(?:script|img|iframe|source|link)\b[^>]*"
    r"(?:src|href)=[\"']?((?:https?:)?//[^\"'> ]+)|"
    r"(?:@import|url\()\s*[\"']?((?:https?:)?//[^\"') ]+)"
)


def _names(paths):
    return [str(path.relative_to(ROOT)) for path in paths]


def _run_examples(paths, folder, *flags):
    return subprocess.run(
        # -P: the folder of the program holds no modules for the examples.
        [sys.executable, "-P", examples.__file__, *flags, *paths],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _has_examples(path, slow):
    found = examples.blocks(path.read_text("utf-8"))
    return bool(examples.select(found, slow=slow))


# One process, as importing TensorFlow takes longer than most examples.
def test_examples_of_all_pages_but_the_readme_run(tmp_path):
    pages = [path for path in PAGES[1:] if _has_examples(path, slow=False)]
    result = _run_examples(pages, tmp_path)
    assert result.returncode == 0, result.stdout


@pytest.mark.slow
def test_examples_of_the_readme_run(tmp_path):
    result = _run_examples([README], tmp_path)
    assert result.returncode == 0, result.stdout


def test_blocks_of_markdown_have_their_lines():
    text = (
        "# A\n\n```python\na = 1\n```\n\n```console\n$ b\n```\n```python\n```\n"
    )
    assert examples.blocks(text) == [(4, "a = 1\n"), (11, "")]


def test_select_with_marked_blocks_returns_those_that_can_run():
    slow = (1, "# slow\na = 1\n")
    study = (5, "# requires: study\n")
    plain = (9, "a = 1\n")
    found = [slow, study, plain]
    assert examples.select(found) == [study, plain]
    assert examples.select(found, slow=True) == [slow]
    assert examples.select(found, without=["study"]) == [plain]


def test_run_with_two_blocks_separates_their_names(tmp_path):
    path = tmp_path / "A.md"
    path.write_text("```python\na = 1\n```\n\n```python\n\nprint(a)\n```\n")
    result = _run_examples([path], tmp_path)
    assert result.returncode == 1
    assert 'A.md", line 7' in result.stdout
    assert "NameError: name 'a' is not defined" in result.stdout
    assert "1 of 2 examples work." in result.stdout


def test_run_without_blocks_fails(tmp_path):
    path = tmp_path / "A.md"
    path.write_text("# Nothing to run\n\n```console\n$ ls\n```\n")
    result = _run_examples([path], tmp_path)
    assert result.returncode == 1
    assert "There is no python block" in result.stdout


def test_readme_has_at_most_900_words():
    assert len(README.read_text("utf-8").split()) <= 900


def test_first_example_of_readme_has_at_most_12_lines():
    _, code = examples.blocks(README.read_text("utf-8"))[0]
    assert len(code.splitlines()) <= 12
    assert "keras.applications" in code


def _anchors(path):
    """Returns the anchors of a page's headings, as GitHub and MkDocs do."""
    headings = _HEADING.findall(_FENCED.sub("", path.read_text("utf-8")))
    return {
        re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")
        for heading in headings
    }


@pytest.mark.parametrize("path", PAGES, ids=_names(PAGES))
def test_links_of_page_resolve(path):
    text = _FENCED.sub("", path.read_text("utf-8"))
    for link in _LINK.findall(text):
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        assert target.exists(), link
        if anchor:
            assert anchor in _anchors(target), link


@pytest.mark.parametrize("path", PAGES, ids=_names(PAGES))
def test_make_targets_of_page_exist(path):
    makefile = (ROOT / "Makefile").read_text("utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    code = r"(?:^|`)make ((?:[a-z]+(?:-[a-z]+)* ?)+)"
    for names in re.findall(code, path.read_text("utf-8"), re.MULTILINE):
        assert set(names.split()) <= targets


@pytest.mark.parametrize(
    "module", [sos, sos.extend, sos.training], ids=lambda each: each.__name__
)
def test_reference_has_all_public_names(module):
    pages = "\n".join(
        path.read_text("utf-8") for path in (DOCS / "api").glob("*.md")
    )
    missing = [
        name
        for name in module.__all__
        if not name.startswith("__")
        and not re.search(rf"::: sos(\.\w+)*\.{name}$", pages, re.MULTILINE)
        and not isinstance(getattr(module, name), type(sos))
        # They have their own page, or are those of tfmot.
        and not hasattr(sos.schedules, name)
        and not hasattr(sos.ramps, name)
    ]
    assert not missing


def test_architecture_names_every_module():
    page = (DOCS / "architecture.md").read_text("utf-8")
    modules = {path.stem for path in (ROOT / "sos").rglob("*.py")}
    named = set(re.findall(r"`(?:\w+/)?(\w+)`", page))
    assert modules - {"__init__"} <= named


@pytest.mark.slow
def test_site_is_complete_and_loads_nothing_from_other_hosts(tmp_path):
    pytest.importorskip("material")
    pytest.importorskip("mkdocstrings")
    result = subprocess.run(
        [
            *(sys.executable, "-m", "mkdocs", "build", "--strict"),
            *("--config-file", ROOT / "mkdocs.yml", "--site-dir", tmp_path),
        ],
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert result.returncode == 0, result.stdout
    for path in [*tmp_path.rglob("*.html"), *tmp_path.rglob("*.css")]:
        assert not _LOADED.search(path.read_text("utf-8")), path


@pytest.mark.slow
def test_notebook_runs(tmp_path):
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code), "Store the outputs."
    nbclient.NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
    ).execute()
