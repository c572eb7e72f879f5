"""Checkpoints of any format, told apart by the names in their folders and opened from headers alone. Without torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nemo_skymoe.checkpoint import foreign
from nemo_skymoe.checkpoint.companions import find_companions
from nemo_skymoe.checkpoint.config_values import read_json
from nemo_skymoe.checkpoint.description import Description
from nemo_skymoe.checkpoint.hugging_face.configuration import from_hf_config
from nemo_skymoe.checkpoint.hugging_face.opening import open_hugging_face
from nemo_skymoe.checkpoint.mapping import StoredWeights
from nemo_skymoe.checkpoint.run_folder import checkpoint_of
from nemo_skymoe.checkpoint.tensors import Storage
from nemo_skymoe.checkpoint.torch_dist import options
from nemo_skymoe.checkpoint.torch_dist.names import layout
from nemo_skymoe.checkpoint.torch_dist.opening import stored_weights
from nemo_skymoe.checkpoint.torch_dist.storage import CONFIG, TorchDistStorage, check_backend
from nemo_skymoe.durable.errors import CheckpointError, ConfigurationError
from nemo_skymoe.durable.stand_in import refuse_broken_link


@dataclass(frozen=True)
class Source:
    """An opened checkpoint."""

    folder: Path
    form: str
    """"hf", "nemo", or "megatron" for Megatron-LM's without `context/`."""
    weights: StoredWeights
    description: Description

    @property
    def tokenizer(self) -> Path | None:
        """The folder with the files of the tokenizer, and of whatever else travels along, if they are there."""
        return self.folder if self.form == "hf" else find_companions(self.folder / "context")


def form_of(folder: Path) -> str:
    """The format of a checkpoint folder, from the names in it.

    Raises:
        CheckpointError: None that is known.
    """
    foreign.refuse_path(folder)
    known = {"hf": "config.json", "nemo": "weights", "megatron": ".metadata"}
    for name in known.values():
        refuse_broken_link(folder / name)
    form = next((form for form, name in known.items() if (folder / name).exists()), None)
    foreign.refuse_folder(folder, is_model=form is not None)
    if form is not None:
        return form
    foreign.refuse_folder_of_models(folder, known.values())
    if (folder / CONFIG).is_file():
        check_backend(folder / CONFIG)
    names = sorted(path.name for path in folder.iterdir())
    weights = [name for name in names if name.endswith(".safetensors")]
    has = (
        f"has '{weights[0]}' but no config.json"
        if weights
        else "is no checkpoint"
        if names
        else "is no checkpoint, it is empty"
    )
    raise CheckpointError(
        f"'{folder}' {has}: expected config.json (Hugging Face), weights/ (NeMo 2) or .metadata"
        " (Megatron-LM's torch_dist, the folder of one iteration)"
    )


def open_source(folder: Path, config: Path | None = None) -> Source:
    """Open a checkpoint of any format.

    Args:
        folder: The checkpoint's, or that of a run: it stands for the run's last checkpoint.
        config: A config.json that describes a Megatron checkpoint which does not do so itself.
    """
    folder = checkpoint_of(folder)
    form = form_of(folder)
    if form == "hf":
        if config is not None:
            raise ConfigurationError(
                f"config is for Megatron checkpoints, '{folder}' has its own config.json"
            )
        return Source(folder, form, *open_hugging_face(folder))
    return Source(folder, form, *open_torch_dist(folder, config))


def open_torch_dist(folder: Path, config: Path | None = None) -> tuple[StoredWeights, Description]:
    """The model in a checkpoint folder of NeMo 2 (`weights/`, `context/`) or of Megatron-LM.

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
    """The model whose tensors are `storage`, from the first of: `config`, a config.json in the context, the options.

    Raises:
        CheckpointError: None of them is there, or they describe a model of another kind.
    """
    in_context = options.config_file(folder)
    file = config or in_context
    return options.describe(folder, storage) if file is None else from_hf_config(read_json(file), str(file))
