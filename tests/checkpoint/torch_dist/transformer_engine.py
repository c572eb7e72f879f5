"""Measures what the installed Megatron-Core stores of Transformer Engine's layers, into `transformer_engine.json`.

`python -m tests.checkpoint.torch_dist.transformer_engine` puts the names of the real models under the version of
Megatron-Core that is installed. Transformer Engine has to be importable, with its compiled module for torch. A GPU is not
needed: its modules ask for one when they are made, and are told that there is one, as nothing of them runs.
"""

import contextlib
import hashlib
import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import megatron.core
import torch

from nemo_skymoe.checkpoint.verification import measured_names
from nemo_skymoe.checkpoint.verification.measured_names import EXAMPLES, Stored, stored_by_megatron
from nemo_skymoe.moe.layer import have_transformer_engine

FILE = Path(__file__).with_suffix(".json")
SPELLED_OUT = "the same as an moe"
"""The example whose names are written in full, for the eye. The others are told by a checksum of theirs."""


def measured() -> dict[str, Any]:
    """Measure every example, and say with what."""
    with _made_without_a_gpu():
        found = {
            (name, stacked): stored_by_megatron(architecture, "te", stacked=stacked)
            for name, architecture in EXAMPLES.items()
            for stacked in (True, False)
        }
    return {
        "transformer_engine": version("transformer_engine"),
        "torch": torch.__version__,
        "gpu": torch.cuda.is_available(),
        "checksums": {label(*which): checksum(stored) for which, stored in found.items()},
        "names": names(found[SPELLED_OUT, True]),
    }


def label(name: str, stacked: bool) -> str:
    """Return the words for an example and its stacking."""
    return f"{name}, {'stacked' if stacked else 'layer by layer'}"


def names(stored: Stored) -> dict[str, Any]:
    """Return the shapes by name, and how many extra states have a name."""
    states = sorted(state.partition("/")[0] for state in stored.extra_states)
    shapes: dict[str, Any] = {name: [*shape] for name, shape in sorted(stored.tensors.items())}
    return shapes | {name: states.count(name) for name in states}


def checksum(stored: Stored) -> str:
    """Return a checksum of all names and shapes."""
    text = json.dumps([sorted(stored.tensors.items()), sorted(stored.extra_states)])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@contextlib.contextmanager
def _made_without_a_gpu() -> Any:
    """Tell Transformer Engine's modules, where no GPU is, that there is one, while they are made."""
    if torch.cuda.is_available():
        yield
        return
    make = measured_names.gpt_model

    def gpt_model(*args: Any, **options: Any) -> Any:
        with mock.patch("torch.cuda.is_available", return_value=True):
            return make(*args, **options)

    with mock.patch.object(measured_names, "gpt_model", gpt_model):
        yield


def main(file: Path = FILE) -> None:
    """Write the measurement of the installed version beside those of the others."""
    if not have_transformer_engine():
        sys.exit(
            "Transformer Engine cannot be imported, expected transformer_engine and transformer_engine_torch"
        )
    known = json.loads(file.read_text()) if file.is_file() else {}
    known[megatron.core.__version__.partition("+")[0]] = measured()
    file.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
