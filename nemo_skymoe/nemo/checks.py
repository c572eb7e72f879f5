"""The checks of a training before anything is built. Every refusal names the option."""

import copy
import functools
import math
from pathlib import Path
from typing import Any

from nemo.collections.llm.gpt.model.base import GPTConfig
from nemo.collections.llm.peft.module_matcher import ModuleMatcher
from nemo.lightning.pytorch.callbacks.deepep import DeepEPCallback
from nemo.utils import logging
from torch import nn

from nemo_skymoe.checkpoint.run_folder import last_checkpoint
from nemo_skymoe.checkpoint.torch_dist.fitting import check_architecture
from nemo_skymoe.checkpoint.torch_dist.pickle_check import check_checkpoint
from nemo_skymoe.config import ConfigurationError, SkyworkOptions
from nemo_skymoe.durable.errors import CheckpointError
from nemo_skymoe.nemo.index_check import check_data_module
from nemo_skymoe.nemo.run_numbers import check_batches, check_numbers
from nemo_skymoe.nemo.schedule_length import check_early_end, follow_max_steps
from nemo_skymoe.pipeline.division import check_division

_spelled = "model.config.{}".format
_SIZES = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
    "sequence_parallel",
)
_STAGES = (
    "virtual_pipeline_model_parallel_size",
    "pipeline_model_parallel_layout",
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
)


def check_training(
    model: Any,
    trainer: Any,
    optim: Any = None,
    pipeline: Any = None,
    peft: Any = None,
    data: Any = None,
    started: int | None = None,
) -> None:
    """Make every check that takes no file, so that a submission and a dry run can make them too.

    A pipeline plan is put on the model and the strategy, and the learning-rate schedule is fitted to the steps.

    Args:
        model: An object with the model's `config`, and with its `optim` if the training is given no other.
        optim: The optimizer that replaces the model's own.
        data: The data module, or None. It has the sizes of sequence and batch.
        started: Number of ranks that were started; None if none was yet.

    Raises:
        ConfigurationError: Something cannot work. The message names the first such option.
    """
    config = getattr(model, "config", None)
    used = optimizer_of(model, optim)
    check_steps(trainer)
    check_numbers(config, trainer, data, used)
    check_early_end(trainer)
    check_world_size(trainer, started)
    check_batches(trainer, data)
    if pipeline is not None:
        pipeline.apply(model, trainer)
    check_parallel_sizes(config, trainer.strategy)
    check_callbacks(trainer.callbacks, config)
    check_adapters(peft, config, trainer.strategy)
    follow_max_steps(used, trainer.max_steps)


def optimizer_of(model: Any, optim: Any) -> Any:
    """Return the optimizer that a training uses: `optim`, or else the model's own.

    Raises:
        ConfigurationError: Both have a learning-rate schedule.
    """
    own = getattr(model, "optim", None)
    if optim is None:
        return own
    if own is not optim and getattr(own, "lr_scheduler", None) is not None:
        raise ConfigurationError(
            "model.optim has a learning-rate schedule, but optim replaces the model's optimizer: expected the schedule"
            " as optim.lr_scheduler"
        )
    return optim


def check_parallel_sizes(config: Any, strategy: Any) -> None:
    """Check the configuration with the strategy's parallel sizes, which NeMo sets only when it builds the model."""
    if not isinstance(config, GPTConfig):
        return
    probe: Any = copy.copy(config)
    for option in _SIZES:
        setattr(probe, option, getattr(strategy, option))
    probe.pipeline_dtype = probe.pipeline_dtype or probe.params_dtype
    try:
        probe.__post_init__()
    except (AssertionError, ImportError, ValueError) as reason:
        raise ConfigurationError(" ".join(str(reason).split())) from reason
    if isinstance(probe, SkyworkOptions):
        probe.check_training()
    for option in _STAGES:
        setattr(probe, option, getattr(strategy, option, None))
    check_division(probe)


