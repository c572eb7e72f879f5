"""What cannot work is refused before any work starts, in one sentence that names the option."""

from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_skymoe.bridge.checks import check
from nemo_skymoe.bridge.training import finetune, pretrain
from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.durable.errors import CheckpointError
from nemo_skymoe.ranks import RankFailed, run_ranks
from tests.bridge.tiny import DENSE, tiny_config, tiny_provider
from tests.cases import every

EDP = {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2, "expert_tensor_parallel_size": 1}
# Ranks, options of the model, options of other parts, and the beginning of the message.
REFUSED: list[tuple[int, dict[str, Any], dict[str, dict[str, Any]], str]] = [
    (1, {}, {"dist": {"use_decentralized_pg": True}}, "dist.use_decentralized_pg is True, expected False"),
    (1, {}, {"dist": {"use_megatron_fsdp": True}}, "dist.use_megatron_fsdp is True, expected False"),
    (1, {}, {"ddp": {"use_megatron_fsdp": True}}, "ddp.use_megatron_fsdp is True, expected False"),
    (1, {}, {"dist": {"use_torch_fsdp2": True}}, "dist.use_torch_fsdp2 is True, expected False"),
    (1, {}, {"checkpoint": {"ckpt_format": "fsdp_dtensor"}}, "checkpoint.ckpt_format is 'fsdp_dtensor', expected 'torch_dist'"),
    (1, {}, {"checkpoint": {"custom_manager_class": "mine.Manager"}}, "checkpoint.custom_manager_class is 'mine.Manager'"),
    (1, {"overlap_moe_expert_parallel_comm": True}, {}, "model.overlap_moe_expert_parallel_comm is True, expected False"),
    (1, {"moe_expert_rank_capacity_factor": 1.5}, {}, "model.moe_expert_rank_capacity_factor is 1.5, expected"),
    (1, {"moe_paged_stash": True}, {}, "model.moe_paged_stash is True, expected False"),
    (1, {"seq_length": 64}, {}, "model.seq_length is 64 and dataset.seq_length is 32, expected the same"),
    (3, EDP, {}, "3 ranks were started, expected a multiple of model.tensor_model_parallel_size=2"),
    (2, {"expert_model_parallel_size": 4, "moe_edp": False}, {}, "2 ranks were started, expected a multiple of model.expert_tensor_parallel_size=1 x model.expert_model_parallel_size=4"),
    (3, {}, {}, "train.global_batch_size is 4, expected a multiple of train.micro_batch_size=1 x 3 data-parallel ranks"),
    (2, {"tensor_model_parallel_size": 2, "moe_edp": False}, {}, "sequence_parallel is False with tensor_model_parallel_size=2"),
    (2, {**EDP, "edp_dispatcher": "alltoall"}, {}, "edp_dispatcher"),
    (2, {**EDP, "expert_model_parallel_size": 1}, {}, "moe_edp makes the expert group the tensor-parallel group"),
    (2, {**EDP, "moe_token_dispatcher_type": "flex"}, {}, "moe_token_dispatcher_type='flex' needs DeepEP's groups"),
    (1, {"num_moe_experts": 2}, {}, "num_moe_experts=2 with moe_router_logit_norm_scale"),
    (1, {"moe_router_load_balancing_type": "none"}, {}, "moe_adaptive_aux_loss needs moe_router_load_balancing_type='aux_loss'"),
    (1, {"mtp_num_layers": 1}, {}, "mtp_num_layers is 1, expected None"),
    (1, {"cuda_graph_impl": "transformer_engine", "use_te_rng_tracker": True}, {}, "moe_adaptive_aux_loss changes a coefficient every step"),
]  # fmt: skip


@every(("ranks", "model", "overrides", "message"), REFUSED)
def test_what_cannot_work_is_refused_by_name(
    ranks: int,
    model: dict[str, Any],
    overrides: dict[str, dict[str, Any]],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    with pytest.raises(ConfigurationError) as refused:
        check(tiny_config(model=tiny_provider(**model), overrides=overrides))
    said = str(refused.value)
    assert said.startswith(message) and "\n" not in said


def test_a_dense_model_may_have_what_concerns_routers_alone():
    for section, option in (("dist", "use_torch_fsdp2"), ("checkpoint", "custom_manager_class")):
        config = tiny_config(model=tiny_provider(DENSE))
        values = {"use_torch_fsdp2": True, "custom_manager_class": "mine.Manager"}
        setattr(getattr(config, section), option, values[option])
        check(config)


NO_GPU_TO_SAVE = {"checkpoint": {"async_save": True, "async_strategy": "nvrx"}}


@every(
    ("start", "overrides", "message"),
    [
        (pretrain, {"dist": {"use_torch_fsdp2": True}}, r"dist\.use_torch_fsdp2 is True, expected False"),
        (pretrain, NO_GPU_TO_SAVE, r"checkpoint\.async_strategy is 'nvrx', whose worker needs a GPU"),
        (finetune, {}, r"checkpoint\.pretrained_checkpoint is None and checkpoint\.load '.*' has no"),
    ],
)
def test_nothing_is_left_behind(
    start: Any, overrides: dict[str, dict[str, Any]], message: str, tmp_path: Path
):
    """The refusal comes from the functions themselves, before Bridge makes a folder or a process group."""

    def world() -> None:
        start(tiny_config(tmp_path / "run", overrides=overrides))

    with pytest.raises(RankFailed, match=f"ConfigurationError: {message}"):
        run_ranks(world, 1)
    assert not (tmp_path / "run").exists()


def test_a_start_that_does_not_exist_is_refused(tmp_path: Path):
    missing = tmp_path / "missing"
    with pytest.raises(ConfigurationError, match=r"pretrained_checkpoint|does not exist"):
        check(tiny_config(overrides={"checkpoint": {"pretrained_checkpoint": str(missing)}}))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigurationError, match="has no checkpoint of Megatron-Bridge"):
        check(tiny_config(overrides={"checkpoint": {"pretrained_checkpoint": str(tmp_path / "empty")}}))


def test_a_checkpoint_that_would_run_something_is_refused(tmp_path: Path):
    """Bridge reads the tracker with `weights_only`, and Megatron pickles of tensors without."""

    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "touched",))

    def saved() -> None:
        pretrain(tiny_config(tmp_path / "run", steps=1))

    run_ranks(saved, 1)
    torch.save({"step": Evil()}, tmp_path / "run" / "iter_0000001" / "common.pt")
    with pytest.raises(CheckpointError, match=r"common\.pt"):
        check(tiny_config(tmp_path / "run", steps=2))
    assert not (tmp_path / "touched").exists()
