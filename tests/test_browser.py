"""The report in a browser: drawing, toggling, reading and saving by mouse and keyboard, without errors or requests."""

import csv
import io
import itertools
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from playwright.sync_api import Browser, Error, Locator, Page, sync_playwright

from harness.report.content import ReportContent
from harness.report.page import render
from tests import pages

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
ARGUMENTS = (
    *("--no-sandbox", "--disable-gpu", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--no-first-run"),
)
HANG = 20_000  # milliseconds: a time limit, not a measurement


@dataclass
class Opened:
    """A page and its errors and requests."""

    page: Page
    wrong: list[str] = field(default_factory=list)

    def plots(self, figure: str) -> Locator:
        return self.page.locator(f'.plotly-graph[data-figure="{figure}"]')


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    binary = next(filter(None, map(shutil.which, BROWSERS)), None)
    with sync_playwright() as playwright:
        try:
            started = playwright.chromium.launch(executable_path=binary, args=list(ARGUMENTS))
        except Error as error:
            pytest.skip(
                f"no browser: none of {', '.join(BROWSERS)}, nor Playwright's own ({str(error).splitlines()[0]})"
            )
        yield started
        started.close()


@pytest.fixture(scope="module")
def content() -> ReportContent:
    return pages.report(pages.run(), pages.run("pgd", seed=3, epochs=range(9)))


@pytest.fixture(scope="module")
def path(content: ReportContent, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(render(content), encoding="utf-8")
    return path


def open_page(browser: Browser, path: Path, width: int = 1280) -> Opened:
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.set_default_timeout(HANG)
    opened = Opened(page)
    page.on("console", lambda message: opened.wrong.append(f"console {message.type}: {message.text}"))
    page.on("pageerror", lambda error: opened.wrong.append(f"error: {error}"))
    page.on("requestfailed", lambda request: opened.wrong.append(f"failed: {request.url[:100]}"))
    own = ("file:", "data:", "blob:")
    page.on("request", lambda r: None if r.url.startswith(own) else opened.wrong.append(f"request: {r.url[:100]}"))
    page.goto(path.as_uri())
    return opened


@pytest.fixture
def opened(browser: Browser, path: Path) -> Iterator[Opened]:
    """The page of two runs; no test may cause an error or a request."""
    opened = open_page(browser, path)
    yield opened
    opened.page.close()
    assert opened.wrong == []


def draw_all(opened: Opened) -> None:
    opened.page.evaluate("async () => { await window.renderAll(); }")


def shown(plot: Locator) -> dict[str, bool]:
    """The names of the plot's traces and whether they are visible."""
    return dict(plot.evaluate("plot => plot.data.map(trace => [trace.name, trace.visible])"))


def sheet(opened: Opened, name: str) -> Locator:
    """An opened table."""
    table = opened.page.locator(f'table[data-table="{name}"]')
    details = opened.page.locator("details.sheet", has=table)
    if details.get_attribute("open") is None:
        details.locator("summary").click()
    return table


def test_every_figure_is_drawn(opened: Opened) -> None:
    names = opened.page.eval_on_selector_all("figure.graph", "figures => figures.map(f => f.dataset.figure)")
    assert names == pages.FIGURES
    draw_all(opened)
    opened.page.wait_for_timeout(700)  # the Sankey drawing fades in
    for name in pages.FIGURES:
        plots = opened.plots(name)
        assert plots.count() >= 2
        for plot in plots.all():
            marks = plot.locator("path.js-line, .point path, .points path, image, path.sankey-link")
            assert marks.count() > 0, name
            assert plot.locator("svg.main-svg").first.bounding_box()["width"] > 200  # type: ignore[index]
    links = opened.plots("flow").first.locator("path.sankey-link")
    assert links.count() > 8


@pytest.mark.slow
def test_figures_are_drawn_when_scrolled_into_view(opened: Opened) -> None:
    last = opened.plots(pages.FIGURES[-1]).last
    assert last.evaluate("plot => plot.data === undefined")
    last.scroll_into_view_if_needed()
    opened.page.wait_for_function("plot => plot.data !== undefined", arg=last.element_handle())


@pytest.mark.slow
def test_an_estimator_is_hidden_in_every_figure(opened: Opened) -> None:
    page = opened.page
    page.get_by_label("deepfool", exact=True).click()
    draw_all(opened)
    assert page.locator("#status").inner_text() == "deepfool hidden"
    for name in ("margins", "ratios", "changes"):
        traces = shown(opened.plots(name).last)
        hidden = {trace for trace, visible in traces.items() if visible is False}
        assert hidden == {"deepfool, train", "deepfool, test"}, name
    label = str(opened.plots("margins").last.get_attribute("aria-label"))
    assert "deepfool" not in label
    assert "fmn:steps=20, test" in label
    assert page.locator('#figure-margins .keys li[data-estimator="deepfool"]').is_hidden()
    page.get_by_label("envelope", exact=True).click()
    assert page.locator("#subsets-estimator").input_value() == "fmn:steps=20"
    page.get_by_label("fmn:steps=20", exact=True).click()
    assert page.locator("#figure-ratios .none").is_visible()
    page.get_by_label("deepfool", exact=True).click()
    draw_all(opened)
    assert page.locator("#figure-ratios .none").is_hidden()
    assert shown(opened.plots("margins").last)["deepfool, test"] is True


@pytest.mark.slow
def test_the_keyboard_toggles_and_reads(opened: Opened, content: ReportContent) -> None:
    page = opened.page
    page.get_by_label("fmn:steps=20", exact=True).focus()
    page.keyboard.press("Space")
    draw_all(opened)
    assert shown(opened.plots("margins").last)["fmn:steps=20, test"] is False
    plot = opened.plots("margins").nth(2)
    plot.focus()
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    rows = content.runs[0].summary
    rows = rows[(rows["epoch"] == 2) & (rows["subset"] == "all") & (rows["norm"] == "l2")]
    rows = rows[(rows["split"] == "test") & (rows["estimator"] == "deepfool")]
    spoken = page.locator("#status").inner_text()
    assert spoken.startswith("epoch 2: ")
    average = float(f"{rows['avg'].iloc[0]:.5g}")
    assert f"deepfool, test {average}" in spoken
    assert "fmn" not in spoken
    plot.locator(".hoverlayer .legend").wait_for()
    page.keyboard.press("Escape")
    plot.locator(".hoverlayer .legend").wait_for(state="detached")
    before = plot.evaluate("plot => plot.layout.xaxis.range.slice()")
    for _ in range(4):
        page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.ariaLabel") == "Zoom in"
    page.keyboard.press("Enter")
    low, high = plot.evaluate("plot => plot.layout.xaxis.range")
    assert before[0] < low < high < before[1]


@pytest.mark.slow
def test_norms_splits_and_runs_hide_their_panels(opened: Opened) -> None:
    page = opened.page
    headings = opened.page.locator("#figure-margins .panel h4")
    assert headings.filter(visible=True).all_inner_texts() == [
        f"{run} · {what}" for what in ("Error", "L₂ margin", "L∞ margin") for run in ("standard", "pgd")
    ]
    page.get_by_label("L∞", exact=True).uncheck()
    page.get_by_label("pgd", exact=True).uncheck()
    assert headings.filter(visible=True).all_inner_texts() == ["standard · Error", "standard · L₂ margin"]
    flows = page.locator("#figure-flow .panel h4")
    page.get_by_label("train", exact=True).uncheck()
    assert flows.filter(visible=True).all_inner_texts() == ["standard · test images over epochs"]
    draw_all(opened)
    assert shown(opened.plots("margins").first) == {"train": False, "test": True}
    assert page.locator("#images details").filter(visible=True).count() == 1


@pytest.mark.slow
def test_choosers_select_the_shown_data(opened: Opened, content: ReportContent) -> None:
    page = opened.page
    page.locator("#subsets-estimator").select_option("deepfool")
    draw_all(opened)
    rows = content.runs[0].summary
    rows = rows[(rows["estimator"] == "deepfool") & (rows["norm"] == "l2") & (rows["split"] == "test")]
    expected = rows[rows["subset"] == "incorrect"]["avg"].tolist()
    traces = opened.plots("subsets").first.evaluate("plot => plot.data.map(t => [t.name, t.y])")
    assert dict(traces)["incorrect, test"] == pytest.approx(expected, rel=1e-4)
    slider = page.locator("#reliability-epoch")
    slider.focus()
    page.keyboard.press("Home")
    assert page.locator("#figure-reliability output").inner_text() == "0"
    draw_all(opened)
    assert set(shown(opened.plots("reliability").first)) == {"train, epoch 0", "test, epoch 0"}


@pytest.mark.slow
def test_the_hover_shows_the_tables_number(opened: Opened, content: ReportContent) -> None:
    plot = opened.plots("margins").nth(2)
    plot.scroll_into_view_if_needed()
    opened.page.wait_for_function("plot => plot.data !== undefined", arg=plot.element_handle())
    box = plot.locator(".nsewdrag").bounding_box()
    assert box is not None
    # epochs 0 to 8 and a little room on both sides
    place = plot.evaluate("plot => { const [low, high] = plot.layout.xaxis.range; return (4 - low) / (high - low); }")
    opened.page.mouse.move(box["x"] + place * box["width"], box["y"] + box["height"] / 2)
    legend = plot.locator(".hoverlayer .legend")
    legend.wait_for()
    rows = content.runs[0].summary
    rows = rows[(rows["epoch"] == 4) & (rows["subset"] == "all") & (rows["norm"] == "l2")]
    texts = " | ".join(legend.locator("text").all_text_contents())
    assert "epoch 4" in texts
    for row in rows.itertuples():
        value = _significant(row.avg, 4)
        assert f"{row.estimator}, {row.split} : {value} ± {_significant(row.se, 2)} ({row.found} images)" in texts


def _significant(value: float, digits: int) -> str:
    """The number as d3 formats it with ``.4g``: with trailing zeros."""
    return f"{float(f'{value:.5g}'):#.{digits}g}"


@pytest.mark.slow
def test_a_table_is_sorted_over_all_its_rows(opened: Opened, content: ReportContent) -> None:
    table = sheet(opened, "findings-1")
    tests = content.findings[content.findings["observation"] == 1]
    assert len(tests) > 20
    column = table.locator("thead th").all_inner_texts().index("value")
    button = table.get_by_role("button", name="value")
    cells = table.locator(f"tbody td:nth-child({column + 1})")
    for order, ascending in (("ascending", True), ("descending", False)):
        button.press("Enter")
        table.locator(f"th[aria-sort={order}]").wait_for()
        opened.page.wait_for_timeout(200)
        expected = tests["value"].sort_values(ascending=ascending).head(20)
        assert [float(cell) for cell in cells.all_inner_texts()] == pytest.approx(expected.tolist(), rel=1e-4)
    opened.page.get_by_role("button", name=f"Show all {len(tests)} rows").first.click()
    table.locator(f"tbody tr:nth-child({len(tests)})").wait_for()
    assert cells.count() == len(tests)
    assert table.locator('td[data-verdict="undecided"]').count() == (tests["verdict"] == "undecided").sum()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["summary", "boundary", "findings-3"])
def test_a_saved_table_has_every_digit(opened: Opened, content: ReportContent, name: str) -> None:
    with opened.page.expect_download() as waiting:
        opened.page.locator(f'#tables button[data-save="{name}"]').first.dispatch_event("click")
    assert waiting.value.suggested_filename == f"{name}.csv"
    rows = list(csv.DictReader(io.StringIO(Path(waiting.value.path()).read_text(encoding="utf-8"))))
    expected = (
        content.findings[content.findings["observation"] == 3]
        if name.startswith("findings")
        else pd.concat([getattr(run, name).assign(run=run.name) for run in content.runs])
    )
    assert len(rows) == len(expected)
    for column in (
        "run",
        *{"summary": ("avg", "median", "count"), "boundary": ("target", "count")}.get(name, ("p", "low")),
    ):
        for row, value in zip(rows, expected[column], strict=True):
            cell: Any = row[column]
            missing = isinstance(value, float) and math.isnan(value)
            assert cell == "" if missing else (cell == value if isinstance(value, str) else float(cell) == value)


@pytest.mark.slow
def test_headings_are_in_order_and_pictures_have_alternatives(opened: Opened) -> None:
    page = opened.page
    headings = page.locator("h2").all_inner_texts()
    assert [heading.partition(":")[0] for heading in headings] == [
        *("Observation 1", "Observation 2", "Observation 3", "Which estimator can be trusted", "Warnings", "Figures"),
        *("Images with the smallest and largest margins", "Tables", "What was run"),
    ]
    levels = page.eval_on_selector_all("h1, h2, h3, h4", "all => all.map(h => Number(h.tagName[1]))")
    assert levels[0] == 1
    assert all(later - one <= 1 for one, later in itertools.pairwise(levels))
    assert page.locator("img").count() == 24
    assert page.eval_on_selector_all("img", "all => all.every(i => i.alt && i.complete && i.naturalWidth === 8)")


@pytest.mark.parametrize("width", [pytest.param(1280, marks=pytest.mark.slow), 400])
def test_nothing_is_wider_than_the_screen(browser: Browser, path: Path, width: int) -> None:
    opened = open_page(browser, path, width)
    draw_all(opened)
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= width
    widest = opened.page.eval_on_selector_all(
        ".plotly-graph svg.main-svg", "all => Math.max(...all.map(s => s.clientWidth))"
    )
    assert 250 < widest <= width
    opened.page.close()
    assert opened.wrong == []


@pytest.mark.slow
def test_printing_draws_every_figure_at_the_width_of_the_paper(opened: Opened) -> None:
    page = opened.page
    # when the browser would print, without waiting
    found = page.evaluate("""() => {
        dispatchEvent(new Event("beforeprint"));
        const plots = [...document.querySelectorAll(".plotly-graph")];
        const links = [...document.querySelectorAll("path.sankey-link")];
        return {
            drawn: plots.filter(plot => plot.querySelector("svg.main-svg") && plot.data.length).length,
            plots: plots.length,
            widest: Math.max(...[...document.querySelectorAll("svg.main-svg")].map(svg => svg.clientWidth)),
            pale: links.filter(link => getComputedStyle(link).opacity !== "1").length,
            links: links.length,
            open: document.querySelector("table[data-table=findings-1]").closest("details").open,
        };
    }""")
    assert found["drawn"] == found["plots"] > 30
    assert 300 < found["widest"] <= 680
    assert found["pale"] == 0 < found["links"]
    assert found["open"]
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    draw_all(opened)
    assert not page.evaluate("document.body.classList.contains('printing')")
    assert page.locator("table[data-table=findings-1]").is_hidden()
    assert opened.plots("margins").first.locator("svg.main-svg").first.bounding_box()["width"] > 500  # type: ignore[index]


@pytest.mark.slow
def test_the_page_prints(opened: Opened) -> None:
    opened.page.evaluate("window.printed = 0; addEventListener('afterprint', () => window.printed++)")
    content = opened.page.pdf(format="A4", print_background=True)
    assert content.startswith(b"%PDF")
    assert 5 < content.count(b"/Type /Page\n") < 60
    assert opened.page.evaluate("window.printed") == 1
    # a page without its figures gives a much smaller file
    opened.page.add_style_tag(content=".panels { display: none !important; }")
    assert len(opened.page.pdf(format="A4")) < 0.8 * len(content)


def test_hostile_names_do_nothing(browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "hostile.html"
    path.write_text(render(pages.hostile()), encoding="utf-8")
    opened = open_page(browser, path)
    opened.page.on("dialog", lambda dialog: opened.wrong.append(f"dialog: {dialog.message}"))
    draw_all(opened)
    plot = opened.plots("margins").nth(2)
    plot.focus()
    opened.page.keyboard.press("ArrowRight")
    plot.locator(".hoverlayer .legend").wait_for()
    assert pages.HOSTILE in " ".join(plot.locator(".hoverlayer .legend text").all_text_contents())
    sheet(opened, "findings-1").get_by_role("button", name="value").click()
    opened.page.locator("table[data-table=findings-1] th[aria-sort=ascending]").wait_for()
    assert opened.page.locator("img[src=x]").count() == 0
    opened.page.close()
    assert opened.wrong == []


@pytest.mark.parametrize(
    "break_it",
    ["throw new Error('planted')", pytest.param("fetch('http://127.0.0.1:9/x')", marks=pytest.mark.slow)],
)
def test_a_planted_error_or_request_is_detected(browser: Browser, path: Path, tmp_path: Path, break_it: str) -> None:
    planted = tmp_path / "planted.html"
    page = path.read_text(encoding="utf-8").replace("script-src ", "script-src 'unsafe-inline' ", 1)
    hashless = page.replace("'sha256-", "'nonce-")  # a hash would switch 'unsafe-inline' off
    planted.write_text(hashless.replace("</main>", f"</main><script>{break_it}</script>", 1), encoding="utf-8")
    opened = open_page(browser, planted)
    opened.page.wait_for_timeout(300)
    opened.page.close()
    assert opened.wrong


def test_the_content_security_policy_blocks_foreign_scripts(browser: Browser, path: Path, tmp_path: Path) -> None:
    planted = tmp_path / "planted.html"
    page = path.read_text(encoding="utf-8")
    planted.write_text(page.replace("</main>", "</main><script>window.planted = 1</script>", 1), encoding="utf-8")
    opened = open_page(browser, planted)
    assert opened.page.evaluate("window.planted === undefined && window.renderAll !== undefined")
    opened.page.close()
    assert any("Content Security Policy" in line for line in opened.wrong)


@pytest.mark.slow
@pytest.mark.parametrize("case", [pytest.param("empty", marks=pytest.mark.slow), "one epoch"])
def test_pages_with_little_in_them_have_no_error(browser: Browser, tmp_path: Path, case: str) -> None:
    run = pages.run(epochs=[3], norms=["l2"])
    path = tmp_path / "little.html"
    path.write_text(
        render(pages.report(pages.emptied(run, columns=True) if case == "empty" else run)), encoding="utf-8"
    )
    opened = open_page(browser, path)
    draw_all(opened)
    opened.page.pdf()
    assert opened.page.locator(".reason").filter(visible=True).count() >= 3
    opened.page.close()
    assert opened.wrong == []


@pytest.mark.slow
def test_the_largest_runs_page_opens(browser: Browser, tmp_path: Path) -> None:
    names = ("deepfool", "fmn", "ddn", "pgd:steps=40")
    path = tmp_path / "large.html"
    # few images in the rows, as the size of the page does not depend on them
    path.write_text(render(pages.report(pages.run(estimators=names, epochs=range(41), images=60))), encoding="utf-8")
    opened = open_page(browser, path)
    draw_all(opened)
    assert opened.page.locator(".js-plotly-plot").count() > 20
    opened.page.close()
    assert opened.wrong == []