def check_world_size(trainer: Any, started: int | None = None) -> None:
    """Refuse a number of ranks that the parallel sizes do not divide, or that differs from those started."""
    strategy = trainer.strategy
    world = trainer.num_devices * trainer.num_nodes
    if started not in (None, world):
        raise ConfigurationError(
            f"trainer.devices x trainer.num_nodes is {world} ranks, {started} were started: set trainer.devices or"
            " the executor's ntasks_per_node"
        )
    pipeline = {"pipeline_model_parallel_size": strategy.pipeline_model_parallel_size}
    tensor = strategy.tensor_model_parallel_size
    within = getattr(strategy, "expert_tensor_parallel_size", None) or tensor
    expert = getattr(strategy, "expert_model_parallel_size", None) or 1
    _check_multiple(
        world,
        {
            "tensor_model_parallel_size": tensor,
            **pipeline,
            "context_parallel_size": strategy.context_parallel_size,
        },
    )
    _check_multiple(
        world,
        {"expert_tensor_parallel_size": within, "expert_model_parallel_size": expert, **pipeline},
    )


def _check_multiple(world: int, sizes: dict[str, int]) -> None:
    product = math.prod(sizes.values())
    if world % product:
        factors = " x ".join(f"{name}={size}" for name, size in sizes.items())
        raise ConfigurationError(
            f"trainer.devices x trainer.num_nodes is {world} ranks, expected a multiple of {factors} = {product}"
        )


def check_steps(trainer: Any) -> None:
    """Refuse a number of steps that trains nothing, and a way of accumulating gradients that loses most of them."""
    steps = trainer.max_steps
    if type(steps) is not int or steps < 1:
        raise ConfigurationError(
            f"trainer.max_steps is {steps!r}, expected a whole number of optimizer steps, at least 1"
        )
    batches = getattr(trainer, "accumulate_grad_batches", 1)
    if batches != 1:
        raise ConfigurationError(
            f"trainer.accumulate_grad_batches is {batches!r}, expected 1: NeMo zeroes the gradients before every batch,"
            " so that all but the last would be lost; micro-batches accumulate by data.global_batch_size"
        )


def check_warm_start(resume: Any, config: Any, vocabulary: int | None = None) -> None:
    """Refuse a checkpoint to start from that does not exist, or that is of another model than `config`'s.

    Args:
        resume: NeMo's `AutoResume`, or its configuration.
        config: The configuration of the model.
        vocabulary: Tokens of the data's tokenizer, if they are known.
    """
    path = getattr(getattr(resume, "restore_config", None), "path", None)
    if not path or "://" in str(path):
        return
    if not (Path(path) / "weights").is_dir():
        raise ConfigurationError(
            f"the checkpoint to start from, '{path}', has no weights folder: `skymoe demo` makes one for the tiny"
            " recipes, `skymoe upcycle` one from any dense checkpoint"
        )
    check_architecture(Path(path), config, _spelled, vocabulary)


def vocabulary_of(data: Any) -> int | None:
    """Return the number of tokens of a data module's tokenizer, which is the model's; None if it is not known."""
    size = getattr(getattr(data, "tokenizer", None), "vocab_size", None)
    return size if isinstance(size, int) else None


def check_what_is_unpickled(resume: Any, trainer: Any, data: Any) -> None:
    """Scan everything that torch, Megatron and NeMo are going to unpickle, or build a context of, before they do.

    The checkpoint that a run continues from is known only when `resume.setup` is called: it is the run's own last one,
    that of `resume_from_path` or `resume_from_directory`, the adapters' base model, or the one to start from.

    Raises:
        ConfigurationError: A file refers to a class that is not allowed; the message names both. It is raised here, or
            by `resume.setup`.
    """
    check_data_module(data)
    given = getattr(getattr(trainer.strategy, "restore_config", None), "path", None)
    if given and "://" not in str(given):
        check_checkpoint(Path(given))
    if resume is None:
        return
    setup = resume.setup

    @functools.wraps(setup)
    def checked(trainer: Any, model: Any = None) -> Any:
        start = getattr(resume.restore_config, "path", None)
        own = resume.get_trainer_ckpt_path(model)
        for path in filter(None, [own, start and resume._extract_path(str(start))]):
            check_checkpoint(Path(path))
        config = getattr(model, "config", None)
        if own and isinstance(config, GPTConfig):
            base = Path(getattr(own, "base_model_path", None) or own)
            check_architecture(base, config, _spelled, vocabulary_of(data))
        return setup(trainer, model)

    resume.setup = checked


