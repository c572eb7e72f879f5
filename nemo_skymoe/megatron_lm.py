"""Megatron-LM's own training with the router, Expert Data Parallelism and the adaptive coefficients.

`python -m nemo_skymoe.megatron_lm ARGUMENTS` is Megatron-LM's pretrain_gpt.py with one more group of arguments, the options
of `SkyworkOptions`. A checkout of Megatron-LM 0.19 has to be on PYTHONPATH; nothing in it is changed.
"""

import importlib
import sys
from pathlib import Path
from typing import Any

from nemo_skymoe.checkpoint.torch_dist.deciding import CHANGES, check_deciding
from nemo_skymoe.checkpoint.torch_dist.options import MEGATRON_LM, megatron_lm_options, saved_options
from nemo_skymoe.config import ConfigurationError, SkyworkOptions

KEY = "skywork_moe"
"""The entry of the learning-rate schedule's state that holds the coefficients in a checkpoint, as with Bridge."""


def main() -> None:
    """Train as pretrain_gpt.py does.

    Raises:
        ConfigurationError: Megatron-LM is not importable, or it is older than 0.19.
    """
    gpt = _part("pretrain_gpt")
    arguments, utilities = _part("megatron.training.arguments"), _part("megatron.training.argument_utils")
    training = _part("megatron.training.training")
    enums = importlib.import_module("megatron.core.enums")
    setattr(gpt.train_valid_test_datasets_provider, "is_distributed", True)  # noqa: B010
    args = arguments.parse_and_validate_args(
        extra_args_provider=add_arguments, args_defaults={"tokenizer_type": "GPT2BPETokenizer"}
    )
    check_start(args)
    keep_coefficients(training)
    training.pretrain(
        utilities.pretrain_cfg_container_from_args(args, model_config(args)),
        gpt.train_valid_test_datasets_provider,
        enums.ModelType.encoder_or_decoder,
        gpt.forward_step,
        get_embedding_ranks=gpt.get_embedding_ranks,
    )


def add_arguments(parser: Any) -> Any:
    """Add one argument for each of our options to Megatron-LM's parser, and return it.

    A truth value that is True unless it is turned off has an argument that begins with `--no-`.
    """
    factory = _part("megatron.training.argument_utils").ArgumentGroupFactory
    factory(SkyworkOptions).build_group(parser, title="Skywork-MoE")
    return parser


def check_start(args: Any) -> None:
    """Refuse to continue a run, or to start from a checkpoint, of another model.

    Megatron-LM compares a few sizes, and neither the rotary base nor the gate.

    Raises:
        ConfigurationError: They differ. The message has every difference with its argument.
    """
    for folder in (args.load, getattr(args, "pretrained_checkpoint", None)):
        iteration = folder and _last_iteration(Path(folder))
        if iteration and (saved := saved_options(iteration)) is not None:
            wanted = megatron_lm_options(vars(args))
            check_deciding(saved, wanted, wanted.get(CHANGES), iteration, _argument)


def _last_iteration(folder: Path) -> Path | None:
    """Return the folder of the iteration that Megatron-LM would load; None if there is none, or in another format."""
    tracker = folder / "latest_checkpointed_iteration.txt"
    text = tracker.read_text(errors="replace").strip() if tracker.is_file() else ""
    iteration = folder / ("release" if text == "release" else f"iter_{text:0>7}")
    return iteration if (iteration / ".metadata").is_file() else None


def _argument(option: str) -> str:
    """Return Megatron-LM's argument for an option of Megatron-Core."""
    names = {option: name for name, option in MEGATRON_LM.items()}
    return "--" + names.get(option, option).replace("_", "-")


def model_config(args: Any) -> Any:
    """Make Megatron-LM's configuration of the model from its parsed arguments, with our options and our layer spec.

    Raises:
        ConfigurationError: An option cannot work.
    """
    from nemo_skymoe.moe.layer import SkyworkTransformerConfig

    utilities = _part("megatron.training.argument_utils")
    config = utilities.core_transformer_config_from_args(args, SkyworkTransformerConfig)
    model = utilities.gpt_config_from_args(args, config)
    model.transformer_layer_spec = layer_spec
    return model


def layer_spec(model: Any, vp_stage: int | None = None) -> Any:
    """Return the specs of a stage's layers for Megatron-LM's configuration of the model, which calls this."""
    from nemo_skymoe.moe.layer import get_skywork_block_spec

    return get_skywork_block_spec(
        model.transformer,
        vp_stage,
        transformer_engine=model.transformer.transformer_impl == "transformer_engine",
    )


def keep_coefficients(training: Any) -> None:
    """Let a controller follow the optimizer that `training` makes, and its coefficients be part of every checkpoint.

    Megatron-LM saves and loads the state of the learning-rate schedule, and ignores entries that are not its own.

    Args:
        training: The module `megatron.training.training`.
    """
    make_optimizer, make_schedule = training.get_megatron_optimizer, training.get_optimizer_param_scheduler
    controllers: list[Any] = []

    def get_megatron_optimizer(config: Any, model_chunks: Any, *given: Any, **options: Any) -> Any:
        optimizer = make_optimizer(config, model_chunks, *given, **options)
        controllers[:] = [_controller(model_chunks, optimizer)]
        return optimizer

    def get_optimizer_param_scheduler(optimizer: Any) -> Any:
        schedule = make_schedule(optimizer)
        save, load = schedule.state_dict, schedule.load_state_dict
        [controller] = controllers

        def load_both(state: dict[str, Any]) -> None:
            controller.load_state_dict(state.get(KEY, {}))
            load({name: value for name, value in state.items() if name != KEY})

        schedule.state_dict = lambda: {**save(), KEY: controller.state_dict()}
        schedule.load_state_dict = load_both
        return schedule

    training.get_megatron_optimizer = get_megatron_optimizer
    training.get_optimizer_param_scheduler = get_optimizer_param_scheduler


def _controller(model_chunks: Any, optimizer: Any) -> Any:
    from megatron.core.distributed import finalize_model_grads

    from nemo_skymoe.moe.controller import AuxLossController

    controller = AuxLossController(model_chunks)
    if controller.config.finalize_model_grads_func is None:
        controller.config.finalize_model_grads_func = finalize_model_grads
    controller.attach(optimizer)
    return controller


def _part(name: str) -> Any:
    try:
        part = importlib.import_module(name)
    except ModuleNotFoundError as reason:
        raise ConfigurationError(
            f"{name} cannot be imported ({reason}), expected a checkout of Megatron-LM 0.19 on PYTHONPATH"
        ) from reason
    if name.endswith("argument_utils") and not hasattr(part, "gpt_config_from_args"):
        raise ConfigurationError(
            f"{name} has no gpt_config_from_args, which came with Megatron-LM 0.19; {part.__file__} is older"
        )
    return part


if __name__ == "__main__":
    try:
        main()
    except ConfigurationError as reason:
        sys.exit(str(reason))
