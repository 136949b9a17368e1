"""Averages, tests of the three observations, calibration and brackets: tables in, tables out.

Only the averages are loaded here, because the tracker needs nothing else and the tests import scipy.
"""

from harness.statistics.averages import SUMMARY_COLUMNS, quantile, standard_error, summarise

__all__ = ["SUMMARY_COLUMNS", "quantile", "standard_error", "summarise"]
