"""Checkpoints that name what they may not: refused by file and class, and nothing that they ask for happens."""

import contextlib
import io
import json
import os
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from nemo_skymoe.architecture import Architecture
from nemo_skymoe.checkpoint.torch_dist.pickle_check import check_checkpoint, check_torch_file, read_torch_file
from nemo_skymoe.checkpoint.untrusted.allowed_classes import VARIABLE
from nemo_skymoe.config import ConfigurationError
from tests.checkpoint import megatron_files
from tests.checkpoint.fakes import random_weights

DENSE = Architecture(num_layers=2, hidden_size=8, ffn_hidden_size=12, num_attention_heads=2, vocab_size=32)


class Calls:
    """Pickled as a call of `function`."""

    def __init__(self, function: Callable[..., Any], *arguments: Any):
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def hostile_pickles(marker: Path) -> dict[str, bytes]:
    """Pickles that make `marker` when they are read, by how they ask for it."""
    command = f"touch {marker}"
    by_protocol = {
        f"protocol {number}": pickle.dumps(Calls(os.system, command), protocol=number) for number in range(6)
    }
    text = command.encode()
    unicode = pickle.BINUNICODE + len(text).to_bytes(4, "little") + text
    name = b"\x8c\x05posix\x8c\x06system"
    return by_protocol | {
        "nested": pickle.dumps({"args": [({1: Calls(os.system, command)},)]}),
        "inst": b"(S'" + text + b"'\nios\nsystem\n.",
        "obj": b"(cos\nsystem\n" + unicode + b"o.",
        "stack_global": b"\x80\x04" + name + b"\x93" + unicode + b"\x85R.",
        "memo": b"\x80\x04" + name + b"\x93\x94" + b"0h\x00" + unicode + b"\x85R.",
        "put and get": b"cos\nsystem\np7\n0g7\n(S'" + text + b"'\ntR.",
        "build": b"\x80\x02cbuiltins\nset\n)\x81}X\x01\x00\x00\x00acos\nsystem\n" + unicode + b"\x85Rsb.",
        "getattr": pickle.dumps(Calls(getattr, Calls(__import__, "os"), "system")),
        "eval": pickle.dumps(Calls(eval, f"__import__('os').system('{command}')")),
        "after the end": pickle.dumps({}) + pickle.dumps(Calls(os.system, command)),
        "load": pickle.dumps(Calls(torch.load, io.BytesIO(pickle.dumps(Calls(os.system, command))))),
    }


def archived(pickled: bytes, **entries: bytes) -> bytes:
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        for name, content in entries.items():
            archive.writestr(name, content)
    return written.getvalue()


def saved(value: Any, **options: Any) -> bytes:
    written = io.BytesIO()
    torch.save(value, written, **options)
    return written.getvalue()


def test_no_pickle_is_run_in_whatever_form(tmp_path: Path) -> None:
    marker, file = tmp_path / "marker", tmp_path / "common.pt"
    for kind, pickled in hostile_pickles(marker).items():
        if kind != "after the end":  # read as far as the end
            with contextlib.suppress(Exception):
                pickle.loads(pickled)
            assert marker.exists() or kind in ("getattr", "load", "build"), f"{kind} is not hostile"
            marker.unlink(missing_ok=True)
        for form, data in (("plain", pickled), ("archive", archived(pickled))):
            if (kind, form) == ("after the end", "archive"):
                continue
            with pytest.raises(
                ConfigurationError, match=f"'{file}' (refers to|is damaged|is not what)"
            ) as refusal:
                check_torch_file(data, file)
            assert "\n" not in str(refusal.value), kind
            assert not marker.exists(), (kind, form)
    with pytest.raises(
        ConfigurationError, match=r"refers to 'posix.system'.*set SKYMOE_ALLOWED_CLASSES=posix.system"
    ):
        check_torch_file(hostile_pickles(marker)["protocol 2"], file)