def warn_of_own_checkpoint(resume: Any, log: Any) -> None:
    """Warn if a run continues from a checkpoint of its own although it was told to start from another."""
    path = getattr(getattr(resume, "restore_config", None), "path", None)
    if not path or not getattr(resume, "resume_if_exists", False) or log is None:
        return
    if own_checkpoint(resume, log) is not None:
        logging.warning(
            f"'{run_folder(log)}' has a checkpoint of its own: this run goes on from there, not from '{path}'; give it another"
            " name to start from those weights"
        )


def run_folder(log: Any) -> Path:
    """Return the folder where a run keeps its checkpoints, from NeMo's logger or its configuration."""
    return Path(log.log_dir or "nemo_experiments", log.name or "default")  # NeMo's defaults


def check_own_checkpoint(resume: Any, log: Any, config: Any, vocabulary: int | None = None) -> None:
    """Refuse to continue a run as another model. The arguments are those of `check_warm_start`; `log` names the run."""
    if isinstance(config, GPTConfig) and (own := own_checkpoint(resume, log)) is not None:
        check_checkpoint(own)
        check_architecture(own, config, _spelled, vocabulary)


def own_checkpoint(resume: Any, log: Any) -> Path | None:
    """Return the run's last checkpoint, from which it goes on, if it has one here."""
    if log is None or not getattr(resume, "resume_if_exists", False):
        return None
    try:
        return last_checkpoint(run_folder(log))
    except CheckpointError:  # it has none that is complete
        return None


def check_callbacks(callbacks: Any, config: Any) -> None:
    """Refuse a callback that would change the configuration after it was checked."""
    if getattr(config, "moe_edp", False) and any(isinstance(one, DeepEPCallback) for one in callbacks):
        raise ConfigurationError(
            "DeepEPCallback sets moe_token_dispatcher_type='flex', which moe_edp replaces by a dispatcher of its own:"
            " expected no DeepEPCallback, or moe_edp=False"
        )


def check_adapters(peft: Any, config: Any, strategy: Any) -> None:
    """Refuse adapters that would train nothing, or would silently train the wrong thing.

    NeMo (2.7, llm/peft/utils.py) splits an adapter over the tensor-parallel group, and averages its gradient over all
    data-parallel ranks. That is right for attention, and wrong for experts that differ between these ranks.
    """
    if peft is None or not isinstance(config, SkyworkOptions):
        return
    if isinstance(peft, ModuleMatcher):
        if _targets(peft, None, "router", "mlp"):
            raise ConfigurationError(
                f"peft.target_modules is {peft.target_modules}, which takes in the router: it has no low-rank adapter,"
                " expected linear_qkv, linear_proj, linear_fc1 and linear_fc2, or some of them"
            )
        expert = strategy.expert_model_parallel_size
        if expert > 1 and _targets(peft, nn.Linear(1, 1), "linear_fc1", "mlp.experts.local_experts.0"):
            raise ConfigurationError(
                f"peft.target_modules is {peft.target_modules} with expert_model_parallel_size={expert}: NeMo averages"
                " the adapters of different experts; expected 1 (pipeline stages share the model), or linear_qkv and"
                " linear_proj alone"
            )
    if config.moe_adaptive_aux_loss:
        raise ConfigurationError(
            "moe_adaptive_aux_loss balances a router, which peft freezes: expected False, with"
            " moe_router_load_balancing_type='none'"
        )


def _targets(peft: ModuleMatcher, module: Any, name: str, parent: str) -> bool:
    return peft.match(module, name, f"module.decoder.layers.0.{parent}") is not None
