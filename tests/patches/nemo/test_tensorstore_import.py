"""NeMo's asynchronous checkpoints where Megatron has no tensorstore strategy: refused without the patch, written with it.

megatron-core 0.16 is without; of an older one it is hidden. `make compat` runs this module with every pair.
"""

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from nemo.utils.callbacks import dist_ckpt_io

from nemo_skymoe.patches import cpu_runtime, tensorstore_import
from nemo_skymoe.ranks import RankFailed, run_ranks

MODULE = "nemo.utils.callbacks.dist_ckpt_io"
STRATEGY = "megatron.core.dist_checkpointing.strategies.tensorstore"


def write(path: Path) -> None:
    path.write_text("saved")


def hide(module: str) -> None:
    """As if it was not there, whether or not it is, and imported already."""
    package, _, name = module.rpartition(".")
    vars(importlib.import_module(package)).pop(name, None)
    sys.modules[module] = None  # type: ignore[assignment]


def save(path: Path, patched: bool) -> str:
    cpu_runtime.apply()
    torch.distributed.init_process_group("gloo")
    hide(STRATEGY)
    del sys.modules[MODULE]
    nemos: Any = importlib.import_module(MODULE)
    assert not patched or (tensorstore_import.apply() and not tensorstore_import.apply())

    class Writer(nemos.AsyncCompatibleCheckpointIO):
        def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> Any:
            return nemos.AsyncRequest(write, (path,), [])

        def load_checkpoint(self, path: Any, map_location: Any = None) -> Any: ...

        def remove_checkpoint(self, path: Any) -> None: ...

    asynchronous = nemos.AsyncFinalizableCheckpointIO(Writer())
    asynchronous.save_checkpoint({}, path)
    asynchronous.maybe_finalize_save_checkpoint(blocking=True)
    return path.read_text()


def test_an_asynchronous_save(tmp_path: Path) -> None:
    with pytest.raises(RankFailed, match="ImportError: megatron-core was not found"):
        run_ranks(save, 1, tmp_path / "file", False)
    assert run_ranks(save, 1, tmp_path / "file", True) == ["saved"]


def test_nothing_is_done_where_nothing_is_missing() -> None:
    def cure() -> tuple[bool, bool]:
        had_all = dist_ckpt_io.HAVE_MEGATRON_CORE
        return had_all, tensorstore_import.apply()

    [(had_all, cured)] = run_ranks(cure, 1)
    assert had_all != cured
