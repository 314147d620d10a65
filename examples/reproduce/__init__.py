"""The papers' experiments run again: one driver each, with a log of finished runs, figures and a report."""
