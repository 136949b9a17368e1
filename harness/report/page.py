"""Rendering of the page: one HTML file with its scripts, styles, tables and images inside."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable
from importlib import resources

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from harness.report.content import ReportContent
from harness.report.figures.graph import Graph
from harness.report.figures.index import graphs
from harness.report.figures.view import View, norm_name
from harness.report.pictures import groups
from harness.report.prose.brackets import bracket_tables
from harness.report.prose.sections import MARKS, differences, facts, observations, side_tables, trust_tables
from harness.report.prose.warm import warm_tables
from harness.report.tables import Table

DASHES = {"solid": "", "dash": "5 3", "dot": "1.5 2.5", "dashdot": "5 2.5 1.5 2.5"}


def render(content: ReportContent) -> str:
    """A self-contained HTML page that makes no network request.

    Every text is escaped. Only the page's own scripts may run: its content security policy names them by their
    checksums.
    """
    environment = Environment(
        loader=PackageLoader("harness.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    view, drawn, parts, trust = View(content), graphs(content), observations(content), trust_tables(content)
    sides = side_tables(content)
    listed, warm, bands = tables(drawn), warm_tables(content), bracket_tables(content)
    scripts = [library(), package_text("report.js")]
    return environment.get_template("report.html.jinja").render(
        content=content,
        several=len(content.runs) > 1,
        controls=controls(view),
        graphs=drawn,
        observations=parts,
        trust=trust,
        warm=warm,
        sides=sides,
        bands=bands,
        tables=listed,
        packed=[*(table for part in parts for table in part.tables), *trust, *sides, *warm, *bands, *listed],
        groups={run.name: groups(run.name, run.images) for run in content.runs},
        facts=[(run, facts(run)) for run in content.runs],
        differences=differences(content.runs),
        marks=MARKS,
        dashes=DASHES,
        policy=policy(scripts),
        scripts=[Markup(script) for script in scripts],
        style=Markup(package_text("report.css")),
    )


def controls(view: View) -> list[tuple[str, str, list[tuple[str, str, str]]]]:
    """The checkboxes: dimension, title, and the value, label and colour of each choice."""
    dimensions = [
        ("estimator", "Estimators", [(name, name, view.colour(name)) for name in view.estimators]),
        ("norm", "Norms", [(name, norm_name(name), "") for name in view.norms]),
        ("split", "Images", [(name, name, "") for name in view.splits]),
        ("run", "Runs", [(name, name, "") for name in view.runs] if len(view.runs) > 1 else []),
    ]
    return [control for control in dimensions if control[2]]


def tables(drawn: Iterable[Graph]) -> list[Table]:
    """The tables of all figures, each once."""
    by_name = {table.name: table for graph in drawn for table in graph.tables if len(table.frame)}
    return list(by_name.values())


def policy(scripts: Iterable[str]) -> str:
    """A content security policy that allows these scripts only, and no request.

    plotly needs inline styles, and draws its PNG from a blob.
    """
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in scripts]
    rules = {
        "default-src": "'none'",
        "script-src": " ".join(f"'sha256-{digest}'" for digest in digests),
        "style-src": "'unsafe-inline'",
        "img-src": "data: blob:",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    return "; ".join(f"{name} {sources}" for name, sources in rules.items())


def library() -> str:
    """The text of plotly.js with line feeds only: browsers normalise line ends before they check the checksum."""
    text = (resources.files("plotly") / "package_data" / "plotly.min.js").read_text(encoding="utf-8")
    return "\n".join(text.splitlines()) if "\r" in text else text


def package_text(name: str) -> str:
    """The text of a file of this package."""
    return (resources.files("harness.report") / name).read_text(encoding="utf-8")
