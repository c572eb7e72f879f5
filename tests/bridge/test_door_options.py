"""Both front doors train with the same options, recipe by recipe; every difference is named here with its reason."""

import copy
import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from megatron.bridge.training.config import ConfigContainer
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig

from nemo_skymoe.bridge.checks import settle
from nemo_skymoe.bridge.data import CorpusConfig
from nemo_skymoe.bridge.provider import SkyworkProvider
from nemo_skymoe.bridge.recipes import configured
from nemo_skymoe.data.corpus import build_corpus
from nemo_skymoe.experiments import catalogue
from tests import door_options
from tests.door_options import Options, fields_of, plain, rates_at

TABLE = door_options.read()
TASKS = {("pretrain", None): "pretrain", ("finetune", None): "peft", ("finetune", "none"): "sft"}

FP8, CUDA_GRAPHS = "no recipe trains in 8 bits", "no recipe captures CUDA graphs"
DIFFERENT = {
    "model.vocab_size": "NeMo's model has that of its tokenizer alone; both doors train with the tokenizer's",
    "model.transformer_impl": "NeMo decides by the layer spec alone; here neither door has Transformer Engine",
    "model.use_transformer_engine_op_fuser": "None and False are the same to Megatron",
    "model.distribute_saved_activations": "None and False are the same to Megatron",
    "model.mtp_loss_scaling_factor": "no recipe predicts several tokens",
    "model.moe_deepep_num_sms": "no recipe uses DeepEP",
    "model.tp_comm_bootstrap_backend": "no recipe overlaps the messages of tensor parallelism",
    "model.fp8_recipe": FP8,
    "optimizer.fp8_recipe": FP8,
    "model.cuda_graph_use_single_mempool": CUDA_GRAPHS,
    "model.cuda_graph_scope": CUDA_GRAPHS,
    "ddp.delay_wgrad_compute": "None and False are the same to Megatron",
}
"""Options with another value than in NeMo's door, and why that changes nothing."""
NEMO_ALONE = {
    "ddp.preserve_fp32_weights": "gone in megatron-core 0.19; it was for Megatron's FSDP",
    "model.async_tensor_model_parallel_allreduce": "gone in megatron-core 0.19, where it was deprecated before",
    "model.moe_extended_tp": "gone in megatron-core 0.19; no recipe used it",
    "model.moe_use_legacy_grouped_gemm": "gone in megatron-core 0.19; no recipe used it",
    "model.data_step_fn": "NeMo's own step, for which Bridge has forward_step",
    "model.forward_step_fn": "NeMo's own step, for which Bridge has forward_step",
    "model.generation_config": "NeMo's own, for its export",
}
"""Options that only NeMo 2.7 with megatron-core 0.15 has, and why nothing is missing."""

SETTLED = {"model.cuda_graph_modules": CUDA_GRAPHS, "model.inference_cuda_graph_scope": CUDA_GRAPHS}
"""Options of megatron-core 0.19 alone that Megatron itself sets to another value than their default."""


def bridge_name(label: str) -> tuple[str, dict[str, Any]]:
    """The recipe of Bridge for a label of the table, and its arguments."""
    command, *given = label.split(",")
    kind, _, model = command.partition("-")
    arguments: dict[str, Any] = dict(each.split("=", 1) for each in given)
    task = TASKS[kind, arguments.pop("peft_scheme", None)]
    types = {"train_only_ffn": lambda text: text == "True", "sources": int}
    return f"{model}_{task}_config", {name: types.get(name, str)(value) for name, value in arguments.items()}


