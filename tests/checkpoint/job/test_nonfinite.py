"""The search for NaN and Inf, and memory that is used again."""

from pathlib import Path

import pytest
import torch

from nemo_skymoe.checkpoint.job.scanning import count_nonfinite, scan
from nemo_skymoe.checkpoint.tensors import buffers
from nemo_skymoe.checkpoint.tensors.regions import Extent, tensor_bytes
from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.durable import checksums
from tests.checkpoint.fakes import random_weights
from tests.checkpoint.simple_formats import TINY, write

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2)


@pytest.mark.parametrize("dtype", FLOATS)
def test_every_pattern_of_bits_is_judged_as_torch_does(dtype: torch.dtype):
    size = dtype.itemsize
    if size <= 2:
        bits = torch.arange(2 ** (8 * size), dtype=torch.int32)
        values = bits.to(torch.uint8 if size == 1 else torch.uint16).view(dtype)
    else:
        generator = torch.Generator().manual_seed(1)
        values = torch.randint(0, 256, (200_000 * size,), generator=generator).to(torch.uint8).view(dtype)
        values[:3] = torch.tensor([torch.inf, -torch.inf, torch.nan])
    expected = int((~torch.isfinite(values.double())).sum())
    assert expected > 1
    assert count_nonfinite(tensor_bytes(values), str(dtype).removeprefix("torch.")) == expected


def test_whole_numbers_are_never_nan():
    assert count_nonfinite(memoryview(b"\xff" * 80), "int64") == 0


def test_a_nan_is_found_wherever_blocks_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Also where a tensor does not begin at a multiple of its element's size."""
    monkeypatch.setattr(checksums, "BLOCK", 8)
    values = torch.ones(3, 20)
    values[0, 19] = values[2, 7] = torch.nan
    file = tmp_path / "file"
    file.write_bytes(b"x" * 13 + bytes(tensor_bytes(values)) + b"\xff" * 5)
    extents = [Extent(str(row), "float32", 13 + 80 * row, 93 + 80 * row) for row in range(3)]
    assert scan(file, extents, None, lambda _: None).nonfinite == {"0": 1, "2": 1}


def test_memory_is_used_again_only_when_no_tensor_needs_it():
    first = buffers.empty((1024, 1024), "bfloat16")
    place, part = first.data_ptr(), first[5:7]
    assert buffers.empty((1024, 1024), "bfloat16").data_ptr() != place
    del first
    assert buffers.empty((1024, 1024), "bfloat16").data_ptr() != place
    memory = tensor_bytes(part)
    del part
    assert buffers.empty((1024, 1024), "bfloat16").data_ptr() != place
    del memory
    assert place in {
        tensor.data_ptr() for tensor in [buffers.empty((1024, 1024), "bfloat16") for _ in range(3)]
    }


def test_memory_that_is_kept_is_bounded():
    tensors = [buffers.empty((size << 20,), "uint8") for size in (100, 101, 102, 103, 104, 105, 300)]
    del tensors
    assert sum(map(len, buffers._pieces)) <= 512 << 20


class Failing:
    """Weights that cannot be read."""

    def __init__(self, weights, error: Exception):
        self.weights, self.error, self.architecture = weights, error, weights.architecture

    def keys(self):
        return self.weights.keys()

    def info(self, key):
        return self.weights.info(key)

    def read(self, key):
        raise self.error


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("error", [ConfigurationError("'x' is damaged"), ZeroDivisionError("division")])
def test_an_error_while_writing_reaches_the_caller(workers: int, error: Exception, tmp_path: Path):
    expected = type(error) if workers == 1 or isinstance(error, ConfigurationError) else RuntimeError
    with pytest.raises(expected, match=str(error)):
        write("torch_dist", Failing(random_weights(TINY), error), tmp_path / "out", workers=workers)
    assert not (tmp_path / "out").exists()
