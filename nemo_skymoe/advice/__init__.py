"""Advice whether to upcycle a dense checkpoint or to train from scratch, by section 3 of arXiv 2406.06563."""
