"""Executors as NeMo-Run takes them."""

from typing import Any

import fiddle as fdl
import pytest
from nemo.lightning.pytorch.callbacks import PreemptionCallback
from nemo.lightning.run.plugins import ConfigValidationPlugin
from nemo_run.cli.api import RunContext
from nemo_run.core.execution.slurm import SlurmBatchRequest
from nemo_run.run.torchx_backend.schedulers import slurm as schedulers

from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.recipes import executors, skywork_moe_146b
from nemo_skymoe.recipes.executors import a800_slurm, local_torchrun, plugins

SITE = {
    "account": "llm",
    "partition": "a800",
    "container_image": "/images/skymoe.sqsh",
    "container_mounts": ["/data:/data"],
    "time": "24:00:00",
}


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ACCOUNT", "PARTITION", "IMAGE", "MOUNTS", "TIME"):
        monkeypatch.delenv(f"SKYMOE_SLURM_{name}", raising=False)


def test_nemo_run_finds_them_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, option in {
        "ACCOUNT": "account",
        "PARTITION": "partition",
        "IMAGE": "container_image",
        "TIME": "time",
    }.items():
        monkeypatch.setenv(f"SKYMOE_SLURM_{variable}", str(SITE[option]))
    monkeypatch.setenv("SKYMOE_SLURM_MOUNTS", "/data:/data")
    for name, factory in executors.EXECUTORS.items():
        assert fdl.build(RunContext(name="test").parse_executor(name)) == fdl.build(factory())


def test_whole_nodes_with_a_task_a_gpu() -> None:
    executor = fdl.build(a800_slurm(nodes=192, **SITE))
    assert (executor.nodes, executor.ntasks_per_node, executor.gpus_per_node) == (192, 8, 8)
    assert executor.exclusive and executor.mem == "0"
    assert executor.env_vars == executors.ENVIRONMENT
    assert executor.container_mounts == ["/data:/data"]


def test_a_sites_variables_win() -> None:
    site = {"NCCL_SOCKET_IFNAME": "bond0", "HF_HUB_OFFLINE": "0"}
    for executor in (a800_slurm(env_vars=site, **SITE), local_torchrun(env_vars=site)):
        assert executor.env_vars.items() >= site.items()
        assert executor.env_vars["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"


def test_options_come_from_the_environment_and_arguments_win(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "ACCOUNT": "a",
        "PARTITION": "p",
        "IMAGE": "i",
        "MOUNTS": "/a:/b,/c",
        "TIME": "1:00:00",
    }.items():
        monkeypatch.setenv(f"SKYMOE_SLURM_{name}", value)
    executor = a800_slurm(partition="mine")
    assert (executor.account, executor.partition, executor.container_image, executor.time) == (
        "a",
        "mine",
        "i",
        "1:00:00",
    )
    assert executor.container_mounts == ["/a:/b", "/c"]


@pytest.mark.parametrize(("option", "variable"), [("account", "ACCOUNT"), ("partition", "PARTITION"), ("container_image", "IMAGE"), ("container_mounts", "MOUNTS"), ("time", "TIME")])  # fmt: skip
def test_what_is_missing_is_named(option: str, variable: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{option} is missing, .* SKYMOE_SLURM_{variable}"):
        a800_slurm(**{name: value for name, value in SITE.items() if name != option})


def test_without_a_container() -> None:
    executor = fdl.build(a800_slurm(**{**SITE, "container_image": "none", "container_mounts": None}))
    assert executor.container_image is None and executor.srun_args is None


def test_without_a_container_no_folder_is_taken_for_nemo_runs_own() -> None:
    site: dict[str, Any] = {**SITE, "container_image": "none", "container_mounts": None}
    executor = fdl.build(a800_slurm(job_dir="/data/nemo_run", **site))
    executor.tunnel.job_dir, executor.job_dir = "/data/nemo_run/x", "/data/nemo_run/x/training"
    given: dict[str, Any] = {
        "launch_cmd": [],
        "jobs": ["training"],
        "command_groups": [["python /nemo_run/configs/training_fn_or_script"]],
        "executor": executor,
        "max_retries": 0,
        "extra_env": {"A": "/nemo_run"},
    }
    script = schedulers.SlurmBatchRequest(**given).materialize()
    assert "--output=/data/nemo_run/x/training/" in script and "export A=/nemo_run\n" in script
    assert "python /data/nemo_run/x/training/configs/training_fn_or_script" in script
    # The defect itself, for as long as it is there.
    script = SlurmBatchRequest(**given).materialize()
    assert "--output=/data/nemo_run/" not in script and "export A=/nemo_run\n" not in script


def test_the_plugins_of_nemo_fit_the_report_s_run() -> None:
    recipe, executor = (
        skywork_moe_146b.pretrain_recipe(dir="/data/runs"),
        fdl.build(a800_slurm(nodes=192, **SITE)),
    )
    before = len(recipe.trainer.callbacks)
    for plugin in [*plugins(), ConfigValidationPlugin()]:
        plugin.setup(recipe, executor)
    assert executor.signal == "15@600"
    assert len(recipe.trainer.callbacks) == before
    assert sum(callback.__fn_or_cls__ is PreemptionCallback for callback in recipe.trainer.callbacks) == 1


def test_plugins_are_options(monkeypatch: pytest.MonkeyPatch) -> None:
    assert plugins(preemption=False) == []
    monkeypatch.setattr(executors, "HAVE_RES", True)
    names = [type(plugin).__name__ for plugin in plugins(fault_tolerance=True)]
    assert names == ["PreemptionPlugin", "RequeuePlugin", "FaultTolerancePlugin"]
    monkeypatch.setattr(executors, "HAVE_RES", False)
    with pytest.raises(ConfigurationError, match="fault_tolerance needs nvidia-resiliency-ext"):
        plugins(fault_tolerance=True)


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        ("90", 5400),
        ("90:30", 5430),
        ("24:00:00", 86400),
        ("7-00", 604800),
        ("1-12:30", 131400),
        ("1-00:00:01", 86401),
    ],
)
def test_a_job_whose_end_is_as_near_as_the_signal_is_requeued(time: str, seconds: int) -> None:
    executor = fdl.build(a800_slurm(**{**SITE, "time": time}))
    with pytest.raises(ConfigurationError, match=f"time is {time}, expected more than saving_seconds"):
        executors.RequeuePlugin(saving_seconds=seconds - 60).setup(None, executor)
    executors.RequeuePlugin(saving_seconds=seconds - 61).setup(None, executor)
    assert f"- $(date +%s) <= {seconds - 1} ))" in (executor.setup_lines or "")


@pytest.mark.parametrize("time", ["soon", "1:2:3:4", "11:00"])
def test_a_time_limit_that_leaves_no_time_is_refused(time: str) -> None:
    with pytest.raises(ConfigurationError, match=f"time is '?{time}'?, expected"):
        executor = fdl.build(a800_slurm(**{**SITE, "time": time}))
        executors.RequeuePlugin(saving_seconds=600).setup(None, executor)
