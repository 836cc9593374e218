"""The pages in a real browser: they load alone, without a complaint, and fit what they are shown on."""

import re

import pytest
from browser import browser, chromium
from report_runs import HITS, LENGTHS, PERPLEXITY, TRIALS, measurements, write_csv, write_run

from lightning_longrope.reporting import write_comparison, write_report

pytestmark = pytest.mark.skipif(chromium() is None, reason="no Chromium on this machine: the pages were not opened")

PHONE = 390


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    root = tmp_path_factory.mktemp("pages")
    runs = [write_run(root / name) for name in ("first", "second")]
    keys = [row for row in measurements() if row[1] == "passkey"]
    many = [(row[0], "key_value", row[2] * scale, *row[3:]) for row in keys for scale in (1, 32, 1024)]
    write_csv(runs[1] / "4-evaluate/eval/results.csv", [*measurements(), *many])  # 15 lengths, up to 1,024k
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_longrope.reporting.drawing.Plot.save", lambda plot, folder: None)  # slow
        pages = {"report": write_report(runs[1]), "comparison": write_comparison(runs, root / "comparison.html")}
    with browser(root / "profile") as tab:
        yield tab, pages


@pytest.mark.parametrize("name", ["report", "comparison"])
@pytest.mark.parametrize("width", [PHONE, 1200])
@pytest.mark.parametrize("dark", [False, True])
def test_page_loads_alone_and_fits(opened, name, width, dark):
    tab, pages = opened
    tab.open(pages[name], width=width, dark=dark)
    assert tab.complaints() == []
    assert tab.requests() == [pages[name].resolve().as_uri()]
    assert tab.value("document.documentElement.scrollWidth") == tab.value("innerWidth") == width
    assert tab.value(OUTSIDE) == []
    assert tab.value(SHOWN) == [width < 640, width >= 640]  # the narrow version of the figures, the wide one
    background = tab.value("getComputedStyle(document.body).backgroundColor")
    assert luminance(background) < 0.02 if dark else luminance(background) > 0.95
    assert tab.value(FAINT) == []


# Text that sticks out of the page, but for what can be scrolled.
OUTSIDE = """[...document.querySelectorAll("h1, h2, h3, p, li, dt, dd, summary, figcaption, figure, a, caption")]
  .filter(e => !e.closest(".scroll, pre, .maps > div, details:not([open])"))
  .filter(e => e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 200))"""
SHOWN = """[".narrow", ".wide"].map(c => document.querySelector(c).getBoundingClientRect().width > 0)"""
# Text that does not reach a contrast of 4.5 against the page or the colour behind it (WCAG 2.1 AA).
FAINT = """(() => {
  const parts = c => c.match(/[\\d.]+/g).map(Number);
  const linear = v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
  const light = c => parts(c).slice(0, 3).map((v, i) => [.2126, .7152, .0722][i] * linear(v / 255))
    .reduce((a, b) => a + b);
  const behind = e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;
    if (parts(c).length < 4 || parts(c)[3] > 0) return c; } return "rgb(255, 255, 255)"; };
  const words = "h1, h2, h3, p, li, a, dt, dd, td, th, small, summary, figcaption, pre, b, .outcome";
  const texts = [...document.querySelectorAll(words)].filter(e => !e.style.getPropertyValue("--v") && e.innerText);
  return texts.map(e => [light(getComputedStyle(e).color), light(behind(e)), e.outerHTML.slice(0, 100)])
    .filter(([a, b]) => (Math.max(a, b) + .05) / (Math.min(a, b) + .05) < 4.5);
})()"""


def luminance(colour):
    """Relative luminance of `rgb(...)`."""
    red, green, blue = (int(part) / 255 for part in re.findall(r"\d+", colour)[:3])
    return 0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2


def test_numbers_are_on_the_screen(opened):
    tab, pages = opened
    tab.open(pages["report"])
    rows = tab.value(TABLE % "Perplexity")
    assert rows[0] == ["tokens read", "64", "128", "256", "512", "1,024"]
    shown = [[float(text.split("\n")[0]) for text in row[1:]] for row in rows[1:]]
    assert shown == [list(values) for values in PERPLEXITY.values()]
    heat = tab.value(HEAT % "searched")
    expected = [100 * hits[depth] // TRIALS for depth in range(5) for hits in HITS["searched"]]
    assert [int(number) for number, _ in heat] == expected
    assert heat[len(LENGTHS) - 1][1].replace("\u00a0", " ").startswith("90 %, 95 % interval")  # shown on hover
    assert tab.value("document.querySelectorAll('svg text').length") > 100


TABLE = """[...[...document.querySelectorAll("table")].find(t => t.caption && t.caption.innerText == "%s").rows]
  .map(row => [...row.cells].map(cell => cell.innerText.trim()))"""
HEAT = """[...[...document.querySelectorAll(".maps table")].find(t => t.caption.innerText == "%s")
  .querySelectorAll("tbody td")].map(cell => [cell.innerText, cell.title])"""


def test_figures_and_their_words_do_not_overlap(opened):
    tab, pages = opened
    for name, width in ((name, width) for name in pages for width in (PHONE, 1200)):
        tab.open(pages[name], width=width)
        assert tab.value(OVERLAPS) == []


# Pairs of words in one figure that cover each other by more than a pixel; turned ones are left out.
OVERLAPS = """[...document.querySelectorAll("svg")].filter(s => s.getBoundingClientRect().width).flatMap(s => {
  const texts = [...s.querySelectorAll("text")].filter(t => !/rotate\\(-(?!0)/.test(t.getAttribute("transform") || ""))
    .map(t => [t.textContent, t.getBoundingClientRect()]);
  return texts.flatMap(([a, p], i) => texts.slice(i + 1).filter(([b, q]) =>
      Math.min(p.right, q.right) - Math.max(p.left, q.left) > 1
      && Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top) > 3)
    .map(([b]) => a + " / " + b)); })"""


def test_paper_is_white_and_wide_figures_are_on_it(opened):
    tab, pages = opened
    tab.open(pages["report"], width=680, dark=True, media="print")  # A4 less its margins
    assert tab.value("document.documentElement.scrollWidth") == 680
    assert luminance(tab.value("getComputedStyle(document.body).backgroundColor")) > 0.95
    assert tab.value("getComputedStyle(document.querySelector('nav')).display") == "none"
    assert tab.value(SHOWN) == [False, True]
    tab.open(pages["report"])
    pdf = tab.pdf()
    assert pdf.startswith(b"%PDF")
    assert 3 <= len(re.findall(rb"/Type\s*/Page\b", pdf)) <= 15
