"""The documentation as a site: every page is built, no link is dead, nothing is loaded from another host."""

import inspect
import os
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from playwright.sync_api import Error, sync_playwright

from harness import MarginTracker, measure_margins

ROOT = Path(__file__).resolve().parent.parent
LOADS = {
    *(("script", "src"), ("img", "src"), ("source", "src"), ("iframe", "src"), ("embed", "src"), ("object", "data")),
    *(("video", "src"), ("audio", "src"), ("video", "poster"), ("link", "href")),
}
STYLE = re.compile(r"""url\(\s*['"]?([^'")]+)|@import\s+['"]([^'"]+)""")


@dataclass
class Read(HTMLParser):
    """The links of a page, the files it loads, and its anchors."""

    path: Path
    links: list[str] = field(default_factory=list)
    loads: list[str] = field(default_factory=list)
    places: set[str] = field(default_factory=set)
    text: list[str] = field(default_factory=list)
    inside: str = ""

    def __post_init__(self) -> None:
        super().__init__()
        self.feed(self.path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.inside = tag
        for name, value in attrs:
            if value is None:
                continue
            if name == "id" or (tag, name) == ("a", "name"):
                self.places.add(value)
            elif (tag, name) == ("a", "href"):
                self.links.append(value)
            elif (tag, name) in LOADS:
                self.loads.append(value)
            elif name == "srcset":
                self.loads += [one.split()[0] for one in value.split(",")]
            elif name == "style":
                self.loads += styled(value)

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside == "style":
            self.loads += styled(data)
        if self.inside not in ("script", "style"):
            self.text.append(data)


def styled(css: str) -> list[str]:
    """What a style sheet loads."""
    return [address or imported for address, imported in STYLE.findall(css)]


def problems(site: Path) -> list[str]:
    """Dead links, dead anchors and loads from other hosts, for every page and style sheet of a site."""
    pages = {path: Read(path) for path in sorted(site.rglob("*.html"))}
    result = []
    for path, page in pages.items():
        result += [f"{path.name}: {what}" for what in _of_page(site, pages, page)]
    for path in sorted(site.rglob("*.css")):
        for address in styled(path.read_text(encoding="utf-8")):
            if urlsplit(address).netloc:
                result.append(f"{path.name}: loads {address}")
            elif not address.startswith(("data:", "#")) and not _target(site, path, urlsplit(address).path).exists():
                result.append(f"{path.name}: not there: {address}")
    return result


def _of_page(site: Path, pages: dict[Path, Read], page: Read) -> Iterator[str]:
    for address in page.loads:
        if urlsplit(address).netloc:
            yield f"loads {address}"
    for address in page.links + page.loads:
        parts = urlsplit(address)
        if parts.netloc or parts.scheme:
            continue
        target = _target(site, page.path, parts.path) if parts.path else page.path
        if not target.is_file():
            yield f"not there: {address}"
        elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].places:
            yield f"no such place: {address}"


def _target(site: Path, source: Path, path: str) -> Path:
    """The file that a server returns for a path; the error page has absolute paths."""
    start = site if path.startswith("/") else source.parent
    target = Path(os.path.normpath(start / unquote(path).lstrip("/")))
    return target / "index.html" if target.is_dir() else target


def navigated(entries: list[Any]) -> Iterator[str]:
    """The pages in the navigation of zensical.toml."""
    for entry in entries:
        (value,) = entry.values()
        if isinstance(value, str):
            yield value
        else:
            yield from navigated(value)


NAVIGATION = list(navigated(tomllib.loads((ROOT / "zensical.toml").read_text(encoding="utf-8"))["project"]["nav"]))


