"""NeMo-Run recipe factories."""
