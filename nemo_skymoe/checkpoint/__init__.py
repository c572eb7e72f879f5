"""Checkpoints are converted between formats, upcycled to mixtures of experts, and verified.

Each format is a room that knows no other: `hugging_face` and `torch_dist`. The files beside the rooms are what formats share:
tensors by meaning, tables of names, targets, jobs. `untrusted` reads files that nobody vouches for, `upcycling` computes
experts, `formats`, `sources`, `convert` and `inspection` join the rooms, and `verification` checks the result by a second path.
"""
