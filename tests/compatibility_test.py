"""docs/compatibility.md is what its command writes.

`make compatibility` compares the whole page, which takes ten minutes; the tests
make some rows of it anew.
"""

import re
import zlib

import pytest

import sos
from tests.support import compatibility


def row_of(name):
    ((_, line),) = compatibility.rows(f"^{re.escape(name)}$")
    return line


# Layers that use a weight in an unusual way, and a model that shares a table.
AWKWARD = [
    "LSTM masked",
    "ReversibleEmbedding untied",
    "MultiHeadAttention",
    "direct read",
    "BertMaskedLM",
]


def sample(count):
    """Names of rows that are others whenever the page or the list changes."""
    names = [
        name
        for _, names, _ in compatibility.TABLES.values()
        for name in names
        if name not in ("Dense", *AWKWARD)
    ]
    text = compatibility.PAGE.read_bytes()
    return sorted(
        names, key=lambda x: zlib.crc32(x.encode(), zlib.crc32(text))
    )[:count]


@pytest.mark.parametrize(
    "name",
    [
        "Dense",
        *(pytest.param(x, marks=pytest.mark.slow) for x in AWKWARD + sample(3)),
    ],
)
def test_row_of_the_page_is_what_the_command_writes(name):
    assert row_of(name) in compatibility.PAGE.read_text("utf-8").splitlines(), (
        "`python -m tests.support.compatibility --write` updates the page."
    )


def test_page_around_its_rows_is_what_the_command_writes():
    page = compatibility.PAGE.read_text("utf-8")
    found = []
    for key, (_, names, head) in compatibility.TABLES.items():
        lines = page.partition("\n".join(head) + "\n")[2].splitlines()
        for name, line in zip(names, lines, strict=False):
            shown = compatibility.NAMES.get(name, name)
            assert line.startswith(f"| {shown} | ")
            found.append((key, line))
    assert compatibility.page(found) == page, (
        "`python -m tests.support.compatibility --write` updates the page."
    )


def test_page_names_no_failure():
    page = compatibility.PAGE.read_text("utf-8")
    assert "| no (" not in page
    assert "becomes a" not in page


def test_row_of_a_layer_with_other_outputs_after_strip_says_so(monkeypatch):
    strip = sos.strip

    def wrong(model):
        plain = strip(model)
        for variable in plain.trainable_variables:
            variable.assign(variable + 1)
        return plain

    monkeypatch.setattr(sos, "strip", wrong)
    failed = "no (strip: other outputs)"
    assert row_of("Dense").split(" | ")[1:4] == [failed] * 3


def test_row_of_a_layer_that_is_refused_says_where():
    cells = row_of("SpectralNormalization").split(" | ")
    assert cells[1:4] == ["yes", "refused (fit)", "refused (fit)"]


def test_short_names_are_as_long_as_they_differ():
    paths = ["a/dense_7/kernel", "a/dense_9/kernel"]
    assert compatibility.short(paths) == "`dense/kernel`, `dense_1/kernel`"
    assert compatibility.short(["a/b/kernel"]) == "`kernel`"
    assert compatibility.short(["a/b/embeddings"]) == "`b/embeddings`"
    assert compatibility.short(["b/embeddings"] * 2) == "`b/embeddings` (2)"
