"""Hydra's part: groups, options, overlays, and what is refused before NeMo is imported."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.launch.composition import GROUPS, compose_groups
from tests.cases import every

CONF = Path(__file__).resolve().parents[2] / "conf"


def test_the_folders_are_the_groups() -> None:
    assert {
        folder.name for folder in CONF.iterdir() if folder.is_dir() and folder.name[0] not in "._"
    } == set(GROUPS)
    assert set(compose_groups([])) == {*GROUPS, "jobs"}


def test_groups_are_chosen_and_keys_set_whether_the_yaml_has_them_or_not() -> None:
    composed = compose_groups(
        [
            "training=skywork_moe_146b",
            "training.max_lr=1e-4",
            "training.trainer.max_steps=7",
            "jobs=[upcycle,training]",
        ]
    )
    assert composed.training.recipe == "skywork_moe_146b" and list(composed.jobs) == ["upcycle", "training"]
    assert (composed.training.max_lr, composed.training.trainer.max_steps) == (1e-4, 7)
    assert compose_groups(["upcycle.init=drop", "+upcycle.drop_ratio=0.5"]).upcycle.drop_ratio == 0.5
    assert "init" not in compose_groups(["~upcycle.init"]).upcycle


def test_a_sites_own_folder_adds_options(tmp_path: Path) -> None:
    (tmp_path / "cluster").mkdir()
    (tmp_path / "cluster" / "ours.yaml").write_text(
        "defaults: [a800_slurm]\naccount: site\nenv_vars: {A: b}\n"
    )
    composed = compose_groups(["cluster=ours", "cluster.qos=high"], tmp_path)
    assert OmegaConf.to_container(composed.cluster) == {
        "executor": "a800_slurm",
        "preemption": True,
        "account": "site",
        "env_vars": {"A": "b"},
        "qos": "high",
    }
    with pytest.raises(ConfigurationError, match="cluster our is unknown: did you mean ours"):
        compose_groups(["cluster=our"], tmp_path)


@every(
    refused=[
        (["trainin=skywork_13b"], "group trainin is unknown: did you mean training"),
        (["wandb=on"], "group wandb is unknown: expected one of cluster, conversion, data"),
        (["max_steps=3"], "an option of a group begins with the group, as in training.max_steps=VALUE"),
        (["training=skywork_moe_146"], "training skywork_moe_146 is unknown: did you mean skywork_moe_146b"),
        (["cluster=kubernetes"], "cluster kubernetes is unknown: expected one of a800_slurm, local"),
        (["stages=[upcycle,training]"], r"stages is now called jobs, expected jobs=\[...\] in its place"),
        (["jobs=[upcycle,train]"], "job train is unknown: did you mean training"),
        (["jobs=training"], r"jobs is 'training', expected a list such as \[upcycle,training\]"),
        (["jobs=[]"], "expected a list such as"),
        (["jobs=[training,training]"], "expected every job once"),
        (
            ["jobs=[training,upcycle]"],
            r"jobs is \[training,upcycle\], expected every job once, in the order conversion, upcycle, plan, ",
        ),
        (["training=skywork_13b,skywork_tiny"], "is a sweep, expected one value"),
        (["training.max_lr=[1"], "."),
        (["cluster=null"], "cluster is None, expected a name of conf/cluster"),
        (
            ["cluster=[local,a800_slurm]"],
            r"cluster is \['local', 'a800_slurm'\], expected a name of conf/cluster",
        ),
        (["~cluster"], "cluster is None, expected a name of conf/cluster"),
    ],
)
def test_what_is_unknown_or_malformed_is_refused(refused: tuple[list[str], str]) -> None:
    overrides, message = refused
    with pytest.raises(ConfigurationError, match=message) as raised:
        compose_groups(overrides)
    assert "\n" not in str(raised.value)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"config_dir is .*absent, expected an existing folder"):
        compose_groups([], tmp_path / "absent")


def test_an_overlay_with_a_group_of_its_own_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cluster").mkdir()
    (tmp_path / "cluster" / "ours.yaml").write_text("# @package _global_\nclustr: {account: x}\n")
    with pytest.raises(ConfigurationError, match="group clustr is unknown: did you mean cluster"):
        compose_groups(["cluster=ours"], tmp_path)
