"""Contexts, warm starts and data that name what they may not: refused by a sentence before NeMo touches them."""

import contextlib
import inspect
import json
import pickle
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from nemo.collections.llm.gpt.data.packed_sequence import PackedSequenceSpecs
from nemo.lightning import AutoResume
from nemo.lightning.pytorch.strategies.utils import RestoreConfig
from nemo.utils.app_state import AppState

from nemo_skymoe.checkpoint.untrusted.context_check import check_context
from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.nemo import checks
from nemo_skymoe.nemo.index_check import check_data_module, check_indices
from tests.checkpoint import hostile
from tests.checkpoint.hostile import configured, context, leaf, metadata, names, node, reference

TOKENIZERS = "nemo.collections.common.tokenizers"
AUTO = f"{TOKENIZERS}.huggingface.auto_tokenizer.AutoTokenizer"
TABULAR = f"{TOKENIZERS}.tabular_tokenizer.TabularTokenizer"
OPTIMIZER = "megatron.core.optimizer.optimizer_config.OptimizerConfig"
CALLBACK = "nemo.lightning.pytorch.callbacks.preemption.PreemptionCallback"
REMOTE = "trust_remote_code"


def tokenizer_with_code(folder: Path, marker: Path) -> Path:
    """A tokenizer of Hugging Face's whose class is in a module beside it."""
    folder.mkdir()
    auto_map = {"AutoTokenizer": ["code.Made", None]}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Made", "auto_map": auto_map})
    )
    (folder / "code.py").write_text(hostile.code(marker))
    return folder


def lying(tokenizer: Path, argument_names: Any, value: Any = None) -> dict[str, Any]:
    """A tokenizer of which the texts of paths say other arguments than the metadata."""
    values = [leaf(str(tokenizer)), leaf(True) if value is None else value]
    texts = ["Attr(name='pretrained_model_name')", "Attr(name='use_fast')"]
    return node(hostile.CONFIG, values, metadata(AUTO, argument_names), texts)


def contexts_that_run_code(folder: Path, marker: Path) -> dict[str, tuple[bytes, str]]:
    """Contexts that make the marker when they are loaded, and what of them the refusal names."""
    tokenizer = tokenizer_with_code(folder / "tokenizer", marker)
    (folder / "evil").write_bytes(hostile.payload(marker))
    arguments = ["pretrained_model_name", REMOTE]
    call = configured("subprocess.call", {"args": node("builtins.list", ["touch", str(marker)], None)})
    artifact = node(CALLBACK, [leaf("evil")], None)
    plain = {"paths": ["<root>.a"]}
    ref: Callable[[str], dict[str, str]] = lambda key: {"type": "ref", "key": key}  # noqa: E731
    return {
        "an argument by another name": (context(lying(tokenizer, names(arguments))), REMOTE),
        "names in another object": (
            context(lying(tokenizer, ref("names")), names=names(arguments) | plain), REMOTE,
        ),
        "names in a list": (context(lying(tokenizer, node("builtins.list", arguments, None))), REMOTE),
        "names in JSON's own list": (context(lying(tokenizer, arguments)), REMOTE),
        "names in leaves": (context(lying(tokenizer, names([leaf(name) for name in arguments]))), REMOTE),
        "the whole metadata in another object": (
            context(
                node(hostile.CONFIG, [leaf(str(tokenizer)), leaf(True)], ref("metadata")),
                metadata=metadata(AUTO, names(arguments)) | plain,
            ),
            REMOTE,
        ),
        "a value that is an object": (
            context(lying(tokenizer, names(arguments), node("builtins.list", [1], None))), REMOTE,
        ),
        "values in another object": (
            context(
                lying(tokenizer, names(arguments)) | {"items": ref("items")},
                items=node(
                    "builtins.list",
                    [names(["", leaf(str(tokenizer))]), names(["", leaf(True)])],
                    None,
                ) | plain,
            ),
            "a list of its values",
        ),
        "a tokenizer that unpickles": (context(configured(TABULAR, {"coder": str(folder / "evil")})), TABULAR),
        "a call in place": (context(configured(OPTIMIZER, {"lr": call})), "subprocess.call"),
        "a call in place in a list": (
            context(configured(OPTIMIZER, {"lr": node("builtins.list", [call], None)})), "subprocess.call",
        ),
        "a pickle in place": (context(configured(OPTIMIZER, {"lr": artifact})), "posix.system"),
        "a pickle by a reference": (
            context(configured(OPTIMIZER, {"lr": ref("artifact")}), artifact=artifact | plain), "posix.system",
        ),
        "a pickle by JSON's own text": (
            context(configured(OPTIMIZER, {"lr": node(CALLBACK, ["evil"], None)})), "posix.system",
        ),
        "a named tuple of another class": (
            context(node(hostile.METADATA, [str(folder / "evil")], reference(TABULAR))), TABULAR,
        ),
    }  # fmt: skip