def test_pickles_within_pickles_are_walked(tmp_path: Path) -> None:
    marker, file = tmp_path / "marker", tmp_path / "__0_0.distcp"
    hostile = pickle.dumps(Calls(os.system, f"touch {marker}"))
    as_bytes = torch.frombuffer(bytearray(hostile), dtype=torch.uint8)
    padded = torch.cat([torch.zeros(8, dtype=torch.uint8), as_bytes])
    from_bytes: Any = torch.storage._load_from_bytes  # type: ignore[attr-defined]  # or what Megatron put there
    cases = {
        "extra state": (saved([as_bytes]), True),
        "extra state that is a part of its storage": (saved([padded[8:]]), True),
        "in its old form": (saved([as_bytes], _use_new_zipfile_serialization=False), True),
        "among other state": (saved({"layer._extra_state": as_bytes}), False),
        "BytesIO": (saved([io.BytesIO(saved(Calls(os.system, f"touch {marker}")))]), False),
        "storage in its old form": (saved([Calls(from_bytes, hostile)]), False),
        "within one": (saved([Calls(from_bytes, saved([Calls(from_bytes, hostile)]))]), False),
    }
    for name, (data, extra_state) in cases.items():
        with pytest.raises(ConfigurationError, match=str(file)):
            check_torch_file(data, file, extra_state=extra_state)
        assert not marker.exists(), name
    harmless = {"fp8": torch.ones(2), "step": 3}
    check_torch_file(saved([torch.empty(0, dtype=torch.uint8)]), file, extra_state=True)
    for protocol in range(2, 5):
        state = torch.frombuffer(bytearray(pickle.dumps(harmless, protocol=protocol)), dtype=torch.uint8)
        check_torch_file(saved([state]), file, extra_state=True)
    check_torch_file(saved([io.BytesIO(saved(harmless))]), file, extra_state=True)


def dropped_calls(hostile: bytes) -> dict[str, bytes]:
    """Pickles that call torch's loader on `hostile` and keep nothing of what it returns."""
    content = pickle.BINBYTES + len(hostile).to_bytes(4, "little") + hostile
    call = b"ctorch.storage\n_load_from_bytes\n" + content + b"\x85R"
    key = b"X\x01\x00\x00\x00a"
    return {
        "popped": call + b"0N.",
        "popped with a mark": b"(" + call + b"1N.",
        "overwritten in the memo": call + b"p0\n0Np0\n0g0\n.",
        "replaced in a dictionary": b"}" + key + call + b"s" + key + b"Ns.",
        "an argument of a dropped call": b"cbuiltins\nlist\n" + call + b"\x85R0N.",
        "a replaced state": b"cargparse\nNamespace\n)R}" + key + call + b"sb}" + key + b"Nsb.",
    }


def unsafe_load(data: bytes) -> Any:
    """What torch calls `torch.storage._load_from_bytes`."""
    return torch.load(io.BytesIO(data), weights_only=False)


def test_calls_whose_results_are_dropped_are_walked(tmp_path: Path) -> None:
    marker, file = tmp_path / "marker", tmp_path / "common.pt"
    hostile = pickle.dumps(Calls(os.system, f"touch {marker}"))
    for kind, pickled in dropped_calls(hostile).items():
        data = archived(pickled, **{"archive/version": b"3\n"})
        # megatron-core from 0.17 on replaces torch's function by a safe one when it is imported.
        with contextlib.suppress(Exception), mock.patch("torch.storage._load_from_bytes", unsafe_load):
            torch.load(io.BytesIO(data), weights_only=False)
        assert marker.exists(), f"{kind} is not hostile"
        marker.unlink()
        with pytest.raises(ConfigurationError, match=f"'{file}' refers to 'posix.system'"):
            check_torch_file(data, file)
        assert not marker.exists(), kind
        harmless = saved([1], _use_new_zipfile_serialization=False)
        check_torch_file(archived(dropped_calls(harmless)[kind]), file)


def rewritten(original: bytes, /, **entries: Callable[[bytes], bytes]) -> bytes:
    """An archive of `torch.save` with some of its entries changed."""
    written = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(original)) as source, zipfile.ZipFile(written, "w") as archive:
        for entry in source.infolist():
            name = entry.filename.partition("/")[2].partition(".")[0].replace("/", "_")
            archive.writestr(entry.filename, entries.get(name, bytes)(source.read(entry)))
    return written.getvalue()


