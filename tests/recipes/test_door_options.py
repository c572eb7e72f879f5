"""The committed table of options is that of NeMo's recipes, all of them and nothing else."""

import os
from pathlib import Path
from typing import Any

import fiddle as fdl
from nemo.lightning.pytorch.plugins.mixed_precision import update_config_with_dtype_overrides
from nemo.utils import AppState

from nemo_skymoe.nemo.callbacks import SkyworkMoECallback
from nemo_skymoe.nemo.model import SkyworkMoEModel
from nemo_skymoe.nemo.recipe_check import built
from nemo_skymoe.recipes._trainer import overlaps_communication
from tests import door_options
from tests.door_options import Options, fields_of, plain, rates_at
from tests.recipes.factories import FACTORIES, VARIANTS, label

INITIAL_SEED = 1234
"""NeMo's own: `nemo.lightning.megatron_init` seeds every training with it."""


def test_the_table_has_the_options_of_nemos_recipes(workplace: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(workplace)
    found = {label(variant): nemo_options(*variant) for variant in VARIANTS}
    if os.environ.get("SKYMOE_GOLDEN") == "write":
        door_options.write(found)
    table = door_options.read()
    assert found.keys() == table.keys()
    for name, options in found.items():
        assert options == table[name], name


def nemo_options(command: str, arguments: dict[str, Any]) -> Options:
    """All options that a training of NeMo has once it is set up, as far as that takes no process group."""
    given = {"resume_path": door_options.CHECKPOINT} if command.startswith("finetune") else {}
    recipe = FACTORIES[command](**given, **arguments)
    config, trainer, optim = (built(getattr(recipe, part), part) for part in ("model", "trainer", "optim"))
    model, strategy, ddp, optimizer = (
        config.config,
        trainer.strategy,
        trainer.strategy.ddp_config,
        optim.config,
    )
    for option, value in vars(strategy.parallelism).items():
        if hasattr(model, option):
            setattr(model, option, value)
    precision = built(recipe.trainer.plugins, "plugins").dtype_config
    for part in (model, optimizer, ddp):
        update_config_with_dtype_overrides(precision, part)
    _overlap(recipe, trainer, model, optimizer, ddp)
    pipeline = fdl.ordered_arguments(recipe).get("pipeline")
    model.pipeline_model_parallel_layout = None if pipeline is None else pipeline.layout
    return {
        **fields_of("model", model),
        **fields_of("optimizer", optimizer),
        **fields_of("ddp", ddp),
        **_training(recipe),
        **_rates(recipe, optim),
        "pipeline.recompute": None if pipeline is None else plain(getattr(pipeline, "recompute", None)),
    }


def _overlap(recipe: Any, trainer: Any, model: Any, optimizer: Any, ddp: Any) -> None:
    """What NeMo's callback sets when a training begins."""
    if not overlaps_communication(recipe.trainer):
        return
    [callback] = [one for one in trainer.callbacks if type(one).__name__ == "MegatronCommOverlapCallback"]
    sizes = trainer.strategy.parallelism
    callback._apply_cfgs(callback._get_model_comm_overlap_cfgs(sizes), model)
    world = trainer.num_nodes * trainer.num_devices
    parallel = sizes.tensor_model_parallel_size * sizes.pipeline_model_parallel_size
    AppState().data_parallel_size = world // parallel
    for part in (optimizer, ddp):
        callback._apply_cfgs(callback._get_optimizer_overlap_cfgs(sizes), part)


def _training(recipe: Any) -> Options:
    arguments, trainer, data = fdl.ordered_arguments(recipe), recipe.trainer, recipe.data
    peft = arguments.get("peft")
    return {
        "train.steps": trainer.max_steps,
        "train.global_batch_size": data.global_batch_size,
        "train.micro_batch_size": data.micro_batch_size,
        "train.ranks": trainer.num_nodes * trainer.devices,
        "train.initial_seed": INITIAL_SEED,
        "validation.interval": trainer.val_check_interval,
        "validation.batches": trainer.limit_val_batches,
        "log.interval": trainer.log_every_n_steps,
        "log.similarity_interval": _similarity_interval(recipe),
        "log.name": recipe.log.name,
        "checkpoint.folder": f"{recipe.log.log_dir}/{recipe.log.name}",
        "checkpoint.interval": recipe.log.ckpt.every_n_train_steps,
        "checkpoint.kept": recipe.log.ckpt.save_top_k,
        "checkpoint.start": getattr(recipe.resume.restore_config, "path", None),
        "data.corpus": fdl.ordered_arguments(data).get("corpus"),
        "data.seed": getattr(data, "seed", None),
        "data.seq_length": data.seq_length,
        "data.vocabulary": _vocabulary(data),
        "peft.target_modules": None if peft is None else plain(peft.target_modules),
        "peft.dim": None if peft is None else peft.dim,
        "peft.alpha": None if peft is None else peft.alpha,
    }


def _similarity_interval(recipe: Any) -> int | None:
    """That of the callback, which a training of an MoE is given where its recipe has none."""
    for callback in recipe.trainer.callbacks:
        if callback.__fn_or_cls__ is SkyworkMoECallback:
            return callback.similarity_interval
    moe = recipe.model.__fn_or_cls__ is SkyworkMoEModel and "peft" not in fdl.ordered_arguments(recipe)
    return SkyworkMoECallback().similarity_interval if moe else None


def _vocabulary(data: Any) -> int | None:
    """The rows of the embedding with random tokens. The null tokenizer adds an end of document."""
    size = getattr(fdl.ordered_arguments(data).get("tokenizer"), "vocab_size", None)
    return None if size is None else size + 1


def _rates(recipe: Any, optim: Any) -> Options:
    schedule = optim.lr_scheduler
    steps = rates_at(recipe.trainer.max_steps, schedule.warmup_steps, schedule.decay_steps)
    rates = {step: optim.config.lr * schedule.factor(step) for step in steps}
    multiplier = getattr(optim, "lr_mult", 1.0) or 1.0
    return {
        "rates.all": [[step, float(f"{rate:.9e}")] for step, rate in rates.items()],
        "rates.experts": [[step, float(f"{multiplier * rate:.9e}")] for step, rate in rates.items()],
        "rates.weight_decay": optim.config.weight_decay,
    }
