"""A submission and a dry run refuse every value that the training would, in one sentence."""

from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_skymoe.architecture import Architecture
from nemo_skymoe.commands.launch import jobs
from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.launch.composition import compose_groups
from nemo_skymoe.nemo import run_numbers, schedule_length
from tests.checkpoint import megatron_files
from tests.checkpoint.fakes import random_weights

SLURM = ["cluster=a800_slurm", "training.dir=/data/runs"]
TRAINER, STRATEGY = "training.trainer", "training.trainer.strategy"
REFUSED = {
    "trainer.max_steps is -5, expected a whole number": f"{TRAINER}.max_steps=-5",
    "trainer.max_steps is 0, expected a whole number": f"{TRAINER}.max_steps=0",
    "max_steps is 2.5, expected int": f"{TRAINER}.max_steps=2.5",
    "max_steps is inf, expected int": f"{TRAINER}.max_steps=1e400",
    "max_steps is True, expected a number": f"{TRAINER}.max_steps=true",
    "max_steps is None, expected int": f"{TRAINER}.max_steps=null",
    "max_steps is {'a': 1}, expected int": f"{TRAINER}.max_steps={{a: 1}}",
    "accumulate_grad_batches is 2, expected 1": f"{TRAINER}.accumulate_grad_batches=2",
    "limit_train_batches is 10, expected 1.0, or at least the 59605": f"{TRAINER}.limit_train_batches=10",
    "training.trainer cannot be made: .* -1 for limit_val_batches": f"{TRAINER}.limit_val_batches=-1",
    "training.trainer cannot be made: .*max_epochs": f"{TRAINER}.max_epochs=-7",
    "training.trainer cannot be made: .*soon": f"{TRAINER}.max_time=soon",
    "val_check_interval is 0, expected a whole number above 0": f"{TRAINER}.val_check_interval=0",
    "log_every_n_steps is -3": f"{TRAINER}.log_every_n_steps=-3",
    "trainer.devices is 0, expected a whole number above 0": f"{TRAINER}.devices=0",
    "trainer.devices is -8": "training.num_gpus_per_node=-8",
    "trainer.devices is 'auto'": f"{TRAINER}.devices=auto",
    r"trainer.devices is \[0, 1\]": f"{TRAINER}.devices=[0,1]",
    "trainer.num_nodes is -2, expected": "training.num_nodes=-2",
    "tensor_model_parallel_size is 0, expected a whole number above 0": "training.edp=0",
    "tensor_model_parallel_size is None": f"{STRATEGY}.tensor_model_parallel_size=null",
    "pipeline_model_parallel_size is 'two'": f"{STRATEGY}.pipeline_model_parallel_size=two",
    "context_parallel_size is 0": f"{STRATEGY}.context_parallel_size=0",
    "trainer.strategy is 'ddp', expected a MegatronStrategy": f"{STRATEGY}=ddp",
    "trainer.strategy is None, expected its options": f"{STRATEGY}=null",
    "strategy.ddp is None, expected its options": f"{STRATEGY}.ddp=null",
    "training.trainer is 5, expected its options": "training.trainer=5",
    "training.data is None, expected its options": "training.data=null",
    "lr_scheduler is 'cosine', expected its options": "training.optim.lr_scheduler=cosine",
    "lr_scheduler.warmup_stepz is unknown: did you mean .*warmup_steps": "training.optim.lr_scheduler={warmup_stepz: 3}",
    "max_steps is 0, expected at least 1 step": "training.optim.lr_scheduler.max_steps=0",
    "optim.config.lr is -1.0, expected a finite number above 0": "training.optim.config.lr=-1",
    "optim.config.lr is inf": "training.optim.config.lr=1e400",
    "optim.config.lr is None": "training.optim.config.lr=null",
    "optim.config.clip_grad is -1.0": "training.optim.config.clip_grad=-1",
    "max_lr is 0.0, expected a finite number above 0": "training.max_lr=0",
    "min_lr is 1.0, expected 0 to max_lr": "training.min_lr=1",
    "tokens is inf, expected a finite number above 0": "training.tokens=1e400",
    "tokens is -1000000000.0": "training.tokens=-1e9",
    "seq_length is 0, expected a finite number above 0": "training.seq_length=0",
    "global_batch_size is -4": "training.global_batch_size=-4",
    "global_batch_size is 2047, expected a multiple of data.micro_batch_size=1 x 32": "training.global_batch_size=2047",
    "data.micro_batch_size is 0": "training.micro_batch_size=0",
    "hidden_size is -1": "model.hidden_size=-1",
    "num_attention_heads is 0": "model.num_attention_heads=0",
    "vocab_size is 0": "model.vocab_size=0",
    "save_top_k=-5": "training.log.ckpt.save_top_k=-5",
    "similarity_interval is -1": "training.similarity_interval=-1",
    "training.recipe None is unknown": "training.recipe=null",
    "optim.config.optimizer is 'adamm', expected adam or sgd": "training.optim.config.optimizer=adamm",
    "data.num_workers is -1, expected a whole number": "training.data.num_workers=-1",
    "cluster.retries is -1, expected a whole number of at least 0": "cluster.retries=-1",
    "saving_seconds is -1, expected a whole number of at least 1": "cluster.saving_seconds=-1",
    "time is 'soon', expected SLURM's form": "cluster.time=soon",
    "cluster.executor .* is unknown": "cluster.executor={_target_: os.system}",
}  # fmt: skip


