"""All figures of the page, in their order."""

from __future__ import annotations

from harness.report.brackets import brackets
from harness.report.calibrations import calibration, confidence, reliability
from harness.report.comparisons import changes, ratios
from harness.report.content import ReportContent
from harness.report.curves import margins, subsets
from harness.report.distributions import distributions
from harness.report.flow import flow
from harness.report.graph import Graph
from harness.report.images import composition, paths
from harness.report.maps import boundary, classes
from harness.report.view import View

BUILDERS = (
    *(margins, subsets, distributions, flow, ratios, brackets, classes, confidence),
    *(reliability, calibration, boundary, changes, paths, composition),
)


def graphs(content: ReportContent) -> list[Graph]:
    """The figures; one that cannot be shown says why."""
    view = View(content)
    # without lower bounds there is nothing to miss
    certified = len(view.table("brackets")) > 0
    return [build(view) for build in BUILDERS if certified or build is not brackets]
