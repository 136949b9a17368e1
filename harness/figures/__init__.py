"""Static figures: one function per figure, from tables to a `matplotlib.figure.Figure`.

Distances are in units of the pixel range. Images without a distance (``inf``) are not drawn; a note gives their
number. A figure without data holds one sentence that names what is missing. No function touches matplotlib's global
state.
"""

from harness.figures.brackets import bracket_bands
from harness.figures.calibration import calibration_curves, confidence_margins
from harness.figures.canvas import save
from harness.figures.classes import boundary_classes, class_margins
from harness.figures.curves import correctness_curves, margin_curves
from harness.figures.distributions import margin_distributions
from harness.figures.flow import image_flow
from harness.figures.images import image_paths
from harness.figures.style import CORRECT, ENVELOPE_COLOUR, INCORRECT, MARKERS, NORM_LABELS, PALETTE, SPLIT_STYLES
from harness.figures.trust import estimator_ratios
from harness.statistics.figure_tables import flow_epochs, nearest_epochs

__all__ = [
    "CORRECT",
    "ENVELOPE_COLOUR",
    "INCORRECT",
    "MARKERS",
    "NORM_LABELS",
    "PALETTE",
    "SPLIT_STYLES",
    "boundary_classes",
    "bracket_bands",
    "calibration_curves",
    "class_margins",
    "confidence_margins",
    "correctness_curves",
    "estimator_ratios",
    "flow_epochs",
    "image_flow",
    "image_paths",
    "margin_curves",
    "margin_distributions",
    "nearest_epochs",
    "save",
]
