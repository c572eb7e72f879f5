"""An archive of ours is torch.save's, byte for byte but for an identifier that torch derives from the checksums."""

import io
import zipfile

import pytest
import torch

from nemo_skymoe.checkpoint.torch_dist import archive as module
from nemo_skymoe.checkpoint.torch_dist.archive import archive


def whole(tensor: torch.Tensor) -> bytes:
    before, memory, after = archive(tensor)
    return bytes(before) + bytes(memory) + bytes(after)


def contents(data: bytes) -> dict[str, bytes]:
    """Of a zip file, by name; `zipfile` compares every checksum."""
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        return {info.filename: file.read(info) for info in file.infolist()}


@pytest.mark.parametrize("shape", [(), (0,), (1, 1, 3, 5), (1000, 1000)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float8_e4m3fn], ids=str)
def test_the_archive_is_torch_s(shape: tuple[int, ...], dtype: torch.dtype):
    tensor = torch.randn(shape).to(dtype)
    buffer = io.BytesIO()
    torch.save(tensor, buffer)
    ours, theirs = contents(whole(tensor)), contents(buffer.getvalue())
    for each in (ours, theirs):
        del each["archive/.data/serialization_id"]
    assert ours == theirs
    loaded = torch.load(io.BytesIO(whole(tensor)), weights_only=True)
    assert loaded.dtype == dtype and torch.equal(loaded.float(), tensor.float())


def test_torch_takes_the_checksums_of_what_is_too_large_for_plain_zip(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "_LARGE", 1000)
    tensor, buffer = torch.randn(1000), io.BytesIO()
    torch.save(tensor, buffer)
    assert whole(tensor) == buffer.getvalue()


def test_torch_s_own_archives_keep_their_checksums():
    archive(torch.ones(3))
    buffer = io.BytesIO()
    torch.save(torch.ones(3), buffer)
    assert contents(buffer.getvalue())
