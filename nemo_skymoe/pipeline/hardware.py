"""Peak rates of GPUs and their links, as their vendor states them."""

from dataclasses import dataclass

from nemo_skymoe.config import ConfigurationError


@dataclass(frozen=True)
class Hardware:
    """One GPU of a cluster. Rates are peaks, of which a training reaches the shares in `efficiency.Efficiency`."""

    name: str
    peak_flops: float
    """Dense bf16 matrix FLOP/s (without sparsity)."""
    memory: float
    """Bytes, in the vendor's decimal gigabytes."""
    memory_bandwidth: float
    """Bytes/s to and from the GPU's own memory."""
    nvlink: float
    """Bytes/s from a GPU to the others of its node, one direction."""
    network: float
    """Bytes/s from a GPU to other nodes, one direction: its share of the node's adapters."""
    gpus_per_node: int = 8


A800_80G = Hardware("A800-80G", 312e12, 80e9, 2039e9, nvlink=200e9, network=12.5e9)
"""An A100-80G with 400 GB/s of NVLink (both directions), and 800 Gb/s of RoCE per node, as in appendix B.3 and in
section 3.5 of arXiv 2310.19341."""
A100_80G = Hardware("A100-80G", 312e12, 80e9, 2039e9, nvlink=300e9, network=25e9)
"""NVIDIA A100 80GB SXM datasheet; a DGX A100 has eight 200 Gb/s adapters per node."""
H100 = Hardware("H100", 989.4e12, 80e9, 3350e9, nvlink=450e9, network=50e9)
"""NVIDIA H100 SXM5 datasheet (half of its figure with sparsity); a DGX H100 has eight 400 Gb/s adapters per node."""
H200 = Hardware("H200", 989.4e12, 141e9, 4800e9, nvlink=450e9, network=50e9)
"""NVIDIA H200 SXM datasheet (half of its figure with sparsity); a DGX H200 has eight 400 Gb/s adapters per node."""

PRESETS = {gpu.name: gpu for gpu in (A800_80G, A100_80G, H100, H200)}


def hardware_preset(name: str) -> Hardware:
    """Return the preset of this name, in small or capital letters.

    Raises:
        ConfigurationError: There is no such preset.
    """
    for known, preset in PRESETS.items():
        if known.lower() == name.lower():
            return preset
    raise ConfigurationError(f"hardware is {name!r}, expected one of {', '.join(PRESETS)}")
