"""What each cure of Bridge cures: the failure without it, in a fork that has all the others."""

import importlib
import importlib.util
import logging
import multiprocessing
import sys
from typing import Any

import pytest
from megatron.bridge.peft import lora_layers
from megatron.bridge.training import initialize, setup
from megatron.bridge.training import pretrain as bridge_pretrain
from megatron.bridge.training.gpt_step import forward_step
from megatron.core.dist_checkpointing.strategies import async_utils

import nemo_skymoe.bridge  # noqa: F401  (before Bridge is imported)
from nemo_skymoe.moe.layer import have_transformer_engine
from nemo_skymoe.patches import (
    bridge_compiled_helpers,
    bridge_cpu,
    bridge_warnings,
    bridge_without_te,
    chained_optimizers,
    cpu_runtime,
)
from nemo_skymoe.patches.targets import MissingTarget
from nemo_skymoe.ranks import RankFailed, run_ranks
from tests.bridge.tiny import tiny_config
from tests.cases import every

ADAPTERS = "megatron.bridge.peft.lora_layers"
HELPERS = "bridge_compiled_helpers"


def adapters(cured: bool) -> dict[str, Any]:
    """Import the module of the adapters again, as the first import did or as upstream has it."""
    if not cured:
        sys.meta_path[:] = [
            one for one in sys.meta_path if type(one).__module__ != bridge_without_te.__name__
        ]
    del sys.modules[ADAPTERS]
    module = importlib.import_module(ADAPTERS)
    return {
        "found": importlib.util.find_spec("transformer_engine") is not None,
        "loaded": [name for name in sys.modules if name.partition(".")[0] == "transformer_engine"],
        "stand-in": sorted(vars(module.te)) + sorted(vars(module.te.ops)),
        "nothing is one": isinstance(module, module.te.Linear),
    }


@pytest.mark.skipif(have_transformer_engine(), reason="Transformer Engine is installed: nothing to cure")
def test_bridge_is_imported_without_transformer_engine():
    with pytest.raises(RankFailed, match="No module named 'transformer_engine'"):
        run_ranks(adapters, 1, False)
    [seen] = run_ranks(adapters, 1, True)
    assert seen == {
        "found": False,
        "loaded": [],
        "stand-in": ["LayerNormLinear", "Linear", "ops", "Sequential"],
        "nothing is one": False,
    }
    # The stand-in is in that module's own imports, and nowhere else.
    assert "transformer_engine" not in sys.modules
    assert lora_layers.__builtins__ is sys.modules["builtins"]  # type: ignore[attr-defined]
    assert not bridge_without_te.apply()


def start(without: str | None) -> None:
    """One step of Bridge's own pretraining, with every cure but one."""
    cpu_runtime.apply()
    for name, substitute in bridge_cpu.substitutions().items():
        if name != without:
            substitute()
    if without != HELPERS:
        bridge_compiled_helpers.apply()
    bridge_pretrain.pretrain(tiny_config(steps=1), forward_step)


@every(
    ("name", "message"),
    [
        ("bridge_cpu.initialization", "Megatron requires CUDA"),
        ("bridge_cpu.random_seed", "rng state model-parallel-rng is not added"),
        (HELPERS, "SystemExit: 1"),
    ],
)
def test_each_failure_is_cured(name: str, message: str):
    with pytest.raises(RankFailed, match=message):
        run_ranks(start, 1, name)


def test_all_of_them_are_enough():
    run_ranks(start, 1, None)


def worker(cured: bool) -> None:
    if cured:
        bridge_cpu.apply()
    else:
        cpu_runtime.apply()
    queues = [multiprocessing.JoinableQueue() for _ in range(3)]
    queues[0].put("DONE")
    async_utils.PersistentAsyncCaller.async_loop(0, *queues)


def test_the_process_that_saves_in_the_background_lives():
    with pytest.raises(RankFailed, match="ZeroDivisionError"):
        run_ranks(worker, 1, False)
    run_ranks(worker, 1, True)


def test_every_substitution_has_its_failure_here():
    names = ("initialization", "random_seed", "async_worker")
    assert {*bridge_cpu.substitutions()} == {f"bridge_cpu.{name}" for name in names}


@every(
    ("module", "name", "cure"),
    [
        (initialize, "_set_random_seed", bridge_cpu.random_seed),
        (async_utils.PersistentAsyncCaller, "async_loop", bridge_cpu.async_worker),
        (initialize, "compile_helpers", bridge_compiled_helpers.apply),
        (setup, "setup_logging", bridge_warnings.apply),
    ],
)
def test_a_missing_target_is_an_error(module: Any, name: str, cure: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr(module, name)
    with pytest.raises((MissingTarget, AttributeError), match=name):
        cure()


def warned(cured: bool) -> list[str]:
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    ours, theirs = (
        logging.getLogger("nemo_skymoe.moe.controller"),
        logging.getLogger("megatron.core.optimizer"),
    )
    for logger in (ours, theirs):
        logger.addHandler(handler)
    if cured:
        assert bridge_warnings.apply() and not bridge_warnings.apply()
    setup.setup_logging(filter_warning=True)
    for logger in (ours, theirs):
        logger.warning(f"from {logger.name}")
    return said


def test_our_warnings_are_heard():
    assert run_ranks(warned, 1, False) == [[]]
    assert run_ranks(warned, 1, True) == [["from nemo_skymoe.moe.controller"]]


def test_states_of_other_forms_are_left_alone():
    """Those that a chain of the same length has saved, those of other optimizers, and lists."""
    same = {0: {"param_state": 1, "optimizer": {"param_groups": []}}, 1: {"param_state": 2, "optimizer": {}}}
    for state, count in ((same, 2), ([1, 2], 2), ({"optimizer": {}, "param_state": 1}, 1), ({}, 2)):
        assert chained_optimizers.for_optimizers(state, count) is state
