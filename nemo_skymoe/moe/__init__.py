"""The MoE layer of Skywork-MoE for Megatron-Core: needs torch and megatron.core, nothing else."""
