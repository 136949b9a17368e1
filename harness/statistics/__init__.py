"""Averages, tests of the three observations and calibration: tables in, tables out.

The tracker needs only the averages, so only they are loaded here; the tests import scipy.
"""

from harness.statistics.averages import SUMMARY_COLUMNS, quantile, standard_error, summarise

__all__ = ["SUMMARY_COLUMNS", "quantile", "standard_error", "summarise"]