def made(*overrides: str) -> Any:
    heads = [override.partition("=")[0] for override in overrides]
    defaults = ["training=skywork_moe_146b", *SLURM]
    kept = [default for default in defaults if default.partition("=")[0] not in heads]
    return jobs(compose_groups([*kept, *overrides]))


def test_a_submission_refuses_what_the_training_would() -> None:
    for message, override in REFUSED.items():
        with pytest.raises(ConfigurationError, match=message) as refused:
            made(override)
        assert "\n" not in str(refused.value), override
    with pytest.raises(ConfigurationError, match="num_attention_heads is 0, expected a whole number above 0"):
        made("training=skywork_13b", "model.num_attention_heads=0")
    for allowed in ("log_every_n_steps=0", "max_steps=3", "limit_train_batches=59605"):
        made(f"{TRAINER}.{allowed}")
    made("training.optim.lr_scheduler=null")


def test_a_submission_says_what_the_training_would(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    for module in (schedule_length, run_numbers):
        monkeypatch.setattr(module.logging, "warning", said.append)
    given = ["training=skywork_moe_1p8b", f"{TRAINER}.max_steps=4386", f"{TRAINER}.max_time=00:01:00:00"]
    made(*given, "training.optim.config.min_lr=0")
    ends, early, fitted = said
    assert "optim.config.min_lr is 0, which this schedule does not read: its shape ends at" in ends
    assert early.startswith("trainer.max_time (Timer) may end the run before the 4386 steps")
    assert "trainer.max_steps=4386: its warmup_steps is 119 instead of 2000 and decay_steps is 142" in fitted


def test_a_checkpoint_to_start_from_is_checked_where_it_is(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {
        "num_layers": 4,
        "hidden_size": 160,
        "ffn_hidden_size": 432,
        "num_attention_heads": 4,
    }
    dense = Architecture(**sizes, vocab_size=32)
    megatron_files.write(tmp_path / "dense", random_weights(dense), torch.float32)
    here = ["training=skywork_moe_tiny", "cluster=local", f"training.dir={tmp_path}"]
    with pytest.raises(ConfigurationError, match="is dense, expected 16 experts: upcycle it first"):
        made(*here, f"training.resume_path={tmp_path}/dense")
    with pytest.raises(ConfigurationError, match=r"'.*/absent', has no weights folder"):
        made(*here, f"training.resume_path={tmp_path}/absent")
    output = [f"upcycle.source={tmp_path}/dense", f"upcycle.output_path={tmp_path}/absent"]
    made("jobs=[upcycle,training]", *here, *output)
    made("training.resume_path=/data/on_another_machine")
