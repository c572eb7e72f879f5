"""NeMo pretrains on a CPU and resumes bit for bit; what each of its substitutions cures."""

import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import nemo.lightning as nl
import numpy
import pytest
import torch
from megatron.core import package_info, parallel_state, tensor_parallel
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig
from megatron.core.timers import Timers
from nemo.collections import llm
from nemo.lightning import io, megatron_init, nemo_logger
from nemo.lightning.io import pl as pl_io
from nemo.lightning.pytorch.callbacks.megatron_comm_overlap import MegatronCommOverlapCallback
from nemo.lightning.pytorch.callbacks.progress_printer import ProgressPrinter

from nemo_skymoe.patches import cpu_runtime, nemo_cpu, optimizer_arguments, tensorstore_import
from nemo_skymoe.ranks import RankFailed, run_ranks
from tests.cases import every
from tests.waiting import HANG

VOCABULARY, LENGTH = 128, 32


class Tokenizer(io.IOMixin):
    """All that NeMo and Megatron's GPTDataset ask of a tokenizer."""

    vocab_size, eod, eos_id, bos_id, pad_id = VOCABULARY, 0, 0, 1, 1
    unique_identifiers = {"name": "tiny"}  # noqa: RUF012

    def __init__(self) -> None: ...


class Losses(pl.Callback):
    """Keeps the loss that NeMo logs, a value a step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.values.append(trainer.callback_metrics["reduced_train_loss"].item())


@dataclass(frozen=True)
class Case:
    ranks: int = 1
    tp: int = 1
    pp: int = 1
    distributed: bool = False
    asynchronous: bool = False
    precision: str | None = None

    def __str__(self) -> str:
        return "-".join(f"{name}={value}" for name, value in vars(self).items() if value)


def write_corpus(folder: Path) -> None:
    builder = IndexedDatasetBuilder(str(folder / "corpus.bin"), dtype=numpy.int32)
    random = numpy.random.default_rng(0)
    for _ in range(50):
        builder.add_item(torch.from_numpy(random.integers(2, VOCABULARY, 100)))
        builder.end_document()
    builder.finalize(str(folder / "corpus.idx"))


def model() -> llm.GPTModel:
    config = llm.GPTConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=2,
        ffn_hidden_size=64,
        seq_length=LENGTH,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
        transformer_layer_spec=get_gpt_layer_local_spec(),
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        cross_entropy_loss_fusion=False,
        persist_layer_norm=False,
        make_vocab_size_divisible_by=32,
    )
    return llm.GPTModel(config, tokenizer=Tokenizer())


def pretrain(case: Case, corpus: Path, folder: Path) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Four steps, or what is left of them after the last checkpoint in `folder`; losses and parameters of this rank."""
    nemo_cpu.apply()
    optimizer_arguments.apply()
    tensorstore_import.apply()
    data = llm.PreTrainingDataModule(
        paths=[str(corpus / "corpus")],
        seq_length=LENGTH,
        tokenizer=Tokenizer(),
        micro_batch_size=1,
        global_batch_size=4,
        num_workers=0,
        split="80,10,10",
        index_mapping_dir=str(corpus / "index"),
    )
    losses = Losses()
    trainer = nl.Trainer(
        accelerator="cpu",
        devices=case.ranks,
        max_steps=4,
        val_check_interval=2,
        limit_val_batches=1,
        log_every_n_steps=1,
        use_distributed_sampler=False,
        enable_checkpointing=False,
        callbacks=[losses],
        plugins=nl.MegatronMixedPrecision(precision=case.precision) if case.precision else None,
        strategy=nl.MegatronStrategy(
            tensor_model_parallel_size=case.tp,
            pipeline_model_parallel_size=case.pp,
            pipeline_dtype=torch.float32,
            ddp=DistributedDataParallelConfig(use_distributed_optimizer=case.distributed),
            ckpt_async_save=case.asynchronous,
        ),
    )
    optimizer = OptimizerConfig(optimizer="adam", lr=1e-2, use_distributed_optimizer=case.distributed)
    checkpoints = nl.ModelCheckpoint(
        monitor="reduced_train_loss", save_top_k=-1, every_n_train_steps=2, filename="{step}"
    )
    llm.pretrain(
        model=model(),
        data=data,
        trainer=trainer,
        optim=nl.MegatronOptimizerModule(config=optimizer),
        log=nl.NeMoLogger(log_dir=str(folder), name="run", use_datetime_version=False, ckpt=checkpoints),
        resume=nl.AutoResume(resume_if_exists=True, resume_ignore_no_checkpoint=True),
    )
    parameters = {name: tensor.detach().clone() for name, tensor in trainer.model.named_parameters()}
    return losses.values, parameters


# On two ranks tests/nemo/test_moe_training.py resumes an MoE with the distributed optimizer.
SHORT = [Case()]
LONG = [
    Case(ranks=2, tp=2, distributed=True),
    Case(distributed=True),
    Case(ranks=2, pp=2),
    Case(ranks=2, tp=2),
    Case(ranks=2, pp=2, distributed=True, asynchronous=True),
    Case(ranks=2, distributed=True, precision="bf16-mixed"),
]


