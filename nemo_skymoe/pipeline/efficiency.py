"""The three constants of the cost and memory model that no datasheet gives. Two are fitted to one published run."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Efficiency:
    """The shares of `hardware.Hardware` that a training reaches. Everything else in the model is counted.

    The defaults of `compute` and `memory_overhead` are what `fit.fit_efficiency` finds; a test refits them.
    """

    compute: float = 0.6093
    """The share of the peak FLOP/s that matrix products and attention reach, with kernel launches included. It is
    fitted."""
    memory_overhead: float = 3.473e9
    """Bytes on every GPU that belong to no tensor: CUDA context, NCCL buffers, workspaces, fragmentation. They are
    fitted."""
    links: float = 0.8
    """The share of a link's line rate that NCCL delivers; packet headers take the rest. It is not fitted. NCCL's
    maintainer gives it for NVLink (NVIDIA/nccl#1054, NVIDIA/nccl-tests#149: 230-240 of the 300 GB/s of an A100). On
    eight 100 Gb/s RoCE adapters 600 Gb/s and more were measured (NVIDIA/nccl#495)."""
