"""The formats that are read here, told apart by the names in their folders. Without torch.

Each format is a room of its own that knows no other; what joins them to one table stands here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nemo_skymoe.checkpoint import foreign
from nemo_skymoe.checkpoint.companions import find_companions
from nemo_skymoe.checkpoint.config_values import read_json
from nemo_skymoe.checkpoint.description import Description
from nemo_skymoe.checkpoint.hugging_face.configuration import from_hf_config
from nemo_skymoe.checkpoint.hugging_face.opening import open_hugging_face
from nemo_skymoe.checkpoint.hugging_face.storage import open_storage
from nemo_skymoe.checkpoint.tensors.mapping import StoredWeights
from nemo_skymoe.checkpoint.tensors.model import Storage
from nemo_skymoe.checkpoint.torch_dist import options
from nemo_skymoe.checkpoint.torch_dist.names import layout
from nemo_skymoe.checkpoint.torch_dist.opening import stored_weights
from nemo_skymoe.checkpoint.torch_dist.run_config import RUN_CONFIG
from nemo_skymoe.checkpoint.torch_dist.storage import CONFIG, TorchDistStorage, check_backend
from nemo_skymoe.durable.errors import CheckpointError, ConfigurationError
from nemo_skymoe.durable.stand_in import refuse_broken_link


@dataclass(frozen=True)
class Format:
    """A format of checkpoints."""

    title: str
    telling: str
    """The name in a folder by which the format is known."""
    storage: Callable[[Path], Storage]
    """Opens the tensors of a folder by name."""
    open_model: Callable[[Path, Path | None], tuple[StoredWeights, Description]]
    """Opens the model in a folder, described by the config.json that is given too, if any."""
    companions: Callable[[Path], Path | None]
    """Finds the folder with the files of the tokenizer, and of whatever else travels along."""


def form_of(folder: Path) -> str:
    """Return the format of a checkpoint folder, one of FORMATS, from the names in it.

    Raises:
        CheckpointError: None that is known.
    """
    foreign.refuse_path(folder)
    telling = [known.telling for known in FORMATS.values()]
    for name in telling:
        refuse_broken_link(folder / name)
    form = next((form for form, known in FORMATS.items() if (folder / known.telling).exists()), None)
    foreign.refuse_folder(folder, is_model=form is not None)
    if form is not None:
        return form
    foreign.refuse_folder_of_models(folder, telling)
    if (folder / CONFIG).is_file():
        check_backend(folder / CONFIG)
    names = sorted(path.name for path in folder.iterdir())
    weights = [name for name in names if name.endswith((".safetensors", ".bin"))]
    has = (
        f"has '{weights[0]}' but no config.json"
        if weights
        else "is no checkpoint"
        if names
        else "is no checkpoint, it is empty"
    )
    raise CheckpointError(
        f"'{folder}' {has}: expected config.json (Hugging Face), weights/ (NeMo 2), {RUN_CONFIG} (Megatron-Bridge) or"
        " .metadata (Megatron-LM's torch_dist, the folder of one iteration)"
    )


def open_torch_dist(folder: Path, config: Path | None = None) -> tuple[StoredWeights, Description]:
    """Return the model in a checkpoint folder of NeMo 2 (`weights/`, `context/`), Megatron-Bridge or Megatron-LM.

    Args:
        folder: Saved at any tensor-, pipeline- and expert-parallel size.
        config: A config.json that describes the model, instead of what the checkpoint says.

    Raises:
        CheckpointError: No checkpoint, none that says how its heads are cut, one of another kind of model, or
            tensors that are not those of the model described.
    """
    storage = TorchDistStorage(folder)
    saved = layout(storage)
    description = describe_torch_dist(folder, storage, config)
    return stored_weights(storage, saved, description), description


def describe_torch_dist(folder: Path, storage: Storage, config: Path | None = None) -> Description:
    """Return the model whose tensors are `storage`, from `config`, a config.json in the context, or the options.

    Raises:
        CheckpointError: None of them is there, or they describe a model of another kind.
    """
    in_context = options.config_file(folder)
    file = config or in_context
    return options.describe(folder, storage) if file is None else from_hf_config(read_json(file), str(file))


def _open_hugging_face(folder: Path, config: Path | None) -> tuple[StoredWeights, Description]:
    if config is not None:
        raise ConfigurationError(f"config is for Megatron checkpoints, '{folder}' has its own config.json")
    return open_hugging_face(folder)


def _in_context(folder: Path) -> Path | None:
    return find_companions(folder / "context")


FORMATS = {
    "hf": Format(
        "Hugging Face",
        "config.json",
        open_storage,
        _open_hugging_face,
        lambda folder: folder,
    ),
    "nemo": Format("NeMo 2 torch_dist", "weights", TorchDistStorage, open_torch_dist, _in_context),
    "bridge": Format(
        "Megatron-Bridge torch_dist", RUN_CONFIG, TorchDistStorage, open_torch_dist, find_companions
    ),
    "megatron": Format("Megatron-LM torch_dist", ".metadata", TorchDistStorage, open_torch_dist, _in_context),
}
"""The formats in the order in which a folder is checked for them. "megatron" is a checkpoint of Megatron-LM, which has
neither `context/` nor Bridge's `run_config.yaml`."""
