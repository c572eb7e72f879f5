"""Skywork-MoE (arXiv 2406.06563) for NVIDIA NeMo and Megatron-Core.

Importing this package imports neither torch nor NeMo; the subpackages that need them do.
"""

__version__ = "0.1.0"
