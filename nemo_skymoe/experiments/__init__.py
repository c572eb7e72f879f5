"""The report's experiments in plain values, from which every front door makes its recipes.

One file holds one experiment: architecture, tokens, batch, learning rates and parallel sizes. A comment names the place of
every value in the report (arXiv 2406.06563) or in that of Skywork-13B (arXiv 2310.19341); `choices` has what both leave open.
"""
