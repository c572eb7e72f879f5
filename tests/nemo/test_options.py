"""Overrides of `nemo` that name no option, and arguments that hold a secret."""

import pytest

from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.nemo.options import check_overrides, refuse_secrets
from nemo_skymoe.recipes import skywork_moe_146b


def test_an_unknown_option_is_refused_with_the_nearest() -> None:
    recipe = skywork_moe_146b.pretrain_recipe()
    check_overrides(
        recipe,
        [
            "trainer.max_steps=3",
            "optim.config.lr*=2",
            "data=other",
            "data.anything=1",
            "log.extra_loggers=[]",
        ],
    )
    check_overrides(
        recipe,
        [
            "model.config.moe_router_topk=2",
            "trainer.strategy.ddp.bucket_size=1",
            "trainer.callbacks=[]",
            "--yes",
        ],
    )
    for override, near in {
        "trainer.max_step=3": "trainer.max_steps",
        "max_steps=3": "trainer.max_steps",
        "max_step=3": "trainer.max_steps",
        "trainr.max_steps=3": "trainer.max_steps",
        "model.config.moe_router_topkk=2": "model.config.moe_router_topk",
        "optim.config.lrr*=2": "optim.config.lr",
        "resum.restore_config=1": "resume.restore_config",
    }.items():
        key = override.split("=")[0].rstrip("*")
        with pytest.raises(ConfigurationError, match=rf"^option {key} is unknown: did you mean {near}\?$"):
            check_overrides(recipe, ["trainer.max_epochs=1", override])


def test_a_secret_ends_the_command_without_being_repeated() -> None:
    for argument in (
        "run.executor.env_vars={'HF_TOKEN': 'swordfish'}",
        "source=https://me:swordfish@host/x",
        "factory=x(api_key=swordfish)",
    ):
        with pytest.raises(
            SystemExit, match=r"nemo: .*secrets are passed by name from the environment"
        ) as ended:
            refuse_secrets(["trainer.max_steps=3", argument])
        assert "swordfish" not in str(ended.value)
    refuse_secrets(
        ["trainer.max_steps=3", "factory=None", "--yes", "run.executor=a800_slurm", "data.tokenizer=x"]
    )
