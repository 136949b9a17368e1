"""The report: verdicts, interactive figures and tables of one or several runs on one page."""
