"""The page holds the tables' numbers, escapes every name, makes no request and explains missing content."""

import base64
import copy
import dataclasses
import gzip
import hashlib
import io
import json
import math
import re
from collections.abc import Callable
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
from PIL import Image

from harness.report.content import ReportContent, RunContent
from harness.report.figures.graph import Graph, encode, text
from harness.report.figures.index import graphs
from harness.report.figures.view import View
from harness.report.page import render
from harness.report.pictures import magnify, png
from harness.report.prose.sections import differences
from harness.report.tables import Table
from tests import pages
from tests.pages import FIGURES, HOSTILE, hostile

# attributes that make a browser ask for something
ASKING = {"src", "href", "srcset", "action", "formaction", "data", "poster", "background", "cite", "ping", "xlink:href"}


class Reader(HTMLParser):
    """Elements, their attributes and their text, as a browser reads them."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []  # of which element, and what
        self.open: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.elements)

    def visible(self) -> str:
        return " ".join(data for tag, data in self.texts if tag not in ("script", "style"))

    def block(self, identity: str) -> str:
        """The text of the <script> with this id."""
        scripts = [attributes for tag, attributes in self.elements if tag == "script"]
        contents = [data for tag, data in self.texts if tag == "script"]
        return contents[[attributes.get("id") for attributes in scripts].index(identity)]


def requests(page: str) -> list[str]:
    """Network requests and foreign scripts of the page."""
    reader = Reader(page)
    result = []
    for tag, attributes in reader.elements:
        for name, value in attributes.items():
            if name.startswith("on") or (name in ASKING and not re.match(r"#|data:image/png;", value or "")):
                result.append(f"{tag} {name}={value}")
            if name == "style" and re.search(r"url\(|@import", value or ""):
                result.append(f"{tag} {name}={value}")
        if tag in ("iframe", "object", "embed", "link", "base", "frame", "audio", "video"):
            result.append(tag)
    styles = [data for tag, data in reader.texts if tag == "style"]
    return result + [style for style in styles if re.search(r"url\(|@import", style)]


def by_name(content: ReportContent) -> dict[str, Graph]:
    return {graph.name: graph for graph in graphs(content)}


def unpacked(reader: Reader, name: str) -> pd.DataFrame:
    """The packed table as text."""
    content = gzip.decompress(base64.b64decode(reader.block(f"table-{name}")))
    return pd.read_csv(io.BytesIO(content), dtype=str, keep_default_na=False)


def equal(found: pd.DataFrame, expected: pd.DataFrame) -> bool:
    """Whether a table of texts equals the expected one in every digit, with blanks for undefined values."""
    assert list(found) == list(expected)
    assert len(found) == len(expected)
    for name in found:
        for cell, value in zip(found[name], expected[name], strict=True):
            blank = value == "" or (isinstance(value, float) and math.isnan(value))
            same = cell == "" if blank else (float(cell) == value if isinstance(value, float) else cell == str(value))
            if not same:
                return False
    return True


@pytest.fixture(scope="module")
def one() -> RunContent:
    return pages.run()


@pytest.fixture(scope="module")
def pair(one: RunContent) -> ReportContent:
    return pages.report(one, pages.run("pgd", seed=3, epochs=range(9)))


@pytest.fixture(scope="module")
def drawn(pair: ReportContent) -> dict[str, Graph]:
    return by_name(pair)


@pytest.fixture(scope="module")
def page(pair: ReportContent) -> str:
    return render(pair)


@pytest.mark.slow
def test_the_page_makes_no_network_requests(page: str) -> None:
    assert requests(page) == []


@pytest.mark.parametrize(
    "planted",
    [
        '<img src="http://a.example/x.png">',
        '<a href="//a.example">x</a>',
        "<p onclick=alert(1)>",
        '<link rel="stylesheet">',
        "<style>p { background: url(x.png) }</style>",
        '<p style="background: url(http://a.example)">',
        "<script src=x.js></script>",
        "<img src=data:image/svg+xml,x>",
    ],
)
def test_a_planted_request_is_detected(page: str, planted: str) -> None:
    assert len(requests(page.replace("</main>", f"{planted}</main>"))) == 1


def test_only_scripts_of_the_page_may_run(page: str) -> None:
    reader = Reader(page)
    metas = [attributes for tag, attributes in reader.elements if tag == "meta"]
    policy = next(str(m["content"]) for m in metas if m.get("http-equiv") == "Content-Security-Policy")
    rules = {rule.split()[0]: rule.split()[1:] for rule in policy.split("; ")}
    assert rules["default-src"] == ["'none'"]
    assert rules["img-src"] == ["data:", "blob:"]
    assert not {"connect-src", "frame-src", "font-src"} & rules.keys()
    scripts = [attributes for tag, attributes in reader.elements if tag == "script"]
    contents = [data for tag, data in reader.texts if tag == "script"]
    assert len(scripts) == len(contents)
    running = [text for attributes, text in zip(scripts, contents, strict=True) if "type" not in attributes]
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in running]
    assert rules["script-src"] == [f"'sha256-{digest}'" for digest in digests]
    assert len(running) == 2
    assert "\r" not in page


@pytest.mark.slow
def test_every_external_name_is_escaped() -> None:
    page = render(hostile())
    reader = Reader(page)
    assert requests(page) == []
    assert "<img src=x" not in page
    plain = render(pages.report(pages.run(epochs=range(3)), pages.run("other", epochs=range(3))))
    # no more elements of any kind than the same page with harmless names, except where names are inserted
    assert reader.count("script") == Reader(plain).count("script")
    assert reader.visible().count(HOSTILE) > 30
    for name in FIGURES:
        panels = json.loads(reader.block(f"graph-{name}"))["panels"]
        assert HOSTILE in json.dumps(
            [panel["where"] for panel in panels] + [t["where"] for p in panels for t in p["traces"]]
        )
        # plotly interprets HTML in its texts
        assert HOSTILE not in json.dumps([[t["trace"] for t in panel["traces"]] for panel in panels])
        assert HOSTILE not in json.dumps([panel["layout"] for panel in panels])


@pytest.mark.slow
def test_control_an_unescaped_name_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.report.page.Environment", _careless)
    assert any("onerror" in request for request in requests(render(hostile())))


def _careless(**settings: object) -> object:
    from jinja2 import Environment

    return Environment(**{**settings, "autoescape": False})  # type: ignore[arg-type]


def test_json_of_any_value_is_safe_inside_a_script() -> None:
    value = {"a": HOSTILE, "b": [math.nan, math.inf, -math.inf, 1.23456789, 4.0, 1e-30], "c": "\u2028&\u2029<!--"}
    written = encode(value)
    assert not re.search("[<>&\u2028\u2029]", written)
    read = json.loads(written, parse_constant=lambda name: pytest.fail(name))
    assert read == {"a": HOSTILE, "b": [None, None, None, 1.2346, 4, 1e-30], "c": "\u2028&\u2029<!--"}
    assert encode(np.array([[1, 2], [3, 4]])) == "[[1,2],[3,4]]"
    assert encode([np.float64(0.5), np.int64(3), np.bool_(True), pd.Series([math.nan])]) == "[0.5,3,true,[null]]"


def test_plotly_reads_neither_html_nor_templates_in_names() -> None:
    assert text("<b>%{x}</b> & co") == "&lt;b&gt;% {x}&lt;/b&gt; &amp; co"


@pytest.mark.slow
def test_plotly_accepts_every_figure(drawn: dict[str, Graph]) -> None:
    assert list(drawn) == FIGURES
    for graph in drawn.values():
        assert not graph.reason
        for panel in json.loads(graph.data)["panels"]:
            assert panel["traces"]
            layout = panel["layout"]
            go.Figure([entry["trace"] for entry in panel["traces"]], layout, skip_invalid=False)
            for ends in panel["ranges"]:
                layout["yaxis"]["range"] = ends["range"]
                go.Layout(layout)
    broken = copy.deepcopy(panel)
    broken["traces"][0]["trace"]["mode"] = "curves"
    with pytest.raises(ValueError, match="mode"):
        go.Figure([entry["trace"] for entry in broken["traces"]])


def test_margin_curves_hold_the_summarys_numbers(pair: ReportContent, drawn: dict[str, Graph]) -> None:
    panels = json.loads(drawn["margins"].data)["panels"]
    runs = {run.name: run for run in pair.runs}
    seen = 0
    for panel in panels:
        if "norm" not in panel["where"]:
            continue
        for entry in panel["traces"]:
            rows = runs[panel["where"]["run"]].summary
            rows = rows[(rows["subset"] == "all") & (rows["norm"] == panel["where"]["norm"])]
            for name, value in entry["where"].items():
                rows = rows[rows[name] == value]
            trace = entry["trace"]
            assert trace["x"] == rows["epoch"].tolist()
            assert trace["y"] == pytest.approx(rows["avg"].tolist(), rel=1e-4)
            assert trace["error_y"]["array"] == pytest.approx(rows["se"].tolist(), rel=1e-4)
            assert [images for _, images in trace["customdata"]] == rows["found"].tolist()
            first, last = rows["avg"].iloc[[0, -1]]
            assert f"{first:.4g} at epoch {rows['epoch'].iloc[0]}" in entry["say"]
            assert f"{last:.4g} at epoch {rows['epoch'].iloc[-1]}" in entry["say"]
            assert trace["y"] != pytest.approx(rows["attack_avg"].tolist(), rel=1e-4)
            seen += 1
    assert seen == 2 * 2 * 3 * 2  # runs, norms, two estimators and their envelope, splits


@pytest.mark.slow
def test_an_estimator_that_was_measured_at_some_epochs_only_has_points_and_no_line(one: RunContent) -> None:
    estimator = one.summary["estimator"].iloc[0]
    kept = (one.summary["estimator"] != estimator) | one.summary["epoch"].isin([0, one.summary["epoch"].max()])
    fewer = dataclasses.replace(one, summary=one.summary[kept])
    for run, modes in ((one, {"lines+markers"}), (fewer, {"markers"})):
        figures = by_name(pages.report(run))
        panels = [p for name in ("margins", "subsets") for p in json.loads(figures[name].data)["panels"]]
        panels = [panel for panel in panels if "norm" in panel["where"]]
        own = [
            entry["trace"] for panel in panels for entry in panel["traces"] if entry["where"]["estimator"] == estimator
        ]
        assert {trace["mode"] for trace in own} == modes
    names = list(one.ratios["estimator"].unique())
    kept = (one.ratios["estimator"] != names[0]) | (one.ratios["epoch"] == one.ratios["epoch"].max())
    for table, modes in ((one.ratios, {"lines+markers", "lines"}), (one.ratios[kept], {"markers"})):
        drawn = by_name(pages.report(dataclasses.replace(one, ratios=table)))["ratios"]
        own = [entry for panel in json.loads(drawn.data)["panels"] for entry in panel["traces"]]
        assert {entry["trace"]["mode"] for entry in own if entry["where"]["estimator"] == names[0]} == modes


def test_errors_are_in_percent(one: RunContent) -> None:
    panel = json.loads(by_name(pages.report(one))["margins"].data)["panels"][0]
    train = one.epochs[one.epochs["split"] == "train"]
    assert panel["traces"][0]["trace"]["y"] == pytest.approx((100 * train["error"]).tolist(), rel=1e-4)


def test_runs_are_side_by_side_on_the_same_axes(drawn: dict[str, Graph]) -> None:
    for name in ("margins", "subsets", "ratios", "distributions", "composition", "changes", "paths", "confidence"):
        graph = drawn[name]
        assert {panel.where["run"] for panel in graph.panels} == {"standard", "pgd"}
        axes: dict[str, set[str]] = {}
        for panel in graph.panels:
            kind = panel.title.partition(" · ")[2] if name in ("composition", "margins") else str(panel.where["norm"])
            axes.setdefault(kind, set()).add(encode([panel.layout["yaxis"], panel.ranges]))
        assert all(len(same) == 1 for same in axes.values()), name


def test_flow_counts_the_images(one: RunContent) -> None:
    graph = by_name(pages.report(one))["flow"]
    table = graph.tables[0].frame
    before, after = one.correctness["test"][2], one.correctness["test"][3]
    rows = table[(table["split"] == "test") & (table["epoch"] == 2)].set_index(["before", "after"])["count"]
    assert rows["correct", "incorrect"] == (before & ~after).sum()
    assert rows["incorrect", "incorrect"] == (~before & ~after).sum()
    assert rows.sum() == len(before)
    (trace,) = graph.panels[1].traces
    assert sum(trace.plotly["link"]["value"]) == 5 * len(before)
    assert f"of 120 images {int(one.correctness['test'][0].sum())} are correct at epoch 0" in trace.say


@pytest.mark.slow
def test_flow_shows_twelve_epochs_at_most() -> None:
    run = pages.run(epochs=range(41), norms=["l2"], images=3, whole=10)
    flow = by_name(pages.report(run))["flow"]
    epochs = sorted({*flow.tables[0].frame["epoch"], *flow.tables[0].frame["next_epoch"]})
    assert len(epochs) <= 12
    assert {0, 1, 40} <= set(epochs)


@pytest.mark.slow
def test_distributions_count_every_image_once(one: RunContent) -> None:
    graph = by_name(pages.report(pages.run(epochs=range(13))))["distributions"]
    bins = graph.tables[0].frame
    assert sorted(bins["epoch"].unique()) == [10, 12]
    run = pages.run(epochs=range(13))
    found = run.margins[np.isfinite(run.margins["distance"]) & run.margins["epoch"].isin([10, 12])]
    assert bins["count"].sum() == len(found)
    assert bins.groupby("norm")[["low", "high"]].nunique().eq(50).all().all()
    missing = 4 * 2 * 40 * 3 - len(found)  # epochs and norms, splits, images, estimators and envelope
    assert missing > 0
    assert graph.notes == [f"{missing} of {4 * 2 * 40 * 3} distances were not found and are in no bin."]


def test_no_more_marks_than_two_thousand_are_drawn_at_once() -> None:
    run = pages.run(images=3000, epochs=[0], splits=["test"], estimators=["fmn"])
    graph = by_name(pages.report(run))["confidence"]
    drawn = [t for panel in graph.panels for t in panel.traces]
    assert 1900 < sum(len(t.plotly["x"]) for t in drawn) <= 2000
    merged = graph.tables[0].frame.merge(run.margins, on=["image", "norm", "split", "estimator", "epoch"])
    assert (merged["distance_x"] == merged["distance_y"]).all()
    assert len(merged) == len(graph.tables[0].frame)


def test_tables_hold_every_digit(pair: ReportContent, page: str) -> None:
    reader = Reader(page)
    for name in (
        "summary",
        "epochs",
        "ratios",
        "classes",
        "boundary",
        "changes",
        "calibration",
        "composition",
        "paths",
    ):
        expected = pd.concat([getattr(run, name).drop(columns="run", errors="ignore") for run in pair.runs])
        unpacked_table = unpacked(reader, name)
        assert unpacked_table.pop("run").tolist() == [
            run.name for run in pair.runs for _ in range(len(getattr(run, name)))
        ]
        assert equal(unpacked_table, expected)
    tests = pair.findings[pair.findings["observation"] == 3].drop(columns="observation")
    unpacked_table = unpacked(reader, "findings-3")[list(tests)]
    assert equal(unpacked_table, tests)
    assert not equal(unpacked_table, tests.assign(value=tests["value"] * (1 + 1e-15)))


def test_a_table_shows_its_first_rows_with_five_digits() -> None:
    table = Table("t", "title", pd.DataFrame({"a": [1.23456789, math.nan], "b": ["x", None], "c": [3, 4]}), first=1)
    assert table.rows == [["1.2346", "x", "3"]]
    assert Table("t", "title", table.frame).rows[1] == ["", "", "4"]
    assert table.classes == ["number", "", "number"]
    assert gzip.decompress(base64.b64decode(table.packed)).decode() == "a,b,c\n1.23456789,x,3\n,,4\n"


def test_verdicts_are_first_under_their_headings(page: str) -> None:
    shown = Reader(page).visible()
    places = [shown.index(f"Observation {number}: ") for number in (1, 2, 3)]
    assert places == sorted(places)
    assert places[-1] < shown.index("Warnings ", places[-1]) < shown.index("Figure 1.")
    assert "Margins shrink by 0.123 (0.1 to 0.2)." in shown
    assert "There is no data to test it on." in shown  # observation 2 has no headline
    assert shown.count(" not tested") == 1
    assert "observation 3: 4 tests undecided" in shown
    assert "standard: 3 images were not found" in shown


def test_text_alternatives_hold_numbers_and_every_picture_has_one(page: str) -> None:
    elements = Reader(page).elements
    plots = [a for _, a in elements if "plotly-graph" in (a.get("class") or "")]
    assert {plot["data-figure"] for plot in plots} == set(FIGURES)
    for plot in plots:
        assert plot["role"] == "img"
        assert re.search(r"\d", str(plot["aria-label"]).partition(":")[2]), plot
    images = [a for tag, a in elements if tag == "img"]
    assert len(images) == 2 * 4 * 3
    assert all(image["alt"] for image in images)


def test_the_page_states_the_options_and_how_the_runs_differ(pair: ReportContent, page: str) -> None:
    assert differences(pair.runs) == (["training", "epochs"], [["standard", "5"], ["pgd", "8"]])
    shown = Reader(page).visible()
    for words in ("0123abcd", "python", "-m harness.track", "steps 50", "l2, linf"):
        assert words in shown


EMPTY: dict[str, Callable[[RunContent], RunContent]] = {
    "empty": lambda run: pages.emptied(run, columns=True),
    "bare": lambda run: pages.emptied(run, columns=False),
    "failed": pages.all_failed,
    "correct": pages.all_correct,
    "no predictions": pages.without_predictions,
    "one epoch": lambda run: pages.run(epochs=[4]),
    "epoch 0": lambda run: pages.run(epochs=[0]),
    "one image": lambda run: pages.run(estimators=["fmn"], norms=["linf"], splits=["mine"], images=1),
}
MISSING = {
    "empty": set(FIGURES),
    "bare": set(FIGURES),
    "failed": set(FIGURES) - {"margins", "flow", "reliability", "calibration"},
    "correct": set(),
    "no predictions": {"flow", "reliability", "calibration"},
    "one epoch": {"flow", "changes", "composition"},
    "epoch 0": {"flow", "changes", "composition"},
    "one image": {"ratios"},
}


@pytest.mark.parametrize(
    "case", [case if case in ("epoch 0", "one image") else pytest.param(case, marks=pytest.mark.slow) for case in EMPTY]
)
def test_missing_figures_are_explained_in_a_sentence(one: RunContent, case: str) -> None:
    content = pages.report(EMPTY[case](one))
    figures = by_name(content)
    assert {name for name, graph in figures.items() if graph.reason} == MISSING[case]
    for graph in figures.values():
        assert bool(graph.reason) != bool(graph.panels)
        assert not graph.reason or (graph.reason.count(".") == 1 and "cannot be shown" in graph.reason)
        for panel in graph.panels:
            json.loads(graph.data, parse_constant=lambda name: pytest.fail(name))
            go.Figure([t.plotly for t in panel.traces], panel.layout)
            assert not re.search(r"\b(nan|inf|None)\b", panel.wording)
    page = render(content)
    assert requests(page) == []
    shown = Reader(page).visible()
    assert not re.search(r"\bnan\b|\bNone\b", shown)
    for name in MISSING[case]:
        assert figures[name].reason in shown


def test_a_report_without_runs_is_a_page() -> None:
    empty = ReportContent("Nothing", "now", "0", [], pd.DataFrame(), pd.DataFrame(), {}, [])
    assert "No runs" in Reader(render(empty)).visible()


@pytest.mark.slow
def test_the_same_content_gives_the_same_page(one: RunContent) -> None:
    content = pages.report(one)
    first = render(content)
    assert render(content) == first
    assert render(dataclasses.replace(content, runs=[pages.run(seed=9)])) != first


@pytest.mark.slow
def test_the_largest_runs_page_stays_small() -> None:
    names = ("deepfool", "fmn", "ddn", "pgd:steps=40")
    content = pages.report(pages.run(estimators=names, epochs=range(41), images=1000, whole=1000))
    page = render(content)
    assert len(page.encode()) < 15e6
    # of 820,000 rows of single images, only the drawn ones
    assert len(unpacked(Reader(page), "confidence")) <= 2 * 2 * 5 * 1000


@pytest.mark.slow
def test_estimators_and_splits_have_one_distinct_style_in_every_figure() -> None:
    names = [f"e{place}" for place in range(8)]
    run = pages.run(estimators=names, splits=["mine", "yours", "test", "train"], images=3, epochs=[0, 1])
    view = View(pages.report(run))
    assert view.estimators == [*names, "envelope"]
    assert len({(view.colour(name), view.symbol(name)) for name in view.estimators}) == 9
    assert view.colour("envelope") == "#000000"
    assert [view.dash(split) for split in view.splits] == ["dot", "dashdot", "dash", "solid"]
    colours = set()
    for name in ("margins", "ratios", "changes"):
        for panel in by_name(view.content)[name].panels:
            colours |= {(t.where.get("estimator"), t.plotly["line"].get("color")) for t in panel.traces}
    assert len({colour for estimator, colour in colours if estimator == "e1" and colour}) == 1


def test_pictures_keep_their_pixels_and_perturbations_their_signs() -> None:
    pixels = np.array([[0.0, 0.5], [1.0, 2.0]])
    content = base64.b64decode(png(pixels).partition(",")[2])
    assert np.asarray(Image.open(io.BytesIO(content))).tolist() == [[0, 128], [255, 255]]
    grown, factor = magnify(np.array([[-0.004, 0.002]]))
    assert factor == pytest.approx(120)
    assert grown.tolist() == [[pytest.approx(0.02), pytest.approx(0.74)]]
    assert magnify(np.zeros((2, 2)))[0].tolist() == [[0.5, 0.5], [0.5, 0.5]]


def test_a_saved_table_holds_no_formula_and_is_shown_unchanged() -> None:
    table = Table("some", "Some", pd.DataFrame({"run": ["=1+1", "ok"], "low": [-0.5, 1.0]}))
    packed = gzip.decompress(base64.b64decode(table.packed)).decode()
    assert packed == "run,low\n'=1+1,-0.5\nok,1.0\n"
    assert table.rows == [["=1+1", "-0.5"], ["ok", "1"]]