def test_extra_states_cannot_hide(tmp_path: Path) -> None:
    """Transformer Engine finds a tensor by its name and unpickles its bytes: both have to be those that are walked."""
    marker, file = tmp_path / "marker", tmp_path / "common.pt"
    hostile = pickle.dumps(Calls(os.system, f"touch {marker}  "))
    as_bytes = torch.frombuffer(bytearray(hostile), dtype=torch.uint8)
    plain = saved({"_extra_state": as_bytes})
    name = pickle.BINUNICODE + b"\x0c\0\0\0_extra_state"
    turned = torch.frombuffer(bytearray(hostile + b"." * (-len(hostile) % 4)), dtype=torch.int32)

    def moved(pickled: bytes) -> bytes:
        storage = pickled[pickled.index(b"((") + 1 : pickled.index(b"Q") + 1]
        return pickled[:-2] + b"(" + storage + b"K\x04K%c\x85K\x01\x85tbs." % len(hostile)

    cases = {
        "by its name": plain,
        "escaped": rewritten(plain, data=lambda text: text.replace(name, b"S'\\x5fextra_state'\n")),
        "in unicode": rewritten(plain, data=lambda text: text.replace(name, b"V\\u005fextra_state\n")),
        "by a call": rewritten(
            plain, data=lambda text: text.replace(name, b"c__builtin__\nstr\nS'\\x5fextra_state'\n\x85R")
        ),
        "turned round": rewritten(
            saved(
                {"_extra_state": turned.view(torch.uint8).view(-1, 4).flip(1).reshape(-1).view(torch.int32)}
            ),
            byteorder=lambda _: b"big",
        ),
        "by a state": rewritten(
            saved(
                {"_extra_state": torch.cat([torch.tensor(list(b"\x80\x02N."), dtype=torch.uint8), as_bytes])}
            ),
            data=moved,
        ),
    }
    for kind, data in cases.items():
        [found] = torch.load(io.BytesIO(data), weights_only=False).items()
        assert found[0] == "_extra_state", kind
        with contextlib.suppress(Exception):
            pickle.loads(found[1].numpy().tobytes())
        assert marker.exists(), f"{kind} is not hostile"
        marker.unlink()
        with pytest.raises(ConfigurationError, match=f"'{file}'"):
            check_torch_file(data, file)
        assert not marker.exists(), kind


def test_links_and_adapters_are_followed_and_end(tmp_path: Path) -> None:
    marker, elsewhere = tmp_path / "marker", tmp_path / "elsewhere"
    hostile = pickle.dumps(Calls(os.system, f"touch {marker}"))
    elsewhere.mkdir()
    for name in ("linked", "first", "second"):
        megatron_files.write(tmp_path / name, random_weights(DENSE), torch.float32)
    (tmp_path / "linked/weights/more").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(tmp_path / "linked")
    check_checkpoint(tmp_path / "linked")
    (elsewhere / "state.pt").write_bytes(archived(hostile))
    with pytest.raises(ConfigurationError, match=r"linked/weights/more/state.pt' refers to 'posix.system'"):
        check_checkpoint(tmp_path / "linked")
    for name, base in (("first", "second"), ("second", "first")):
        described = json.dumps({"model_ckpt_path": str(tmp_path / base)})
        (tmp_path / name / "weights/adapter_metadata.json").write_text(described)
    with pytest.raises(ConfigurationError, match="adapters whose base models lead in a circle"):
        check_checkpoint(tmp_path / "first")
    assert not marker.exists()


def test_archives_that_can_be_read_in_two_ways_are_refused(tmp_path: Path) -> None:
    marker, file = tmp_path / "marker", tmp_path / "common.pt"
    good, bad = pickle.dumps({}, protocol=2), pickle.dumps(Calls(os.system, f"touch {marker}"), protocol=2)
    twice = io.BytesIO()
    with pytest.warns(UserWarning), zipfile.ZipFile(twice, "w") as archive:
        archive.writestr("archive/data.pkl", bad)
        archive.writestr("archive/data.pkl", good)
    compressed = io.BytesIO()
    with zipfile.ZipFile(compressed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"0" * 1000 + good)
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as archive:
        entry = tarfile.TarInfo("pickle")
        entry.size = len(bad)
        archive.addfile(entry, io.BytesIO(bad))
    cases = {
        "a pickle before": bad + archived(good),
        "an archive before": archived(bad) + archived(good),
        "a comment": archived(good)[:-2] + len(bad).to_bytes(2, "little") + bad,
        "two of one name": twice.getvalue(),
        "names that differ in case": archived(good, **{"archive/DATA.pkl": bad}),
        "another pickle": archived(good, **{"archive/constants.pkl": bad}),
        "out of its folder": archived(good, **{"../../outside": b""}),
        "an absolute path": archived(good, **{"/etc/outside": b""}),
        "compressed": compressed.getvalue(),
        "tar": tar.getvalue(),
    }
    for name, data in cases.items():
        with pytest.raises(ConfigurationError, match=str(file)):
            check_torch_file(data, file)
        assert not marker.exists(), name


