"""The folder of a Megatron-Bridge checkpoint, written without Bridge: one iteration, and the files that name it."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from nemo_skymoe.checkpoint.companions import companion_files
from nemo_skymoe.checkpoint.description import Description
from nemo_skymoe.checkpoint.tensors.mapping import Chunk
from nemo_skymoe.checkpoint.torch_dist.context import TOKENIZER
from nemo_skymoe.checkpoint.torch_dist.options import CONTEXT, HF_CONFIG
from nemo_skymoe.checkpoint.torch_dist.run_config import RUN_CONFIG, run_config
from nemo_skymoe.checkpoint.torch_dist.target import TorchDistTarget

ITERATION = "iter_0000000"
"""A checkpoint that no training has saved is of step 0, as Bridge's own `import_ckpt` has it."""
TRAIN_STATE, TRACKER = "train_state.pt", "latest_checkpointed_iteration.txt"
_COUNTS = ("step", "consumed_train_samples", "skipped_train_samples", "consumed_valid_samples")
_PHASES = ("do_train", "do_valid", "do_test")


def bridge_files(
    description: Description, tokenizer_folder: Path | None, *, config: bytes, padded_vocab_size: int
) -> dict[str, bytes]:
    """Return the files beside the tensors, by path relative to the checkpoint.

    Args:
        description: The model's description.
        tokenizer_folder: The folder of its tokenizer, if it has one.
        config: The config.json that describes it too, in the place where a NeMo checkpoint has it.
        padded_vocab_size: Rows of embedding and head, with which Bridge is to build the model.

    Raises:
        ConfigurationError: The model scales its rotary embedding in a way that is not carried over to Megatron.
    """
    tokenizer = {} if tokenizer_folder is None else companion_files(tokenizer_folder)
    files = {
        RUN_CONFIG: run_config(description, padded_vocab_size=padded_vocab_size, tokenizer=tokenizer),
        f"{CONTEXT}/{HF_CONFIG}": config,
        **{f"{TOKENIZER}/{name}": content for name, content in tokenizer.items()},
    }
    return {f"{ITERATION}/{name}": content for name, content in files.items()}


class BridgeTarget(TorchDistTarget):
    """The folder with `iter_0000000/`, and what tells Bridge that this is the last iteration.

    Args:
        chunks: Tensors, or pieces of stacked ones.
        dtypes: Data type of each tensor by name (`target.stored_dtypes`).
        extra_states: Names of the empty extra states that Megatron expects.
        extras: Further files by path in the output folder (`bridge_files`).
    """

    # Bridge's own version of the format, without which it takes the base of adapters for one that they do not fit.
    common_state = MappingProxyType({"checkpoint_version": 3.0})

    def __init__(
        self,
        chunks: Iterable[Chunk],
        dtypes: Mapping[str, str],
        extra_states: Sequence[str],
        extras: Mapping[str, bytes],
    ):
        super().__init__(chunks, dtypes, extra_states, extras, folder=ITERATION)

    def last_files(self, sizes: Mapping[str, int]) -> dict[str, bytes]:
        """Return what makes the iteration valid, and after it the files in the folder above that point to it."""
        state = _train_state()
        return {
            **super().last_files(sizes),
            f"{ITERATION}/{TRAIN_STATE}": state,
            f"latest_{TRAIN_STATE}": state,
            TRACKER: b"0",
        }


def _train_state() -> bytes:
    """Return Bridge's `TrainState` of a training that has not begun, as its `state_dict` is saved."""
    import torch

    values = {name: torch.tensor(0) for name in _COUNTS}
    values["floating_point_operations_so_far"] = torch.tensor(0.0)
    values |= {name: torch.tensor(False) for name in _PHASES}
    content = io.BytesIO()
    torch.save(values, content)
    return content.getvalue()
