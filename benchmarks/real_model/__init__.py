"""A published model, measured from its file of weights to a trained and exported MoE: `python -m benchmarks.real_model`."""
