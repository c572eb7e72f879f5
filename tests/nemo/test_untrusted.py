"""Contexts, warm starts and data that name what they may not: refused by a sentence before NeMo touches them."""

import contextlib
import inspect
import json
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hostile
import pytest
from hostile import configured, context, leaf, metadata, names, node, reference

from nemo_skymoe.checkpoint.context_check import check_context
from nemo_skymoe.config import ConfigurationError

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
