"""Figures and an HTML page from the logs of a run."""
