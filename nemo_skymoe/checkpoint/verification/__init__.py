"""A written checkpoint is checked against its sources by a second path.

What reads and compares tensors here (`bits`, `comparison`, `recomputed` and the two `*_tensors`) imports nothing that reads,
maps or computes tensors for writing: files are read as their libraries document it, and every formula is written a second
time, so that a mistake in the first path does not repeat itself here.
"""