def test_what_the_frameworks_write_is_allowed(tmp_path: Path) -> None:
    from argparse import Namespace
    from collections import OrderedDict, defaultdict

    from megatron.core.enums import ModelType
    from megatron.core.rerun_state_machine import RerunMode, RerunState
    from megatron.core.transformer.enums import AttnBackend

    generator = np.random.RandomState(0)
    state = {
        "args": Namespace(
            lr=0.1, dtype=torch.bfloat16, backend=AttnBackend.auto, kind=ModelType.encoder_or_decoder
        ),
        "rng": [
            {"numpy": generator.get_state(), "torch": torch.get_rng_state(), "python": (3, (1, 2), None)}
        ],
        "optimizer": OrderedDict(param_groups=[defaultdict(list, lr=np.float64(0.5), step=torch.tensor(1))]),
        "rerun": {"mode": RerunMode.DISABLED, "state": RerunState.NOT_RUNNING_YET, "path": Path("a")},
        "size": torch.Size([1, 2]),
        "device": torch.device("cpu"),
        "parameter": torch.nn.Parameter(torch.zeros(2)),
        "strided": torch.zeros(4, 4).t(),
    }
    for protocol in range(2, 5):
        check_torch_file(saved(state, pickle_protocol=protocol), tmp_path / "common.pt")
    check_torch_file(saved(state, _use_new_zipfile_serialization=False), tmp_path / "common.pt")


def test_every_file_of_a_folder_is_walked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good, marker = tmp_path / "good", tmp_path / "marker"
    megatron_files.write(good, random_weights(DENSE), torch.float32)
    check_checkpoint(good)
    check_checkpoint(good / "weights")
    check_checkpoint(tmp_path / "nothing")
    hostile = pickle.dumps(Calls(os.system, f"touch {marker}"))
    call = {"type": "pyref", "module": "os", "name": "system"}
    for number, (name, content) in enumerate(
        {
            "weights/.metadata": hostile,
            "weights/common.pt": archived(hostile),
            "weights/modelopt_state/state.pth": hostile,
            "weights/layer/shard_0_1.pt": archived(hostile),
            "weights/metadata.json": json.dumps({"sharded_backend": "zarr"}).encode(),
            "weights/adapter_metadata.json": json.dumps({"model_ckpt_path": str(tmp_path / "base")}).encode(),
            "context/io.json": json.dumps(
                {"root": call, "objects": {"a": {"type": call, "items": [], "metadata": call}}}
            ).encode(),
        }.items()
    ):
        folder = tmp_path / str(number)
        megatron_files.write(folder, random_weights(DENSE), torch.float32)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
        if "adapter" in name:
            megatron_files.write(tmp_path / "base", random_weights(DENSE), torch.float32)
            (tmp_path / "base/weights/common.pt").write_bytes(hostile)
        with pytest.raises(
            ConfigurationError, match=Path(name).name if "adapter" not in name else "base/weights/common"
        ):
            check_checkpoint(folder)
        assert not marker.exists(), name
    (tmp_path / "vouched.pt").write_bytes(saved(hostile_class := Vouched()))
    with pytest.raises(ConfigurationError, match=r"refers to '.*Vouched'"):
        read_torch_file(tmp_path / "vouched.pt")
    monkeypatch.setenv(VARIABLE, f"a.b, {type(hostile_class).__module__}.Vouched")
    read_torch_file(tmp_path / "vouched.pt")


class Vouched:
    """A user's own."""
