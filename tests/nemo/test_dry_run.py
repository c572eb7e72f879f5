"""`nemo llm pretrain --dryrun` and a submission refuse what the training would refuse, with a non-zero exit."""

import io
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import torch
from nemo_run.cli import api

from nemo_skymoe import nemo_cli  # noqa: F401
from nemo_skymoe.architecture import Architecture
from nemo_skymoe.checkpoint.description import Description
from nemo_skymoe.checkpoint.torch_dist.context import context_files
from nemo_skymoe.ranks import run_ranks
from tests.checkpoint import megatron_files
from tests.checkpoint.fakes import random_weights
from tests.moe.worlds import spreads_key_value_heads

MOE, DENSE = "skywork_moe_146b(scale=toy)", "skywork_13b(scale=toy)"
Case = tuple[str, list[str], str | None]
CASES: tuple[Case, ...] = (
    (MOE, [], None),
    (DENSE, ["trainer.max_steps=7"], None),
    (MOE, ["trainer.max_steps=-5"], "trainer.max_steps is -5, expected a whole number of optimizer steps"),
    (MOE, ["model.config.moe_router_topk=0"], "moe_router_topk is 0, expected a whole number above 0"),
    (
        MOE,
        ["trainer.strategy.tensor_model_parallel_size=3"],
        "expected a multiple of tensor_model_parallel_size=3",
    ),
    ("skywork_moe_tinny", [], "--factory skywork_moe_tinny is unknown: did you mean skywork_moe_tiny?"),
    ("skywork_13b(stages=a.yaml)", [], "stages is now called phases, expected phases=VALUE"),
    (MOE, ["trainer.num_nodes=0"], "num_nodes is 0"),
    (DENSE, ["data.global_batch_size=0"], "global_batch_size is 0"),
    # Layouts that Megatron refuses only where it builds the model.
    (
        "skywork_13b(pipeline_parallelism=8)",
        [],
        "num_layers is 52, expected a multiple of the 8 chunks of pipeline_model_parallel_size = 8",
    ),
    (
        "skywork_13b(num_nodes=5)",
        ["trainer.strategy.tensor_model_parallel_size=5", "data.global_batch_size=4"],
        "num_attention_heads (36) must be a multiple of tensor_model_parallel_size (5)",
    ),
    (
        DENSE,
        [
            "trainer.strategy.tensor_model_parallel_size=2",
            "trainer.strategy.pipeline_model_parallel_size=1",
            "model.config.num_query_groups=1",
        ],
        None
        if spreads_key_value_heads()
        else "num_query_groups (1) must be a multiple of tensor_model_parallel_size (2)",
    ),
    (
        DENSE,
        [
            "trainer.strategy.tensor_model_parallel_size=2",
            "trainer.strategy.pipeline_model_parallel_size=1",
            "model.config.ffn_hidden_size=97",
        ],
        "ffn_hidden_size is 97, expected a multiple of tensor_model_parallel_size = 2",
    ),
)


def started_from(folder: Path) -> tuple[Case, ...]:
    """A dense checkpoint that is here, which no MoE starts from, and one that may be where the training will run."""
    dense = Architecture(
        num_layers=2, hidden_size=64, ffn_hidden_size=96, num_attention_heads=4, vocab_size=100
    )
    megatron_files.write(folder / "dense", random_weights(dense), torch.float32)
    megatron_files.write_context(folder / "dense", dense)
    llama = Description(dense, rope_theta=5e5, rms_norm_eps=1e-5, dtype="float32")
    megatron_files.write(folder / "llama", random_weights(dense), torch.float32)
    for name, content in context_files(llama, None, config=b"", padded_vocab_size=100).items():
        if not content:
            continue  # it comes from no Hugging Face folder
        (folder / "llama" / name).parent.mkdir(exist_ok=True)
        (folder / "llama" / name).write_bytes(content)
    (folder / "runs" / "mine" / "checkpoints").mkdir(parents=True)
    (folder / "runs" / "mine" / "checkpoints" / "step=4-last").symlink_to(folder / "llama")
    both = "model.config.rotary_base is 10000, expected 500000; model.config.layernorm_epsilon is 1e-06, expected 1e-05;"
    on_purpose = "model.config.differs_from_checkpoint=['rotary_base','layernorm_epsilon']"
    start = f"skywork_13b(scale=toy,resume_path={folder}/llama)"
    return (
        (start, [], both),
        (start, [on_purpose], None),
        (start, ["model.config.rotary_base=500000", "model.config.layernorm_epsilon=1e-5"], None),
        (f"skywork_13b(scale=toy,dir={folder}/runs,name=mine)", [], both),
        (f"skywork_dense(resume_path={folder}/llama)", [], None),
        (
            f"skywork_dense(resume_path={folder}/llama)",
            ["model.config.rotary_base=10000"],
            "model.config.rotary_base is 10000, expected 500000",
        ),
        (
            f"skywork_dense(resume_path={folder}/llama,edp=8)",
            [],
            "num_attention_heads (4) must be a multiple of tensor_model_parallel_size (8)",
        ),
        (f"skywork_dense(resume_path={folder}/nowhere)", [], "nowhere' is not a folder on this machine"),
        (f"skywork_moe(resume_path={folder}/llama)", [], "is dense, expected an MoE"),
        (f"skywork_moe_146b(scale=toy,resume_path={folder}/dense)", [], "is dense, expected"),
        (f"skywork_moe_146b(scale=toy,resume_path={folder}/elsewhere)", [], None),
    )


def dry_runs(cases: tuple[Case, ...]) -> list[tuple[int, str]]:
    found = []
    for factory, overrides, _ in cases:
        sys.argv = ["nemo", "llm", "pretrain", "--factory", factory, "--dryrun", *overrides]
        said = io.StringIO()
        with redirect_stdout(said), redirect_stderr(said):
            try:
                api.create_cli()(standalone_mode=True)
                code = 0
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else int(end.code is not None)
        found.append((code, " ".join(said.getvalue().split())))
    return found


def test_a_dry_run_refuses_what_the_training_would(tmp_path: Path) -> None:
    cases = CASES + started_from(tmp_path)
    (found,) = run_ranks(dry_runs, 1, cases, env={"NEMORUN_HOME": str(tmp_path)})
    for (factory, overrides, message), (code, said) in zip(cases, found, strict=True):
        case = f"{factory} {overrides}: {said[-400:]}"
        assert (code == 0) == (message is None), case
        assert message is None or message in said, case
