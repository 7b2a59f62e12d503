"""The page of a study, as text; tests/browser_test.py opens it."""

import collections
import dataclasses
import html
import html.parser
import re

import pytest

from sos.errors import StorageError
from sos.experiments import conclusions, report, tables
from sos.experiments.figures import FIGURES, Study
from tests.support.results import in_bleu, make_report, make_study

VOID = {"meta", "link", "input", "br", "img"}
# Attributes with addresses that a browser loads by itself.
LOADED = ("src", "href", "xlink:href", "data", "srcset", "poster", "action")


class Page(html.parser.HTMLParser):
    """Collects what a page consists of, and checks that tags match."""

    def __init__(self, text):
        super().__init__()
        self.elements = []
        self.texts = collections.defaultdict(list)
        self._open = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attributes):
        element = (tag, dict(attributes))
        self.elements.append(element)
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open:
            self.texts[self._open[-1]].append(data)

    def all(self, tag):
        return [a for name, a in self.elements if name == tag]


@pytest.fixture(scope="module")
def runs():
    return make_study()


@pytest.fixture(scope="module")
def text(runs, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    make_report(path, runs)
    return path.read_text("utf-8")


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


def test_report_is_one_page_of_well_formed_html(text, page):
    assert text.startswith("<!DOCTYPE html>\n<html lang=")
    assert len(page.all("title")) == len(page.all("h1")) == 1
    assert page.all("meta")[0] == {"charset": "utf-8"}


def test_report_loads_nothing(text, page):
    for tag, attributes in page.elements:
        for name in LOADED:
            value = attributes.get(name, "#")
            is_link = tag == "a" and value.startswith("https://arxiv.org/")
            assert value.startswith(("#", "data:")) or is_link, (tag, value)
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    policy = page.all("meta")[1]["content"]
    assert policy.startswith("default-src 'none';")


def test_report_identifiers_are_unique_and_references_exist(page):
    names = [a["id"] for _, a in page.elements if "id" in a]
    assert len(names) == len(set(names))
    referenced = [
        name
        for _, attributes in page.elements
        for key in ("aria-labelledby", "aria-describedby", "for")
        for name in attributes.get(key, "").split()
    ]
    referenced += [a["href"][1:] for a in page.all("a") if a["href"][0] == "#"]
    assert referenced
    assert set(referenced) <= set(names)


def test_report_figures_and_tables_are_labelled(page):
    figures = page.all("figure")
    assert figures
    images = [a for _, a in page.elements if a.get("role") == "img"]
    assert len(images) == len(page.all("svg")) == len(figures)
    assert all(a["aria-labelledby"] and a["aria-describedby"] for a in images)
    assert len(page.all("caption")) == len(page.all("table"))
    assert all(a["scope"] in ("col", "row") for a in page.all("th"))
    levels = [
        int(tag[1]) for tag, _ in page.elements if tag in ("h1", "h2", "h3")
    ]
    assert all(b - a <= 1 for a, b in zip(levels, levels[1:], strict=False))


def test_report_numbers_equal_those_of_the_runs(text, runs):
    text = html.unescape(text)
    table = text[text.index('id="table-of-runs"') :]
    table = table[: table.index("</table>")]
    rows = re.findall(r"<tr data-label.*?</tr>", table, flags=re.S)
    assert len(rows) == len(runs)
    for row, run in zip(rows, runs, strict=True):
        cells = re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, flags=re.S)
        assert cells[0] == run.label
        assert cells[4] == f"{100 * run.result.metrics['accuracy']:.2f}"
        assert run.name in cells[-1]
    for _, cells in tables.score_table(runs).rows:
        for cell in filter(None, cells):
            assert f">{cell.mean:.1f} <small>{cell.low:.1f}–" in text
    for finding in conclusions.findings(runs, eval_examples=4_000):
        position = text.index(finding.statement.replace(" %", "\xa0%"))
        assert f">{finding.verdict}</span>" in text[position - 200 : position]
        if finding.estimate is not None:
            estimate = conclusions.signed(finding.estimate)
            assert estimate in text[position : position + 200]


def test_report_summary_has_the_main_numbers(page):
    summary = " ".join(page.texts["p"][:1])
    assert summary.startswith("44 runs of 3 techniques and 4 kinds of branches")
    assert "87.1\xa0% accuracy" in summary
    assert "statements" in summary


def test_report_settings_have_each_entry_once(page):
    settings = page.texts["code"]
    assert settings.count("batch_size") == 1
    assert "seed" not in settings
    assert "sparsity.penalty_weight" in settings


def test_report_texts_of_users_are_escaped(tmp_path):
    runs = make_study(seeds=[0], branches=False)
    runs[1].config["label"] = "<script>alert(1)</script>"
    make_report(tmp_path / "report.html", runs, command="<b> --select='&'")
    text = (tmp_path / "report.html").read_text("utf-8")
    assert "<script>alert" not in text
    assert "&lt;b&gt; --select=&#39;&amp;&#39;" in text
    assert len(Page(text).all("script")) == 1


def test_report_without_accuracy_says_so(tmp_path):
    runs = make_study(seeds=[0], branches=False)
    for run in runs:
        run.result.metrics.pop("accuracy")
    make_report(tmp_path / "report.html", runs, drawn=[])
    text = (tmp_path / "report.html").read_text("utf-8")
    assert "no metric <code>accuracy</code>" in text
    assert "<figure" not in text
    Page(text)


def test_report_that_cannot_be_written_names_the_file(tmp_path):
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "report.html"
    with pytest.raises(StorageError, match=re.escape(str(path))):
        make_report(path, make_study(seeds=[0]), drawn=[])


def test_report_figures_have_the_names_of_their_files(page):
    names = [f"figure-{spec.name}" for spec in FIGURES]
    found = [attributes["id"] for attributes in page.all("figure")]
    assert "figure-tradeoff" in found
    assert found == [name for name in names if name in found]


def test_draw_figures_fault_in_one_does_not_stop_the_others(runs, monkeypatch):
    def fail(study):
        raise ZeroDivisionError("a bug")

    specs = [dataclasses.replace(FIGURES[0], draw=fail), *FIGURES[1:3]]
    monkeypatch.setattr("sos.experiments.figures.FIGURES", specs)
    drawn, failures = report.draw_figures(Study(runs))
    assert [spec for spec, _ in drawn] == specs[1:]
    assert list(failures) == ["tradeoff"]
    assert "ZeroDivisionError: a bug" in failures["tradeoff"]


def test_report_of_bleu_has_its_name_and_unit(tmp_path):
    path = tmp_path / "report.html"
    make_report(path, in_bleu(make_study()))
    text = path.read_text("utf-8")
    words = re.sub(r"<[^>]*>", " ", text[: text.index("<script>")])
    assert "accuracy" not in words.lower()
    for part in (
        "Dense networks reach 26.1 BLEU.",
        "Differences are in points of BLEU",
        "BLEU by technique and sparsity",
        "BLEU against sparsity",
    ):
        assert part in words
    assert ">BLEU</th>" in text
    assert ">26.10</td>" in text
    Page(text)