def test_every_recipe_is_in_both_doors() -> None:
    compared = {catalogue.full_name(bridge_name(label)[0]) for label in TABLE}
    assert compared == {*catalogue.FIXED}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a corpus where the recipes look for it."""
    folder = tmp_path_factory.mktemp("doors")
    build_corpus(folder / "runs" / "corpus", 512, 0.3, files=["argparse.py", "typing.py", "ast.py"])
    (folder / door_options.CHECKPOINT).mkdir()
    return folder


def test_the_doors_differ_in_nothing_that_is_not_named(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workplace)
    different: dict[str, list[str]] = {}
    missing: set[str] = set()
    new: dict[str, Any] = {}
    for label, expected in TABLE.items():
        found = bridge_options(*bridge_name(label), monkeypatch)
        for option, value in expected.items():
            if option not in found:
                missing.add(option)
            elif found[option] != value and not _of_a_router(option, expected):
                different.setdefault(option, []).append(f"{label}: {value!r} -> {found[option]!r}")
        for option in found.keys() - expected.keys():
            new.setdefault(option, found[option])
    assert {option: lines for option, lines in different.items() if option not in DIFFERENT} == {}
    assert missing - {*NEMO_ALONE} == set()
    assert ({*DIFFERENT} - {*different}, {*NEMO_ALONE} - missing) == (set(), set()), "no difference any more"
    changed = {option: value for option, value in new.items() if value != upstream(option)}
    assert {option: value for option, value in changed.items() if option not in SETTLED} == {}


def _of_a_router(option: str, options: Options) -> bool:
    """A dense model has no router, and the doors leave its options as their Megatron has them."""
    return options["model.num_moe_experts"] is None and option.startswith("model.moe_")


def upstream(option: str) -> Any:
    """The default of an option in Megatron or Bridge, which the recipes leave alone."""
    section, _, name = option.partition(".")
    classes = {"model": SkyworkProvider, "optimizer": OptimizerConfig, "ddp": DistributedDataParallelConfig}
    for field in dataclasses.fields(classes[section]):
        if field.name == name:
            made = field.default_factory
            return plain(field.default if made is dataclasses.MISSING else made())
    return None


def bridge_options(name: str, arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Options:
    """All options that a training of Bridge has once it is set up, as far as that takes no process group."""
    full = catalogue.full_name(name)
    given = {} if "_pretrain_" in full else {"resume_path": door_options.CHECKPOINT}
    chosen = catalogue.RECIPES[full](**given, **arguments)
    config = configured(chosen)
    ranks = chosen.run.num_nodes * chosen.run.num_gpus_per_node
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    if config.checkpoint.pretrained_checkpoint is not None:
        Path(config.checkpoint.pretrained_checkpoint).mkdir(exist_ok=True)
    settle(config)
    layout = copy.copy(config.model.pipeline_model_parallel_layout)
    model: Any = config.model
    model.pipeline_model_parallel_layout = getattr(layout, "input_data", layout)
    return {
        **fields_of("model", model),
        **fields_of("optimizer", config.optimizer),
        **fields_of("ddp", config.ddp),
        **_training(config, ranks, model),
        **_rates(config),
        "pipeline.recompute": plain(model.pipeline_recompute),
    }


def _training(config: ConfigContainer, ranks: int, model: Any) -> Options:
    dataset: Any = config.dataset
    train: Any = config.train
    peft: Any = config.peft
    text = isinstance(dataset, CorpusConfig)
    experts = model.num_moe_experts is not None and peft is None
    return {
        "train.steps": train.train_iters,
        "train.global_batch_size": train.global_batch_size,
        "train.micro_batch_size": train.micro_batch_size,
        "train.ranks": ranks,
        "train.initial_seed": config.rng.seed,
        "validation.interval": config.validation.eval_interval,
        "validation.batches": config.validation.eval_iters,
        "log.interval": config.logger.log_interval,
        "log.similarity_interval": config.logger.similarity_interval if experts else None,
        "log.name": Path(str(config.checkpoint.save)).name,
        "checkpoint.folder": config.checkpoint.save,
        "checkpoint.interval": config.checkpoint.save_interval,
        "checkpoint.kept": config.checkpoint.most_recent_k,
        "checkpoint.start": config.checkpoint.pretrained_checkpoint,
        "data.corpus": dataset.corpus if text else None,
        "data.seed": dataset.random_seed
        if text
        else getattr(dataset, "seed", None),  # random tokens have none in NeMo
        "data.seq_length": dataset.seq_length,
        "data.vocabulary": config.tokenizer.vocab_size,
        "peft.target_modules": None if peft is None else plain(peft.target_modules),
        "peft.dim": None if peft is None else peft.dim,
        "peft.alpha": None if peft is None else peft.alpha,
    }


def _rates(config: ConfigContainer) -> Options:
    scheduler: Any = config.scheduler
    optimizer: Any = config.optimizer
    multiplier = getattr(config.optimizer_config_override_provider, "multiplier", 1.0)
    experts = {"max_lr": multiplier * optimizer.lr, "min_lr": multiplier * optimizer.min_lr, "lr": 0.0}
    groups: list[dict[str, Any]] = [{"lr": 0.0}, experts]
    made = scheduler.provide(optimizer, SimpleNamespace(param_groups=groups))
    batch = config.train.global_batch_size
    steps = rates_at(config.train.train_iters or 0, scheduler.lr_warmup_iters, scheduler.lr_final_decay_iters)
    found: list[list[list[float]]] = [[], []]
    for step in steps:
        made.num_steps = step * batch
        made.step(0)
        for rates, group in zip(found, groups, strict=True):
            rates.append([step, float(f"{group['lr']:.9e}")])
    return {"rates.all": found[0], "rates.experts": found[1], "rates.weight_decay": made.get_wd()}
