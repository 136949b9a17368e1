"""All figures of the page, in their order."""

from __future__ import annotations

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
    *(margins, subsets, distributions, flow, ratios, classes, confidence),
    *(reliability, calibration, boundary, changes, paths, composition),
)


def graphs(content: ReportContent) -> list[Graph]:
    """The figures; one that cannot be shown says why."""
    view = View(content)
    return [build(view) for build in BUILDERS]
