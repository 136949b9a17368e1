"""The figures of the page in order."""

from __future__ import annotations

from harness.report.content import ReportContent
from harness.report.figures.brackets import brackets
from harness.report.figures.calibration import calibration, confidence, reliability
from harness.report.figures.classes import boundary, classes
from harness.report.figures.curves import margins, subsets
from harness.report.figures.distributions import distributions
from harness.report.figures.flow import flow
from harness.report.figures.graph import Graph
from harness.report.figures.images import composition, paths
from harness.report.figures.trust import changes, ratios
from harness.report.figures.view import View

BUILDERS = (
    *(margins, subsets, distributions, flow, ratios, brackets, classes, confidence),
    *(reliability, calibration, boundary, changes, paths, composition),
)


def graphs(content: ReportContent) -> list[Graph]:
    """All figures; a figure without data has a ``reason`` instead of panels."""
    view = View(content)
    # without lower bounds the page has no figure of brackets
    certified = len(view.table("brackets")) > 0
    return [build(view) for build in BUILDERS if certified or build is not brackets]