def build(folder: Path) -> subprocess.CompletedProcess[str]:
    """Build the site of a folder that holds a zensical.toml, into its `site/`."""
    command = [sys.executable, "-m", "zensical", "build", "--strict"]
    environment = os.environ | {"NO_COLOR": "1"}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, env=environment)


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole site, built outside the checkout."""
    folder = tmp_path_factory.mktemp("site")
    shutil.copy(ROOT / "zensical.toml", folder)
    # zensical takes no docs_dir behind a symbolic link
    shutil.copytree(ROOT / "docs", folder / "docs")
    for name in ("attacks", "harness", ".ci"):
        (folder / name).symlink_to(ROOT / name)
    done = build(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "site"


@pytest.mark.parametrize("page", NAVIGATION)
def test_every_page_of_the_navigation_exists(site: Path, page: str) -> None:
    text = "".join(Read(site / page.replace(".md", ".html")).text)
    assert "margin-harness" in text
    # directives for mkdocstrings are not shown literally
    assert "::: " not in text


def test_every_page_of_the_documentation_is_in_the_navigation() -> None:
    docs = ROOT / "docs"
    written = {path.relative_to(docs).as_posix() for path in [*docs.glob("*.md"), *docs.glob("api/*.md")]}
    assert set(NAVIGATION) == written
    assert len(NAVIGATION) == len(set(NAVIGATION))


def test_no_link_is_dead_and_nothing_is_loaded_from_other_hosts(site: Path) -> None:
    assert len(list(site.rglob("*.html"))) > len(NAVIGATION)
    assert problems(site) == []


def test_control_there_are_links_and_figures_to_check(site: Path) -> None:
    page = Read(site / "estimators.html")
    assert {"speed/descents.html", "brackets.html#exact-margins", "estimators/manifest.json"} <= set(page.links)
    assert "estimators/cost-fashion-mnist-pgd-epoch-40-test.png" in page.loads


def test_links_of_the_readme_point_to_files_and_anchors(site: Path) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not urlsplit(link).netloc]
    assert len(links) > 20
    for link in links:
        parts = urlsplit(link)
        assert (ROOT / parts.path).is_file(), link
        if parts.fragment:
            page = site / Path(parts.path).relative_to("docs").with_suffix(".html")
            assert parts.fragment in Read(page).places, link


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 900


def test_the_search_index_is_a_script(site: Path) -> None:
    # neither fetch() nor a worker may read file://
    assert any(address.endswith("iframe-worker.js") for address in Read(site / "index.html").loads)
    assert (site / "search.js").read_text(encoding="utf-8").startswith("var __index")


@pytest.mark.slow
def test_search_works_without_a_server(site: Path) -> None:
    system = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=system, args=["--no-sandbox"])
        except Error as error:
            pytest.skip(f"no browser: {str(error).splitlines()[0]}")
        page = browser.new_page()
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto((site / "index.html").as_uri())
        page.keyboard.press("Control+k")
        page.get_by_role("combobox").fill("Gaussian noise")
        page.get_by_text(re.compile(r"\b[1-9]\d* results?\b")).first.wait_for(timeout=20_000)
        assert page.get_by_role("combobox").input_value() == "Gaussian noise"
        browser.close()
    assert [url for url in asked if not url.startswith(("file:", "data:", "about:", "blob:"))] == []


@pytest.mark.parametrize("function", [MarginTracker, MarginTracker.update, measure_margins])
def test_the_reference_has_every_parameter(site: Path, function: Any) -> None:
    page = Read(site / "api" / "tracker.html")
    text = "".join(page.text)
    assert "harness.MarginTracker" in page.places
    entries = set(re.findall(r"(\w+)\s*\(", text))
    names = [name for name in inspect.signature(function).parameters if name not in ("self", "listener")]
    assert len(names) > 2
    assert [name for name in names if name not in entries] == []


@pytest.mark.parametrize(
    ("page", "place"),
    [
        ("estimators", "attacks.estimator.Estimator.perturb"),
        ("estimators", "attacks.registry.create"),
        ("estimators", "attacks.measure.measure"),
        ("certifiers", "attacks.certify.certifiers.Crown"),
        ("callbacks", "harness.callbacks.lightning.MarginCallback"),
        ("callbacks", "harness.callbacks.transformers.MarginCallback"),
        ("callbacks", "harness.loggers.create_logger"),
        ("folders", "harness.store.RunFolder.margins"),
        ("folders", "harness.runs.read_run"),
        ("engines", "harness.workers.Workers"),
        ("engines", "harness.on_ray.OnRay"),
        ("exact", "attacks.affine.affine_margins"),
    ],
)
def test_the_reference_is_complete(site: Path, page: str, place: str) -> None:
    assert place in Read(site / "api" / f"{page}.html").places


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ('<a href="gone.html">x</a>', "not there: gone.html"),
        ('<a href="deep">x</a>', "not there: deep"),
        ('<a href="/gone.html">x</a>', "not there: /gone.html"),
        ('<a href="other.html#gone">x</a>', "no such place: other.html#gone"),
        ('<a href="#gone">x</a>', "no such place: #gone"),
        ('<img src="gone.png">', "not there: gone.png"),
        ('<script src="https://example.org/x.js"></script>', "loads https://example.org/x.js"),
        ('<script src="//example.org/x.js"></script>', "loads //example.org/x.js"),
        ('<link rel="stylesheet" href="https://example.org/x.css">', "loads https://example.org/x.css"),
        ('<link rel="preconnect" href="https://example.org">', "loads https://example.org"),
        ('<img srcset="https://example.org/x.png 2x">', "loads https://example.org/x.png"),
        ("<style>@import 'https://example.org/x.css'</style>", "loads https://example.org/x.css"),
        ('<p style="background: url(https://example.org/x.png)">', "loads https://example.org/x.png"),
    ],
)
def test_the_checker_finds_planted_faults(tmp_path: Path, body: str, problem: str) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "other.html").write_text('<p id="here"><a href="index.html">x</a>', encoding="utf-8")
    clean = '<a href="other.html#here">x</a><a href="/other.html">x</a><a href="https://example.org">x</a>'
    (tmp_path / "index.html").write_text(clean, encoding="utf-8")
    assert problems(tmp_path) == []
    (tmp_path / "index.html").write_text(clean + body, encoding="utf-8")
    assert problems(tmp_path) == [f"index.html: {problem}"]


def test_the_checker_reads_style_sheets(tmp_path: Path) -> None:
    css = tmp_path / "x.css"
    css.write_text("p { background: url(data:image/svg+xml,a) } q { mask: url('x.css') }", encoding="utf-8")
    assert problems(tmp_path) == []
    css.write_text('@font-face { src: url("https://example.org/x.woff2") } p { mask: url(gone.svg) }', encoding="utf-8")
    assert problems(tmp_path) == ["x.css: loads https://example.org/x.woff2", "x.css: not there: gone.svg"]


@pytest.mark.slow
def test_the_build_fails_on_a_dead_link_and_a_dead_anchor(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "zensical.toml").write_text('[project]\nsite_name = "x"\n', encoding="utf-8")
    (tmp_path / "docs" / "other.md").write_text("# Other\n\n## Here\n", encoding="utf-8")
    page = tmp_path / "docs" / "index.md"
    page.write_text("# x\n\n[x](other.md#here)", encoding="utf-8")
    assert build(tmp_path).returncode == 0
    for dead, message in (("gone.md", "page does not exist"), ("other.md#gone", "anchor does not exist")):
        page.write_text(f"# x\n\n[x]({dead})", encoding="utf-8")
        done = build(tmp_path)
        assert done.returncode != 0
        assert message in done.stdout + done.stderr


def test_docstrings_list_one_name_per_line() -> None:
    one_name_a_line = runpy.run_path(str(ROOT / ".ci" / "docstrings.py"))["one_name_a_line"]
    text = (
        "Say.\n\nArgs:\n    low, high: the\n        bounds. seed: any. Other: no.\n    norm: one\n\n"
        "Returns:\n    a, b: c"
    )
    expected = (
        "Say.\n\nArgs:\n    low: the bounds.\n    high: the bounds.\n    seed: any. Other: no.\n    norm: one\n\n"
        "Returns:\n    a, b: c"
    )
    assert one_name_a_line(text, {"low", "high", "seed", "norm"}) == expected
    assert one_name_a_line("Args:\n    low: the bound. seed: any.", {"low"}) == "Args:\n    low: the bound. seed: any."
