"""Report of one or several runs: a page of verdicts, interactive figures and tables, and static figures."""
