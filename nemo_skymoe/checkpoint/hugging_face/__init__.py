"""Checkpoints in Hugging Face's form: their tensors by name, their config.json, and the files beside them."""
