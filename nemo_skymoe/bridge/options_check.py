"""Options of Bridge and of newer Megatron-Cores with which a Skywork-MoE would silently train wrongly, refused by name."""

from typing import Any

from megatron.bridge.training.config import ConfigContainer

from nemo_skymoe.bridge.adapters_check import check_adapters
from nemo_skymoe.bridge.checkpoint import manager_name
from nemo_skymoe.bridge.layout_check import expert_tensor_parallelism
from nemo_skymoe.config import ConfigurationError, SkyworkOptions

_OFF = (False, None)
_FSDP = "FSDP shards the experts, whose similarity and gradients are measured for Megatron's DDP alone"
# Option, the values that it may have, and why. What a version does not know is off.
_ALLOWED: tuple[tuple[str, tuple[Any, ...], str], ...] = (
    (
        "dist.use_decentralized_pg",
        _OFF,
        "coefficients, telemetry and EDP use Megatron's global process groups, which are not made then",
    ),
    ("dist.use_megatron_fsdp", _OFF, _FSDP),
    ("ddp.use_megatron_fsdp", _OFF, _FSDP),
    ("dist.use_torch_fsdp2", _OFF, _FSDP),
    ("checkpoint.ckpt_format", ("torch_dist",), "the other formats are FSDP's"),
    (
        "model.overlap_moe_expert_parallel_comm",
        _OFF,
        "its schedule runs the router past the forward pass that tells it what is padding",
    ),
    (
        "comm_overlap.overlap_moe_expert_parallel_comm",
        _OFF,
        "its schedule runs the router past the forward pass that tells it what is padding",
    ),
    (
        "model.moe_expert_rank_capacity_factor",
        _OFF,
        "an iteration that overflows is run again, and its drop rates would count twice",
    ),
    ("model.moe_paged_stash", _OFF, "it belongs to moe_expert_rank_capacity_factor"),
)


def check_options(config: ConfigContainer) -> None:
    """Refuse what does not work with the routers of a Skywork-MoE. A dense model has none.

    Raises:
        ConfigurationError: The message names the option and what was expected.
    """
    model: Any = config.model
    if not isinstance(model, SkyworkOptions) or not getattr(model, "num_moe_experts", None):
        return
    for option, allowed, reason in _ALLOWED:
        value = _value(config, option)
        if value not in allowed:
            raise ConfigurationError(
                f"{option} is {value!r}, expected {allowed[0]!r} with a Skywork-MoE: {reason}"
            )
    check_adapters(config.peft, model, expert_tensor_parallelism(model))
    if not model.moe_adaptive_aux_loss:
        return
    manager = config.checkpoint.custom_manager_class
    if manager not in (None, manager_name()):
        raise ConfigurationError(
            f"checkpoint.custom_manager_class is '{manager}', expected None or '{manager_name()}', which keeps the"
            " coefficients of moe_adaptive_aux_loss"
        )


def _value(config: Any, option: str) -> Any:
    for name in option.split("."):
        config = getattr(config, name, None)
    return config
