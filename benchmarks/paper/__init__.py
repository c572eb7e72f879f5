"""The report's figures at a size that two CPU cores answer: `python -m benchmarks.paper.figure3 --budget full`."""
