"""Static figures: one function per figure, from tables to a `matplotlib.figure.Figure`.

Distances are in units of the pixel range. Images without a distance (``inf``) are not drawn; a note gives their
number. A figure without data holds one sentence that names what is missing. No function touches matplotlib's global
state.
"""

from harness.figures.brackets import bracket_bands as bracket_bands
from harness.figures.calibration import calibration_curves as calibration_curves
from harness.figures.calibration import confidence_margins as confidence_margins
from harness.figures.canvas import save as save
from harness.figures.classes import boundary_classes as boundary_classes
from harness.figures.classes import class_margins as class_margins
from harness.figures.curves import correctness_curves as correctness_curves
from harness.figures.curves import margin_curves as margin_curves
from harness.figures.distributions import margin_distributions as margin_distributions
from harness.figures.flow import image_flow as image_flow
from harness.figures.images import image_paths as image_paths
from harness.figures.style import CORRECT as CORRECT
from harness.figures.style import ENVELOPE_COLOUR as ENVELOPE_COLOUR
from harness.figures.style import INCORRECT as INCORRECT
from harness.figures.style import MARKERS as MARKERS
from harness.figures.style import NORM_LABELS as NORM_LABELS
from harness.figures.style import PALETTE as PALETTE
from harness.figures.style import SPLIT_STYLES as SPLIT_STYLES
from harness.figures.trust import estimator_ratios as estimator_ratios
from harness.statistics.figure_tables import flow_epochs as flow_epochs
from harness.statistics.figure_tables import nearest_epochs as nearest_epochs
