"""Upcycling and conversion of checkpoints.

Every format shares `tensors/`. `hugging_face/` and `torch_dist/` are the formats, and do not know each other. `upcycling/`
computes an MoE while a dense model is read, `job/` writes what may be killed at any byte, `verification/` checks it by a second
path, and `untrusted/` looks at files before others load them. The files beside the rooms describe a model apart from its
tensors, and put the rooms together.
"""