def test_contexts_are_read_as_fiddle_reads_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nemo.lightning.io import mixin
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    # As NeMo 2.5 does it; 2.7 leaves out what is of neither NeMo, Megatron nor torch.
    monkeypatch.setattr(mixin, "_safe_pickle_load", pickle.load, raising=False)
    load, marker = inspect.unwrap(mixin.load), tmp_path / "marker"
    for case, (content, named) in contexts_that_run_code(tmp_path, marker).items():
        (tmp_path / "io.json").write_bytes(content)
        with pytest.raises(ConfigurationError, match=f"'{tmp_path}/.*{named}") as refusal:
            check_context(tmp_path)
        assert "\n" not in str(refusal.value) and not marker.exists(), case
        with contextlib.suppress(Exception):
            load(tmp_path)
        assert marker.exists(), f"{case} is not hostile"
        marker.unlink()
        for module in [name for name in sys.modules if name.startswith("transformers_modules")]:
            del sys.modules[module]


def test_what_may_not_be_built_may_be_referred_to(tmp_path: Path) -> None:
    datasets, data = "megatron.core.datasets", "nemo.collections.llm.gpt.data"
    module = f"{data}.pre_training.PreTrainingDataModule"
    refused = {
        f"{datasets}.gpt_dataset.GPTDataset": {"index_split": 1},
        f"{datasets}.indexed_dataset.IndexedDatasetBuilder": {"bin_path": "a"},
        f"{data}.core.GPTSFTDataset": {"file_path": "a"},
        f"{data}.hf_dataset.HFDatasetDataModule": {"path_or_dataset": "a"},
        "megatron.core.transformer.spec_utils.ModuleSpec": {"module": "a"},
        "megatron.core.models.huggingface.module.AutoHuggingFaceModel": {"config": 1},
        "nemo.lightning.io.mixin.load": {"path": "a"},
        "nemo.lightning.pytorch.trainer.torch.load": {"f": "a"},
    }
    for name, arguments in refused.items():
        (tmp_path / "io.json").write_bytes(context(configured(name, arguments)))
        with pytest.raises(ConfigurationError, match=f"names '.*{name.rpartition('.')[2]}'"):
            check_context(tmp_path)
    allowed = {
        "a data set's class": configured(
            module, {"dataset_cls": reference(f"{datasets}.gpt_dataset.GPTDataset")}
        ),
        "no remote code": configured(AUTO, {"pretrained_model_name": "a", REMOTE: False}),
        "no remote code by another path": lying(
            tmp_path, names(["pretrained_model_name", REMOTE]), leaf(None)
        ),
        "an enumeration": configured(
            "nemo_skymoe.nemo.model.SkyworkMoEConfig",
            {
                "attention_backend": {
                    **reference("megatron.core.transformer.enums.a"),
                    "name": "AttnBackend.auto",
                }
            },
        ),
        "a path": configured(
            OPTIMIZER, {"lr": node(hostile.CONFIG, [leaf("a")], metadata("pathlib.Path", names([0])))}
        ),
    }
    for root in allowed.values():
        (tmp_path / "io.json").write_bytes(context(root))
        check_context(tmp_path)


