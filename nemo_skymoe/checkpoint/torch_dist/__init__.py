"""Megatron's `torch_dist` checkpoints, those of NeMo 2 and of Megatron-LM."""
