"""All figures, in the order in which they need each other's runs."""

from benchmarks.paper import defaults, figure1, figure2, figure3, figure4, figure7, figure8

FIGURES = tuple(module.FIGURE for module in (figure1, figure2, figure3, figure4, figure7, figure8, defaults))
