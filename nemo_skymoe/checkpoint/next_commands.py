"""What can be done with a checkpoint: the commands that take it further, ready to be given to a shell."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from nemo_skymoe.checkpoint.description import Description

_OTHER_FORMS = {"hf": ("nemo", "bridge"), "nemo": ("hf", "bridge"), "bridge": ("hf", "nemo")}
"""The forms to which a checkpoint is usually converted, by its own."""
_EXPERTS = 8
_LONGEST_PLANNED = 8192
"""Tokens of the sequences that a plan is proposed for: contexts are longer than the sequences of most pretrainings."""
_CORPUS = "runs/corpus"
"""Where `skymoe corpus` and `skymoe preprocess` write in the examples. NeMo's dry run does not open it, and Bridge's reads
its tokenizer."""
_NOT_IN_BRACKETS = re.compile(r"[,'\"()\x00-\x1f]|^\s|\s$")
"""NeMo-Run reads the arguments of a recipe between brackets, and has no quotes for them."""


def next_commands(folder: Path, form: str, description: Description) -> dict[str, str]:
    """Return commands by what they do. Every one of them works as it is, and says more with --help.

    The training is one on the corpus in runs/corpus.

    Args:
        folder: The checkpoint.
        form: Its form, one of `formats.FORMATS`.
        description: The model's description.
    """
    path = shlex.quote(str(folder))
    commands = {
        f"convert to {other}": f"skymoe convert {path} {other}-checkpoint --to {other}"
        for other in _OTHER_FORMS.get(form, ("hf", "nemo", "bridge"))
    }
    if description.architecture.num_moe_experts is None:
        to = form if form in ("nemo", "bridge") else "nemo"
        commands["make an MoE of it"] = f"skymoe upcycle {path} upcycled --to {to} --num-experts {_EXPERTS}"
    length = min(description.max_position_embeddings, _LONGEST_PLANNED)
    commands["plan its training"] = (
        f"skymoe plan --model {path} --hardware H100 --num-gpus 64 --seq-length {length} --global-batch-size 512 --search"
    )
    if (training := _training(str(folder), form, description)) is not None:
        commands["check its training"] = training
    return commands


def _training(folder: str, form: str, description: Description) -> str | None:
    """Return the dry run of a training that starts from the checkpoint, or None if no front door takes it as it is."""
    recipe = "skywork_dense" if description.architecture.num_moe_experts is None else "skywork_moe"
    if form == "bridge":
        words = [
            "--recipe",
            f"{recipe}_pretrain_config",
            "--dry-run",
            f"resume_path={folder}",
            f"corpus={_CORPUS}",
        ]
        return f"python -m nemo_skymoe.bridge {shlex.join(words)}"
    if form != "nemo" or _NOT_IN_BRACKETS.search(folder):
        return None
    return f"nemo llm pretrain --factory {shlex.quote(f'{recipe}(resume_path={folder},corpus={_CORPUS})')} --dryrun"
