"""Tensors by what they mean in a model, and how a format stores them: what every format shares."""
