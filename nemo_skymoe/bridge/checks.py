"""Check a training of Bridge before it begins: the checkpoints that it reads, its data, and all that Bridge checks."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron.bridge.training.config import ConfigContainer, runtime_config_update

from nemo_skymoe import gpus
from nemo_skymoe.bridge.layout_check import check_ranks, check_resumed_layout
from nemo_skymoe.bridge.learning_rate import ExpertLearningRate
from nemo_skymoe.bridge.options_check import check_options
from nemo_skymoe.checkpoint import tokenizer
from nemo_skymoe.checkpoint.run_folder import checkpoint_of
from nemo_skymoe.checkpoint.torch_dist.fitting import check_architecture
from nemo_skymoe.checkpoint.torch_dist.pickle_check import check_checkpoint
from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.doctor import require_supported
from nemo_skymoe.durable.errors import CheckpointError

TRACKER = "latest_train_state.pt"
RUN_CONFIG = "run_config.yaml"


def check(config: ConfigContainer) -> None:
    """Run every check, and Bridge's own, which also settle what follows from other options.

    Raises:
        ConfigurationError: The training cannot work. The message names the option and what was expected.
        CheckpointError: A checkpoint is damaged, or would build what is not allowed.
    """
    require_supported()
    check_options(config)
    if isinstance(rates := config.optimizer_config_override_provider, ExpertLearningRate):
        rates.finalize()
    _check_data(config)
    check_ranks(config)
    settle(config)
    check_start(config)


def check_start(config: ConfigContainer) -> None:
    """Refuse a checkpoint to start or continue from that is missing, of another model, or that builds anything else.

    Bridge itself begins with random weights where the folder has no checkpoint.
    """
    settings = config.checkpoint
    if settings.pretrained_checkpoint is not None:
        _check_checkpoint(Path(settings.pretrained_checkpoint), config, "checkpoint.pretrained_checkpoint")
    if settings.load is not None and (Path(settings.load) / TRACKER).is_file():
        iteration = _check_checkpoint(Path(settings.load), config, "checkpoint.load")
        if not settings.finetune:
            check_resumed_layout(iteration, config)


def check_starting_point(config: ConfigContainer) -> None:
    """Refuse a finetuning that has neither a checkpoint to start from nor one of its own to continue.

    Raises:
        ConfigurationError: The message names the options.
    """
    settings = config.checkpoint
    if settings.pretrained_checkpoint is None and not (
        settings.load is not None and (Path(settings.load) / TRACKER).is_file()
    ):
        raise ConfigurationError(
            f"checkpoint.pretrained_checkpoint is None and checkpoint.load {settings.load!r} has no checkpoint: expected"
            " one of them to be the checkpoint that is finetuned"
        )


def _check_checkpoint(folder: Path, config: ConfigContainer, option: str) -> Path:
    try:
        iteration = checkpoint_of(folder)
    except CheckpointError as refused:
        raise ConfigurationError(f"{option}: {refused}") from None
    if not (iteration / RUN_CONFIG).is_file():
        raise ConfigurationError(
            f"{option} is '{folder}', which has no checkpoint of Megatron-Bridge ({RUN_CONFIG}): `skymoe upcycle --to"
            " bridge` and `skymoe convert --to bridge` write one"
        )
    check_checkpoint(iteration)
    for file in folder.glob("*.pt"):
        check_checkpoint(file.parent)
    with _vocabulary_of_the_tokenizer(config) as vocabulary:
        check_architecture(iteration, config.model, "model.{}".format, vocabulary)
    return iteration


def check_saving(config: ConfigContainer) -> None:
    """Refuse saving in the background by a worker that takes a GPU first, and without one keeps all ranks waiting.

    This is no part of `check`, which may run on a machine without GPUs for one that has them.

    Raises:
        ConfigurationError: The message names the option.
    """
    settings = config.checkpoint
    if settings.async_save and settings.async_strategy == "nvrx" and not gpus.in_use():
        raise ConfigurationError(
            "checkpoint.async_strategy is 'nvrx', whose worker needs a GPU and finds none: expected 'mcore', or"
            " checkpoint.async_save=False"
        )


@contextmanager
def _vocabulary_of_the_tokenizer(config: ConfigContainer) -> Iterator[int | None]:
    """Leave the vocabulary open while it is the tokenizer's, which Bridge builds and asks only later.

    The tokenizer's number of tokens comes with it, as far as its files tell.
    """
    model: Any = config.model
    kept, tokens = model.vocab_size, None
    given: Any = config.tokenizer
    if getattr(given, "use_tokenizer_vocab_size", False):
        model.vocab_size = None
        folder = given.tokenizer_model
        tokens = given.vocab_size if folder is None else tokenizer.size(Path(folder))
    try:
        yield tokens
    finally:
        model.vocab_size = kept


def _check_data(config: ConfigContainer) -> None:
    dataset: Any = config.dataset
    model: Any = config.model
    sizes = {"model.seq_length": model.seq_length}
    if hasattr(dataset, "seq_length"):
        sizes["dataset.seq_length"] = dataset.seq_length
    if len({*sizes.values()}) > 1:
        said = " and ".join(f"{name} is {size}" for name, size in sizes.items())
        raise ConfigurationError(f"{said}, expected the same: the recipe's argument seq_length sets both")


def settle(config: ConfigContainer) -> None:
    """Let Bridge check the options and settle what follows from them.

    Raises:
        ConfigurationError: Bridge refuses an option, in its own words.
    """
    try:
        runtime_config_update(config)
    except (AssertionError, ValueError, TypeError, NotImplementedError) as refused:
        if isinstance(refused, ConfigurationError | CheckpointError):
            raise
        raise ConfigurationError(" ".join(str(refused).split()) or repr(refused)) from refused
