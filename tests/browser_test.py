"""The report of a study in the system's Chromium (`make test-browser`)."""

import itertools
import shutil

import pytest
from playwright.sync_api import sync_playwright

from tests.support.results import make_report, make_study

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        CHROMIUM is None,
        reason="There is no Chromium, so the report is NOT tested in a "
        "browser. Install it, as with `apt-get install chromium`.",
    ),
]

# Text on the background, and each colour of text.
COLOURS = ("ink", "soft", "link", "good", "bad", "open")
CONTRAST = """(name) => {
  const element = document.body.appendChild(document.createElement("p"));
  element.style.color = `var(--${name})`;
  const { color } = getComputedStyle(element);
  const background = getComputedStyle(document.body).backgroundColor;
  element.remove();
  const luminance = (text) => {
    const [r, g, b] = text.match(/[\\d.]+/g).map((value) => {
      const part = value / 255;
      return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const both = [luminance(color), luminance(background)];
  return (Math.max(...both) + 0.05) / (Math.min(...both) + 0.05);
}"""


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    make_report(path, make_study())
    return path.as_uri()


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        # The sandbox needs rights that containers lack.
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox"]
        )
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, url):
    """Opens the report; no page may fail at anything or load anything."""
    contexts, faults, requests = [], [], []

    def call(width=1400, **options):
        context = browser.new_context(
            viewport={"width": width, "height": 900}, **options
        )
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: faults.append(message.text))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(url)
        return page

    yield call
    for context in contexts:
        context.close()
    assert faults == []
    assert requests and set(requests) == {url}


@pytest.fixture
def page(open_page):
    return open_page()


def _column(page, number):
    cells = f"#table-of-runs tbody tr:not([hidden]) > :nth-child({number})"
    return [text.strip() for text in page.locator(cells).all_inner_texts()]


def _heading(page, name):
    table = page.locator("#table-of-runs")
    return table.get_by_role("columnheader", name=name)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 820, 1400])
def test_report_fits_the_window(open_page, width, scheme):
    page = open_page(width, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    # What is wider scrolls by itself, and can be reached with the keyboard.
    for region in page.locator(".scroll").all():
        assert region.get_attribute("tabindex") == "0"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_report_texts_have_contrast(open_page, scheme):
    page = open_page(color_scheme=scheme)
    ratios = {name: page.evaluate(CONTRAST, name) for name in COLOURS}
    # That of WCAG 2, level AA.
    assert min(ratios.values()) >= 4.5, ratios


def test_report_heading_sorts_numbers_in_both_directions(page):
    heading = _heading(page, "Accuracy, %")
    heading.get_by_role("button").click()
    assert heading.get_attribute("aria-sort") == "ascending"
    values = [float(text) for text in _column(page, 5)]
    assert len(values) == 44
    assert values == sorted(values)
    heading.get_by_role("button").click()
    assert heading.get_attribute("aria-sort") == "descending"
    assert [float(t) for t in _column(page, 5)] == sorted(values, reverse=True)


def test_report_sorting_leaves_empty_cells_last(page):
    heading = _heading(page, "Sparsity, %")
    for _ in range(2):
        heading.get_by_role("button").click()
        texts = _column(page, 4)
        assert [bool(text) for text in texts] == [True] * 42 + [False] * 2


def test_report_heading_sorts_texts_with_the_keyboard(page):
    seed, technique = _heading(page, "Seed"), _heading(page, "Technique")
    seed.get_by_role("button").click()
    technique.get_by_role("button").focus()
    page.keyboard.press("Enter")
    assert technique.get_attribute("aria-sort") == "ascending"
    assert seed.get_attribute("aria-sort") is None
    labels = [key for key, _ in itertools.groupby(_column(page, 1))]
    assert labels == sorted(set(labels))
    # Equal ones keep the order of the page.
    assert _column(page, 3)[:2] == ["1000", "1001"]


def test_report_filter_shows_rows_with_all_words(page):
    count = page.locator("#count")
    assert count.inner_text() == "44 of 44 runs"
    page.get_by_label("Filter").fill("PRUNING 0.98")
    # Branches of pruned networks have the name of their trunk.
    assert count.inner_text() == "12 of 44 runs"
    page.get_by_label("Technique or branch").select_option("random pruning")
    assert count.inner_text() == "2 of 44 runs"
    assert set(_column(page, 1)) == {"random pruning"}
    page.get_by_label("Filter").fill("no such run")
    assert _column(page, 1) == []


def test_report_theme_follows_the_system_and_the_button(open_page):
    page = open_page(color_scheme="dark")

    def background():
        return page.evaluate("getComputedStyle(document.body).backgroundColor")

    dark = background()
    page.get_by_role("button", name="Switch to the light theme").click()
    assert background() == "rgb(255, 255, 255)" != dark
    page.reload()
    assert background() == "rgb(255, 255, 255)"
    page.get_by_role("button", name="Switch to the dark theme").click()
    assert background() == dark


def test_report_without_scripts_has_all_rows_and_no_controls(open_page):
    page = open_page(java_script_enabled=False)
    assert len(_column(page, 1)) == 44
    assert not page.get_by_label("Filter").is_visible()
    assert not page.locator("#theme").is_visible()


def test_report_in_print_has_no_controls_and_is_light(open_page):
    # A sheet of A4 between margins.
    page = open_page(710, color_scheme="dark")
    page.emulate_media(media="print")
    assert page.evaluate("document.documentElement.scrollWidth") == 710
    assert page.get_by_text("Its 95 % interval").is_visible()
    assert not page.get_by_role("navigation").is_visible()
    assert not page.get_by_label("Filter").is_visible()
    assert page.locator("figure").first.is_visible()
    colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert colour == "rgb(255, 255, 255)"