@pytest.mark.parametrize(
    "case", SHORT + [pytest.param(case, marks=pytest.mark.long) for case in LONG], ids=str
)
def test_resume_is_exact(case: Case, tmp_path: Path) -> None:
    write_corpus(tmp_path)
    straight = run_ranks(pretrain, case.ranks, case, tmp_path, tmp_path / "straight")
    halfway = Path("run", "checkpoints", "step=1")
    shutil.copytree(tmp_path / "straight" / halfway, tmp_path / "resumed" / f"{halfway}-last")
    resumed = run_ranks(pretrain, case.ranks, case, tmp_path, tmp_path / "resumed")
    for (losses, parameters), (losses_after, parameters_after) in zip(straight, resumed, strict=True):
        assert len(losses) == 4
        assert losses[2:] == losses_after
        assert [
            name for name in parameters if not torch.equal(parameters[name], parameters_after[name])
        ] == []
    assert len(set(straight[-1][0])) == 4  # the last stage has seen four losses


def _world(function: Callable[[], Any], without: str | None) -> Any:
    substitutions = {**cpu_runtime.substitutions(), **nemo_cpu.substitutions()}
    for name, substitute in substitutions.items():
        if name != without:
            substitute()
    return function()


def draw_a_number() -> None:
    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel()
    megatron_init._set_random_seed(1)
    with tensor_parallel.get_cuda_rng_tracker().fork():
        torch.rand(1)


def restore() -> None:
    state = {"weight": torch.ones(1)}
    assert pl_io._fix_tensors_device(state) == state


def log_with_a_checkpoint_callback() -> None:
    trainer = nl.Trainer(accelerator="cpu", devices=1)
    with tempfile.TemporaryDirectory() as folder:
        nl.NeMoLogger(log_dir=folder, ckpt=nl.ModelCheckpoint()).setup(trainer)


def mock_batch() -> None:
    data = llm.MockDataModule(
        seq_length=LENGTH, tokenizer=Tokenizer(), micro_batch_size=1, global_batch_size=1
    )
    data.setup()
    mask = data._train_ds[0]["attention_mask"]
    assert torch.equal(mask[0], torch.ones(LENGTH, LENGTH).triu(1).bool())


def print_progress_on_rank_0() -> None:
    # Without the cure all ranks wait for ever, which is shown in seconds; with it, a busy machine has its time.
    cured = ProgressPrinter.log_megatron_timers.__module__ == nemo_cpu.__name__
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=HANG if cured else 3))
    if torch.distributed.get_rank() == 0:
        timers = Timers(log_level=0, log_option="minmax")
        assert ProgressPrinter().log_megatron_timers(timers) is None
    exists = [torch.distributed.get_rank() == 0]
    torch.distributed.broadcast_object_list(exists, 0)
    assert exists == [True]


def advise_on_connections() -> None:
    MegatronCommOverlapCallback()._check_num_cuda_device_max_connections()


FAILURES: list[tuple[str, int, Callable[[], Any], str]] = [
    ("nemo_cpu.random_seed", 1, draw_a_number, "model-parallel-rng is not added"),
    ("nemo_cpu.restored_tensors", 1, restore, "AssertionError: \\(False, False\\)"),
    (
        "nemo_cpu.local_checkpoints",
        1,
        log_with_a_checkpoint_callback,
        "local_checkpoint_callback could not be imported",
    ),
    ("nemo_cpu.mock_attention_mask", 1, mock_batch, "KeyError: 'attention_mask'"),
    ("nemo_cpu.progress_timers", 2, print_progress_on_rank_0, "(?i)timed out|closed by peer"),
    ("nemo_cpu.device_connections", 1, advise_on_connections, "CUDA|NVIDIA"),
]


@every(("name", "ranks", "function", "message"), FAILURES, ids=[row[0] for row in FAILURES])
def test_each_failure_is_cured(name: str, ranks: int, function: Callable[[], Any], message: str) -> None:
    if name == "nemo_cpu.local_checkpoints" and nemo_logger.HAVE_RES:
        pytest.skip("nvidia-resiliency-ext is installed: nothing to cure")
    if name == "nemo_cpu.progress_timers" and package_info.MINOR >= 16:
        pytest.skip("megatron-core 0.16 does not gather an empty list of timers")
    with pytest.raises(RankFailed, match=message):
        run_ranks(_world, ranks, function, name)
    run_ranks(_world, ranks, function, None)


def test_every_substitution_has_its_failure_here() -> None:
    assert {name for name, *_ in FAILURES} == set(nemo_cpu.substitutions())


def test_rank_0_prints_its_own_timers() -> None:
    def world() -> str | None:
        nemo_cpu.apply()
        timers = Timers(log_level=2, log_option="minmax")
        timers("optimizer").start()
        timers("optimizer").stop()
        return ProgressPrinter().log_megatron_timers(timers)

    [line] = run_ranks(world, 1)
    assert re.fullmatch(r"    optimizer: \d+\.\d\d ms\n", line)
