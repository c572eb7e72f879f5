"""The MoE layer of Skywork-MoE for Megatron-Core. It needs torch and megatron.core, and nothing else."""
