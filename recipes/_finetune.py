"""A finetuning recipe: data, optimizer, and the adapters of LoRA or none."""

from typing import Any, Optional

import nemo_run as run
from nemo.collections.llm import FineTuningDataModule, SquadDataModule
from nemo.collections.llm.peft import LoRA

from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.experiments import choices
from nemo_skymoe.experiments.arguments import GivenFinetuning
from nemo_skymoe.experiments.runs import Finetuning
from nemo_skymoe.nemo.api import finetune
from nemo_skymoe.nemo.pipeline import PipelinePlan
from nemo_skymoe.recipes import _parts
from nemo_skymoe.recipes._scale import scaled
from nemo_skymoe.recipes._trainer import trainer_of

ATTENTION, MLP = ["linear_qkv", "linear_proj"], ["linear_fc1", "linear_fc2"]


def finetuning(
    training: Finetuning,
    given: GivenFinetuning,
    model: Any,
    *,
    dataset: Optional[str] = None,
    corpus: Optional[str] = None,
) -> run.Partial:
    """Make the recipe. `peft_scheme` "lora" puts adapters on attention and MLPs, and "none" trains everything.

    Args:
        training: The sizes, and the name of the run unless another is given.
        given: The arguments that a user gives to any recipe.
        model: NeMo-Run's configuration of the model.
        dataset: A folder with NeMo's `training.jsonl` and `validation.jsonl`; None is SQuAD.
        corpus: A folder that `skymoe corpus` wrote, in place of `dataset`. It brings its own tokenizer.

    Raises:
        ConfigurationError: `peft_scheme` is another.
    """
    scheme = scheme_of(given)
    if scheme not in ("lora", "none"):
        raise ConfigurationError(f"peft_scheme is {given.peft_scheme!r}, expected lora or none")
    made = run.Partial(
        finetune,
        model=model,
        data=_data(training, dataset, corpus),
        trainer=trainer_of(training),
        log=_parts.logger(given.dir, given.name or training.name, save_every_n_steps=training.max_steps),
        optim=_parts.adam(
            max_lr=given.max_lr or (choices.FINETUNE_LR if scheme == "none" else choices.LORA_LR),
            min_lr=0.0,
            warmup_steps=training.warmup_steps,
            max_steps=training.max_steps,
        ),
        resume=_parts.resume_from(given.resume_path),
        tokenizer="data" if corpus or given.scale else "model",
    )
    if training.pipeline_layout is not None:
        made.pipeline = run.Config(PipelinePlan, layout=training.pipeline_layout)
    if scheme == "lora":
        _add_adapters(made)
    return scaled(made, training, given.scale, corpus or dataset)


def scheme_of(given: GivenFinetuning) -> str:
    """Return `peft_scheme` in small letters. None is "none"."""
    return (given.peft_scheme or "none").lower()


def _data(training: Finetuning, dataset: Optional[str], corpus: Optional[str]) -> Any:
    sizes: dict[str, Any] = {
        "seq_length": training.seq_length,
        "global_batch_size": training.global_batch_size,
        "micro_batch_size": training.micro_batch_size,
    }
    if corpus is not None:
        return _parts.data(corpus, **sizes)
    if dataset is None:
        return run.Config(SquadDataModule, **sizes)
    return run.Config(FineTuningDataModule, dataset_root=dataset, **sizes)


def _add_adapters(made: Any) -> None:
    made.peft = run.Config(
        LoRA, target_modules=ATTENTION + MLP, dim=choices.LORA_DIM, alpha=choices.LORA_ALPHA
    )
    # NeMo: not together with LoRA.
    made.model.config.cross_entropy_loss_fusion = False
    if made.model.config.__fn_or_cls__.num_moe_experts is not None:
        # Routers are frozen: nothing to balance, and no tokens to drop. One adapter for every expert, where grouped
        # experts would share one.
        made.model.config.moe_router_load_balancing_type = "none"
        made.model.config.moe_adaptive_aux_loss = False
        made.model.config.moe_expert_capacity_factor = None
        made.model.config.moe_grouped_gemm = False