def written(prefix: Path) -> Path:
    """A data set of three documents by Megatron's own builder; the index."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for length in (3, 1, 2):
        builder.add_document(torch.arange(length), [length])
    builder.finalize(f"{prefix}.idx")
    return prefix.with_suffix(".idx")


def test_damaged_indices_end_in_a_sentence(tmp_path: Path) -> None:
    index = written(tmp_path / "data")
    check_indices(tmp_path)
    good = index.read_bytes()
    changed = {
        "a magic": (0, b"X"),
        "a version": (9, struct.pack("<Q", 2)),
        "a data type of nothing": (17, b"\x63"),
        "a data type that is wider": (17, b"\x05"),
        "sequences": (18, struct.pack("<Q", 1 << 60)),
        "sequences that overflow": (18, struct.pack("<Q", (1 << 64) - 1)),
        "documents": (26, struct.pack("<Q", 5)),
        "no documents": (26, struct.pack("<Q", 0)),
        "a negative length": (34, struct.pack("<i", -1)),
        "a long one": (38, struct.pack("<i", 4)),
        "a place outside": (46, struct.pack("<q", 1 << 62)),
        "a place before": (54, struct.pack("<q", -8)),
        "the end of the documents": (len(good) - 8, struct.pack("<q", 2)),
        "a document outside": (len(good) - 16, struct.pack("<q", 9)),
        "documents that turn back": (len(good) - 24, struct.pack("<q", 3)),
    }
    contents = {name: good[:start] + new + good[start + len(new) :] for name, (start, new) in changed.items()}
    contents |= {"truncated": good[:-1], "only a header": good[:34], "empty": b"", "longer": good + b"\0" * 8}
    for case, content in contents.items():
        index.write_bytes(content)
        with pytest.raises(ConfigurationError, match=f"'{index}' is no index of Megatron's") as refusal:
            check_indices(tmp_path)
        assert "\n" not in str(refusal.value), case
    index.with_suffix(".bin").unlink()  # git's packs have such names, too
    check_indices(tmp_path)


def test_caches_behind_a_linked_folder_are_walked(tmp_path: Path) -> None:
    marker, elsewhere, data = tmp_path / "marker", tmp_path / "elsewhere", tmp_path / "data"
    elsewhere.mkdir()
    data.mkdir()
    (data / "cache").symlink_to(elsewhere)
    (data / "round").symlink_to(data)
    check_indices(data)
    for name in ("a.npy", "b.idx.info"):
        (elsewhere / name).write_bytes(hostile.payload(marker))
        with pytest.raises(ConfigurationError, match=f"'{data}/cache/{name}'"):
            check_indices(data)
        (elsewhere / name).unlink()
    assert not marker.exists()


def test_caches_of_data_are_walked(tmp_path: Path) -> None:
    marker, index = tmp_path / "marker", written(tmp_path / "data")
    header = b"\x93NUMPY\x01\x00\x76\x00{'descr': '%s', 'fortran_order': False, 'shape': (%s,), }"
    objects = (header % (b"|O", b"1")).ljust(127) + b"\n"
    hostile_files = {
        "cache/a.npy": hostile.payload(marker),
        "cache/b.npy": objects + hostile.payload(marker),
        "c.jsonl.idx.info": hostile.payload(marker),
    }
    damaged = {
        "large.npy": (header % (b"<i8", b"1" + b"0" * 30)).ljust(127) + b"\n",
        "text.npy": header[:8] + b"\x10\x00" + b"{'descr': " * 2,
        "archive.npy": b"PK\x03\x04",
        "empty.npy": b"",
        "info.idx.info": b"\x80",
    }
    packed = np.array([{"input_ids": [1, 2], "loss_mask": np.ones(2)}], dtype=object)
    np.save(tmp_path / "packed.npy", packed, allow_pickle=True)
    np.save(tmp_path / "numbers.npy", np.arange(3))
    for data in (
        SimpleNamespace(paths={"train": ["1.0", str(index.with_suffix(""))]}),
        SimpleNamespace(root=tmp_path),
    ):
        check_data_module(data)
        for name, content in (hostile_files | damaged).items():
            file = tmp_path / name
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(content)
            if name in hostile_files:
                with contextlib.suppress(Exception):
                    pickle.loads(content) if name.endswith("info") else np.load(file, allow_pickle=True)
                assert marker.exists(), f"{name} is not hostile"
                marker.unlink()
            with pytest.raises(ConfigurationError, match=f"'{file}' ") as refusal:
                check_data_module(data)
            assert "\n" not in str(refusal.value) and not marker.exists(), name
            file.unlink()
    spec = PackedSequenceSpecs(packed_sequence_size=8, packed_train_data_path=str(tmp_path / "packed.npy"))
    check_data_module(SimpleNamespace(packed_sequence_specs=spec))
    (tmp_path / "evil.npy").write_bytes(hostile.payload(marker))
    with pytest.raises(ConfigurationError, match=r"evil.npy' is no array"):
        check_data_module(SimpleNamespace(packed_sequence_specs=spec))


def test_every_way_to_begin_from_a_checkpoint_is_walked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a run begins from: nothing of it is handed to NeMo before it is checked."""
    marker, run = tmp_path / "marker", tmp_path / "run"
    monkeypatch.setattr(AppState(), "log_dir", str(run))
    places = {
        "weights/common.pt": hostile.archived(hostile.payload(marker)),
        "weights/.metadata": hostile.payload(marker),
        "context/io.json": context(configured("subprocess.call", {"args": 1})),
        "weights/modelopt_state/state.pt": hostile.payload(marker),
    }
    for number, (name, content) in enumerate(places.items()):
        start, last = tmp_path / f"start{number}", run / f"checkpoints/{number}-last"
        adapters = tmp_path / f"adapters{number}"
        for folder in (start, last):
            (folder / name).parent.mkdir(parents=True)
            (folder / name).write_bytes(content)
        (adapters / "weights").mkdir(parents=True)
        (adapters / "weights/adapter_metadata.json").write_text(json.dumps({"model_ckpt_path": str(start)}))
        ways = {
            "a warm start": AutoResume(restore_config=RestoreConfig(path=str(start))),
            "a run that goes on": AutoResume(resume_if_exists=True),
            "a folder to go on from": AutoResume(
                resume_from_directory=str(run / "checkpoints"), resume_if_exists=True
            ),
            "a checkpoint to go on from": AutoResume(resume_from_path=str(start)),
            "adapters of a base model": AutoResume(resume_from_path=str(adapters)),
        }
        for way, resume in ways.items():
            trainer = SimpleNamespace(strategy=SimpleNamespace(), checkpoint_callback=SimpleNamespace())
            checks.check_what_is_unpickled(resume, trainer, None)
            with pytest.raises(ConfigurationError, match=Path(name).name):
                resume.setup(trainer, None)
            assert not vars(trainer.strategy) and not hasattr(trainer, "ckpt_path"), (way, name)
        strategy = SimpleNamespace(restore_config=RestoreConfig(path=str(start)))
        with pytest.raises(ConfigurationError, match=Path(name).name):
            checks.check_what_is_unpickled(None, SimpleNamespace(strategy=strategy), None)
        assert not marker.exists(), name
        shutil.rmtree(last)
