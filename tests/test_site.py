"""The documentation as a site: built without a network, it loads nothing from elsewhere and has no dead link."""

import inspect
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import yaml

from harness import MarginTracker, measure_margins

ROOT = Path(__file__).resolve().parent.parent
# every way to a network says so and fails
BUILD = """
import socket, sys

def refused(*given, **named):
    print("ASKED THE NETWORK", given, file=sys.stderr)
    raise OSError("no network here")

for name in ("connect", "connect_ex", "sendto"):
    setattr(socket.socket, name, refused)
for name in ("create_connection", "getaddrinfo", "gethostbyname"):
    setattr(socket, name, refused)

from mkdocs.__main__ import cli
cli(["build", "--strict", "--config-file", sys.argv[1], "--site-dir", sys.argv[2]])
"""
LOADS = {
    *(("script", "src"), ("img", "src"), ("source", "src"), ("iframe", "src"), ("embed", "src"), ("object", "data")),
    *(("video", "src"), ("audio", "src"), ("video", "poster"), ("link", "href")),
}
STYLE = re.compile(r"""url\(\s*['"]?([^'")]+)|@import\s+['"]([^'"]+)""")


@dataclass
class Read(HTMLParser):
    """What a page links to, what it loads, and the places in it that can be linked to."""

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
    """Dead links and anchors, and loads from other hosts, of every page and style sheet of a site."""
    pages = {path: Read(path) for path in sorted(site.rglob("*.html"))}
    found = []
    for path, page in pages.items():
        found += [f"{path.name}: {what}" for what in _of_page(site, pages, page)]
    for path in sorted(site.rglob("*.css")):
        for address in styled(path.read_text(encoding="utf-8")):
            if urlsplit(address).netloc:
                found.append(f"{path.name}: loads {address}")
            elif not address.startswith(("data:", "#")) and not _target(site, path, urlsplit(address).path).exists():
                found.append(f"{path.name}: not there: {address}")
    return found


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
    """The file that a path means, as a server would give it; the page of an error has whole paths."""
    start = site if path.startswith("/") else source.parent
    target = Path(os.path.normpath(start / unquote(path).lstrip("/")))
    return target / "index.html" if target.is_dir() else target


def navigated(entries: list[Any]) -> Iterator[str]:
    """The pages in the navigation of mkdocs.yml."""
    for entry in entries:
        (value,) = entry.values()
        if isinstance(value, str):
            yield value
        else:
            yield from navigated(value)


NAVIGATION = list(navigated(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-c", BUILD, str(ROOT / "mkdocs.yml"), str(folder)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "ASKED THE NETWORK" not in done.stderr
    return folder


@pytest.mark.parametrize("page", NAVIGATION)
def test_every_page_of_the_navigation_is_there(site: Path, page: str) -> None:
    text = "".join(Read(site / page.replace(".md", ".html")).text)
    assert "margin-harness" in text
    # what is for mkdocstrings is not shown as it is
    assert "::: " not in text


def test_every_page_of_the_documentation_is_in_the_navigation() -> None:
    docs = ROOT / "docs"
    written = {path.relative_to(docs).as_posix() for path in [*docs.glob("*.md"), *docs.glob("api/*.md")]}
    assert set(NAVIGATION) == written | {"commands.md"}
    assert len(NAVIGATION) == len(set(NAVIGATION))


def test_no_link_is_dead_and_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    assert len(list(site.rglob("*.html"))) > len(NAVIGATION)
    assert problems(site) == []


def test_links_and_figures_are_there_to_be_checked(site: Path) -> None:
    page = Read(site / "reproduction.html")
    assert "#observation-1" in page.links
    assert "reproduction/claims.csv" in page.links or "reproduction/trainings.csv" in page.links
    assert "reproduction/fashion-mnist-cnn/distributions-l2.png" in page.loads


def test_the_readme_is_a_page_whose_links_are_the_sites(site: Path) -> None:
    page = Read(site / "commands.html")
    assert "run-it" in page.places
    assert {"estimators.html", "statistics.html", "speed/index.html"} <= set(page.links)
    assert "digits/margins.png" in page.loads
    # CITATION.cff is no part of the site: its name stands there as text
    assert not [link for link in page.links if "CITATION" in link]
    assert "CITATION.cff" in "".join(page.text)


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
        ("folders", "harness.store.folder.RunFolder.margins"),
        ("folders", "harness.runs.read_run"),
        ("engines", "harness.workers.Workers"),
        ("engines", "harness.on_ray.OnRay"),
        ("exact", "attacks.affine.affine_margins"),
    ],
)
def test_the_reference_is_whole(site: Path, page: str, place: str) -> None:
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
def test_the_checker_finds_what_is_planted(tmp_path: Path, body: str, problem: str) -> None:
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


def test_the_build_fails_on_a_dead_link_and_on_the_network(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "mkdocs.yml").write_text("site_name: x\nhooks: [hook.py]\n", encoding="utf-8")
    (tmp_path / "hook.py").write_text("", encoding="utf-8")

    def build(text: str) -> subprocess.CompletedProcess[str]:
        (tmp_path / "docs" / "index.md").write_text(text, encoding="utf-8")
        command = [sys.executable, "-c", BUILD, str(tmp_path / "mkdocs.yml"), str(tmp_path / "site")]
        return subprocess.run(command, capture_output=True, text=True, timeout=300)

    assert build("# x").returncode == 0
    dead = build("[x](gone.md)")
    assert dead.returncode != 0
    assert "gone.md" in dead.stderr
    asks = "import urllib.request\ndef on_files(files, config): urllib.request.urlopen('http://127.0.0.1:9')\n"
    (tmp_path / "hook.py").write_text(asks, encoding="utf-8")
    asking = build("# x")
    assert asking.returncode != 0
    assert "ASKED THE NETWORK" in asking.stderr


def test_links_are_rewritten_where_they_leave_the_documentation_only(tmp_path: Path) -> None:
    relinked = runpy.run_path(str(ROOT / ".ci" / "site_hooks.py"))["relinked"]
    docs = tmp_path / "docs"
    (docs / "table").mkdir(parents=True)
    (docs / "bare").mkdir()
    for name in ("README.md", "code.py", "docs/page.md", "docs/table/README.md", "docs/bare/x.csv", "docs/x.png"):
        (tmp_path / name).write_text("", encoding="utf-8")

    def from_readme(text: str) -> str:
        return str(relinked(text, tmp_path / "README.md", docs, "commands.md"))

    def from_table(text: str) -> str:
        return str(relinked(text, docs / "table" / "README.md", docs, "table/README.md"))

    assert from_readme("see [`p`](docs/page.md#a), ![x](docs/x.png)") == "see [`p`](page.md#a), ![x](x.png)"
    assert from_readme("[`code`](code.py) [t](docs/table) [b](docs/bare)") == "`code` [t](table/README.md) b"
    assert from_table("[r](../../README.md#run) [p](../page.md)") == "[r](../commands.md#run) [p](../page.md)"
    for kept in ("[x](https://example.org/a#b)", "[x](#place)", "[x](gone.md)", "`a[0](b)`"):
        assert from_readme(kept) == kept


def test_docstrings_get_one_name_a_line() -> None:
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
