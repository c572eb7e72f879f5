"""Every way on which NeMo loads a context walks it first, and what lies beside the weights."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nemo_skymoe.checkpoint.torch_dist.pickle_check import check_loaded
from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.patches import checked_context
from tests.checkpoint import hostile


@pytest.fixture
def unpatched(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """NeMo's modules as they come; its own `load`."""
    from nemo.lightning import io
    from nemo.lightning.io import api, mixin

    load = inspect.unwrap(mixin.load)
    for module in (io, api, mixin):
        monkeypatch.setattr(module, "load", load)
    return load


def write(folder: Path, context: bytes, common: bytes) -> None:
    for name, content in {"context/io.json": context, "weights/common.pt": common}.items():
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_bytes(content)


def test_every_way_to_a_context_is_checked(tmp_path: Path, unpatched: Callable[..., Any]) -> None:
    from nemo.collections import llm
    from nemo.collections.llm.inference import setup_model_and_tokenizer
    from nemo.lightning import io
    from nemo.lightning.io import api, mixin
    from nemo.lightning.resume import _try_restore_tokenizer

    marker, good, bad, beside = (tmp_path / name for name in ("marker", "good", "bad", "beside"))
    (tmp_path / "evil").write_bytes(hostile.payload(marker))
    tabular = "nemo.collections.common.tokenizers.tabular_tokenizer.TabularTokenizer"
    optimizer = "megatron.core.optimizer.optimizer_config.OptimizerConfig"
    harmless = hostile.context(hostile.configured(optimizer, {"lr": 0.5}))
    harmful = hostile.context(hostile.configured(tabular, {"coder": str(tmp_path / "evil")}))
    write(good, harmless, hostile.archived(b"}."))
    write(bad, harmful, hostile.archived(b"}."))
    write(beside, harmless, hostile.archived(hostile.payload(marker)))
    with pytest.raises(Exception):  # noqa: B017 - the pickle is no tokenizer's
        io.load_context(bad)
    assert marker.exists(), "not hostile"
    marker.unlink()

    assert checked_context.apply(check_loaded) and not checked_context.apply(check_loaded)
    assert io.load_context(good).lr == io.load(good / "context").lr == 0.5
    ways: dict[str, Callable[[Path], Any]] = {
        "load_context": io.load_context,
        "load_context of the context": lambda folder: io.load_context(folder / "context", subpath="model"),
        "load": lambda folder: io.load(folder / "context"),
        "load of the file": lambda folder: api.load(folder / "context/io.json"),
        "its module's load": lambda folder: mixin.load(folder / "context"),
        "a connector": lambda folder: io.ModelConnector(folder).nemo_load(folder),
        "export": lambda folder: llm.export_ckpt(folder, "hf", output_path=tmp_path / "exported"),
        "generation and evaluation": lambda folder: setup_model_and_tokenizer(folder, None),
    }
    for way, load in ways.items():
        for folder, refusal in ((bad, "names '.*TabularTokenizer'"), (beside, "refers to 'posix.system'")):
            with pytest.raises(ConfigurationError, match=refusal):
                load(folder)
            assert not marker.exists(), (way, folder)
    model: Any = object()  # NeMo turns the refusal into a warning here, and goes on without the tokenizer
    assert _try_restore_tokenizer(model, bad / "context") is model and not marker.exists()
