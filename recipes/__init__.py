"""The factories of NeMo-Run recipes."""
