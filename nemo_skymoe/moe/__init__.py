"""The MoE layer of Skywork-MoE for Megatron-Core. It needs torch and megatron.core, and nothing else."""

EXPERT_PARAMETERS = ".mlp.experts."
"""Part of the name of every parameter of a routed expert, and of no other."""
