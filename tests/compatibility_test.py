"""docs/compatibility.md is what its command writes."""

import pytest

import sos
from tests.support import compatibility


def row_of(name):
    ((_, line),) = compatibility.rows(f"^{name}$")
    return line


@pytest.mark.parametrize("name", ["Dense", "MultiHeadAttention"])
def test_row_of_a_layer_is_on_the_page(name):
    assert row_of(name) in compatibility.PAGE.read_text("utf-8").splitlines()


@pytest.mark.slow
def test_page_is_what_the_command_writes():
    text = compatibility.page(compatibility.rows())
    assert text == compatibility.PAGE.read_text("utf-8"), (
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
