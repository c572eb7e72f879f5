"""What the finetuning recipes share: data, optimizer, and the adapters of LoRA or none."""

from dataclasses import dataclass
from typing import Any, Optional

import nemo_run as run
from nemo.collections.llm import FineTuningDataModule, SquadDataModule
from nemo.collections.llm.peft import LoRA

from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.nemo.api import finetune
from nemo_skymoe.nemo.pipeline import PipelinePlan
from nemo_skymoe.recipes import _common, _ours
from nemo_skymoe.recipes._scale import at_scale

ATTENTION, MLP = ["linear_qkv", "linear_proj"], ["linear_fc1", "linear_fc2"]


@dataclass
class Choices:
    """The arguments of a finetuning recipe that mean the same in all of them."""

    dir: Optional[str]
    name: str
    dataset: Optional[str]
    resume_path: Optional[str]
    scale: Optional[str]
    peft_scheme: Optional[str]
    max_steps: int
    seq_length: int
    global_batch_size: int
    micro_batch_size: int
    max_lr: Optional[float]
    on_corpus: bool = False
    """`dataset` is a folder that `skymoe corpus` wrote, which brings its own tokenizer."""


def recipe(model: Any, trainer: Any, choices: Choices, pipeline_layout: Optional[str] = None) -> run.Partial:
    """The recipe; `peft_scheme` "lora" puts adapters on attention and MLPs, "none" trains everything.

    Raises:
        ConfigurationError: Another `peft_scheme`.
    """
    scheme = (choices.peft_scheme or "none").lower()
    if scheme not in ("lora", "none"):
        raise ConfigurationError(f"peft_scheme is {choices.peft_scheme!r}, expected lora or none")
    max_lr = choices.max_lr or (_ours.FINETUNE_LR if scheme == "none" else _ours.LORA_LR)
    made = run.Partial(
        finetune,
        model=model,
        data=_data(choices),
        trainer=trainer,
        log=_common.logger(choices.dir, choices.name, save_every_n_steps=choices.max_steps),
        optim=_common.adam(max_lr, 0.0, min(50, choices.max_steps // 10), choices.max_steps),
        resume=_common.resume_from(choices.resume_path),
        tokenizer="data" if choices.on_corpus or choices.scale else "model",
    )
    if pipeline_layout is not None:
        made.pipeline = run.Config(PipelinePlan, layout=pipeline_layout)
    if scheme == "lora":
        _add_adapters(made)
    return at_scale(made, choices.scale, choices.dataset)


def _data(choices: Choices) -> Any:
    if choices.on_corpus:
        return _common.data(
            choices.dataset, choices.seq_length, choices.global_batch_size, choices.micro_batch_size
        )
    sizes: dict[str, Any] = {
        "seq_length": choices.seq_length,
        "global_batch_size": choices.global_batch_size,
        "micro_batch_size": choices.micro_batch_size,
    }
    if choices.dataset is None:
        return run.Config(SquadDataModule, **sizes)
    return run.Config(FineTuningDataModule, dataset_root=choices.dataset, **sizes)


def _add_adapters(made: Any) -> None:
    made.peft = run.Config(LoRA, target_modules=ATTENTION + MLP, dim=_ours.LORA_DIM, alpha=_ours.LORA_ALPHA)
    # NeMo: not together with LoRA.
    made.model.config.cross_entropy_loss_fusion = False
    if made.model.config.__fn_or_cls__.num_moe_experts is not None:
        # Routers are frozen: nothing to balance, and no tokens to drop. One adapter for every expert, where grouped
        # experts would share one.
        made.model.config.moe_router_load_balancing_type = "none"
        made.model.config.moe_adaptive_aux_loss = False
        made.model.config.moe_expert_capacity_factor = None
        made.model.config.moe_grouped_gemm = False
