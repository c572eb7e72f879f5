"""The GPUs of this machine, asked about without a call after which no forked process could use them, or hidden."""

import os
import subprocess
import sys
from importlib.util import find_spec

VISIBLE = "CUDA_VISIBLE_DEVICES"
# The driver honours CUDA_VISIBLE_DEVICES as torch does, and answers without torch's import.
# A process that has spoken to it can fork no rank that uses a GPU, hence a process of its own.
_LIST = """
import ctypes
driver = ctypes.CDLL("libcuda.so.1")
count, device, name = ctypes.c_int(), ctypes.c_int(), ctypes.create_string_buffer(256)
if driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0:
    for index in range(count.value):
        driver.cuDeviceGet(ctypes.byref(device), index)
        driver.cuDeviceGetName(name, 256, device)
        print(name.value.decode())
"""


def visible() -> list[str]:
    """Return the names of the GPUs that this process, and those that it starts, may use."""
    if os.environ.get(VISIBLE) == "":
        return []
    try:
        asked = subprocess.run([sys.executable, "-c", _LIST], capture_output=True, text=True, timeout=60.0)
    except subprocess.TimeoutExpired:
        return []
    return asked.stdout.splitlines()


def hide() -> list[str]:
    """Hide all GPUs from this process and from those that it starts, and return the names of those that were visible.

    torch must not have counted GPUs in this process before.
    """
    found = visible()
    os.environ[VISIBLE] = ""
    return found


def in_use() -> bool:
    """Say whether torch may use a GPU in this process. Until this is called nothing asks the driver."""
    import torch

    return torch.cuda.is_available()


def absent() -> bool:
    """Say whether torch has no GPU to use in this process."""
    return not in_use()


def softmax_kernels() -> bool:
    """Say whether Megatron's own attention can fuse scale, mask and softmax, by kernels that Apex brings."""
    return in_use() and find_spec("scaled_masked_softmax_cuda") is not None


def device() -> str:
    """Return torch's name of the device that this process computes on, "cuda" or "cpu"."""
    return "cuda" if in_use() else "cpu"


def backend() -> str:
    """Return the backend of this rank's process groups, "nccl" or "gloo". A rank on GPUs takes the one of its number."""
    if not in_use():
        return "gloo"
    import torch

    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    return "nccl"
