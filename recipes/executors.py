"""The executors of recipes: SLURM nodes of 8 A800 (`run.executor=a800_slurm`), or torchrun here (`local_torchrun`)."""

import os
import signal
from dataclasses import dataclass
from typing import Any, Optional

import fiddle as fdl
import nemo_run as run

from nemo_skymoe import gpus
from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.patches import executor_values, unified_memory

unified_memory.apply()  # before NeMo imports Megatron
executor_values.apply()

from nemo.lightning.pytorch.callbacks import PreemptionCallback  # noqa: E402
from nemo.lightning.run.plugins import HAVE_RES, FaultTolerancePlugin, PreemptionPlugin  # noqa: E402

from nemo_skymoe.recipes import executor_checks  # noqa: E402

executor_checks.install()

PREFIX = "SKYMOE_SLURM_"
SAVING_SECONDS = 600
"""Seconds between the signal and the end. The value is ours: each of 1536 GPUs writes about 1.3 GB of a 146B
checkpoint."""


@dataclass(frozen=True)
class Variable:
    """One environment variable of every rank, and why it is not left alone."""

    name: str
    value: str
    why: str


VARIABLES = (
    Variable(
        "CUDA_DEVICE_MAX_CONNECTIONS",
        "1",
        "One hardware queue: kernels start in launch order, so that tensor-parallel messages overlap with compute.",
    ),
    Variable(
        "PYTORCH_CUDA_ALLOC_CONF",
        "expandable_segments:True",
        "Experts get another number of tokens every step; without this the allocator's memory fragments.",
    ),
    Variable(
        "TORCH_NCCL_AVOID_RECORD_STREAMS",
        "1",
        "Buffers of finished messages are freed at once; else many micro-batches' stay allocated.",
    ),
    Variable(
        "TOKENIZERS_PARALLELISM", "False", "Data loaders fork; tokenizers' threads do not survive that."
    ),
    Variable("HF_HUB_OFFLINE", "1", "Files come from the mounts: 1536 ranks do not ask the Hub for them."),
)
ENVIRONMENT = {variable.name: variable.value for variable in VARIABLES}


@run.cli.factory
def a800_slurm(
    nodes: int = 1,
    gpus_per_node: int = 8,
    account: Optional[str] = None,
    partition: Optional[str] = None,
    container_image: Optional[str] = None,
    container_mounts: Optional[list[str]] = None,
    time: Optional[str] = None,
    job_dir: Optional[str] = None,
    env_vars: Optional[dict[str, Optional[str]]] = None,
) -> run.Config[run.SlurmExecutor]:
    """Whole nodes, a task a GPU, in a container by pyxis; submitted on the machine that this runs on.

    Account, partition, container_image, container_mounts and time may come from the environment, as
    SKYMOE_SLURM_ACCOUNT, _PARTITION, _IMAGE, _MOUNTS (comma-separated HOST:CONTAINER) and _TIME.
    `container_image=none` runs what is installed on the nodes.
    `job_dir` holds scripts and logs, and is NEMORUN_HOME/experiments by default. `env_vars` are a site's own, such as
    NCCL_SOCKET_IFNAME. If a value is None, every rank gets the variable from the environment of the launch.
    Everything is quoted in the scripts except `setup_lines`, which are bash.

    Raises:
        ConfigurationError: One of them is missing, or is a secret.
    """
    image = _given("container_image", container_image, "IMAGE")
    mounts = container_mounts or [part for part in os.environ.get(f"{PREFIX}MOUNTS", "").split(",") if part]
    if image == "none":
        container: dict[str, Any] = {}
    else:
        if not mounts:
            raise _missing("container_mounts", "MOUNTS")
        # Packages in a home directory would shadow the container's; Megatron compiles its dataset index in it.
        flags = ["--no-container-mount-home", "--container-writable"]
        container = {"container_image": image, "container_mounts": mounts, "srun_args": flags}
    made = run.Config(
        run.SlurmExecutor,
        account=_given("account", account, "ACCOUNT"),
        partition=_given("partition", partition, "PARTITION"),
        time=_given("time", time, "TIME"),
        nodes=nodes,
        job_name_prefix="skymoe.",
        ntasks_per_node=gpus_per_node,
        gpus_per_node=gpus_per_node,
        mem="0",
        exclusive=True,
        env_vars=ENVIRONMENT | (env_vars or {}),
        tunnel=run.Config(run.LocalTunnel, job_dir=job_dir or ""),
        packager=run.Config(run.Packager),  # the image has the code; the default would archive a git checkout
        additional_parameters={"kill_on_invalid_dep": "yes"},
        **container,
    )
    executor_checks.check_executor(fdl.build(made))
    return made


@run.cli.factory
def local_torchrun(
    gpus_per_node: Optional[int] = None, env_vars: Optional[dict[str, Optional[str]]] = None
) -> run.Config[run.LocalExecutor]:
    """Use torchrun on this machine, with a rank for every GPU, or with `gpus_per_node` ranks, on CPUs without a GPU.

    Raises:
        ConfigurationError: `env_vars` has a name that is none, or a secret.
    """
    found = len(gpus.visible())
    made = run.Config(
        run.LocalExecutor,
        ntasks_per_node=gpus_per_node or found or 1,
        launcher="torchrun",
        env_vars=ENVIRONMENT | ({} if found else unified_memory.ENVIRONMENT) | (env_vars or {}),
    )
    executor_checks.check_executor(fdl.build(made))
    return made


EXECUTORS = {"a800_slurm": a800_slurm, "local_torchrun": local_torchrun}


@dataclass(kw_only=True)
class RequeuePlugin(run.Plugin):
    """Requeues a job that its time limit or a preemption has stopped, although it left with exit code 0.

    SLURM does so itself only where a preempted job does not end within its grace time. A cancelled job stays cancelled.
    """

    saving_seconds: int = SAVING_SECONDS

    def setup(self, task: Any, executor: run.Executor) -> None:
        """Add it to the batch script. A run that has reached its last step is not requeued."""
        if isinstance(executor, run.SlurmExecutor):
            near = self.saving_seconds + 60  # SLURM sends the signal up to a minute early
            if executor_checks.slurm_seconds(executor.time) <= near:
                raise ConfigurationError(
                    f"time is {executor.time}, expected more than saving_seconds ({self.saving_seconds}) and a minute"
                )
            executor.setup_lines = "\n".join(filter(None, [executor.setup_lines, _REQUEUE.format(near=near)]))


@dataclass(kw_only=True)
class SignalPlugin(run.Plugin):
    """SIGTERM to every rank before the time limit. The training itself saves and leaves then."""

    saving_seconds: int = SAVING_SECONDS

    def setup(self, task: Any, executor: run.Executor) -> None:
        """Add it to the batch script."""
        if isinstance(executor, run.SlurmExecutor):
            executor.signal = f"{signal.SIGTERM.value}@{self.saving_seconds}"


_REQUEUE = """\
requeue_if_stopped() {{
    read -r state end preempted < <(squeue --noheader --job "$SLURM_JOB_ID" --Format State,EndTime,PreemptTime)
    [[ $state == RUNNING ]] || return 0
    if [[ $preempted == *:* ]] || (( $(date --date "$end" +%s) - $(date +%s) <= {near} )); then
        scontrol requeue "$SLURM_JOB_ID"
    fi
}}
trap requeue_if_stopped EXIT"""


def plugins(
    preemption: bool = True,
    fault_tolerance: bool = False,
    saving_seconds: int = SAVING_SECONDS,
    *,
    script: bool = False,
) -> list[run.Plugin]:
    """NeMo's plugins for long runs.

    Args:
        preemption: SIGTERM `saving_seconds` before the time limit; the recipe's PreemptionCallback saves and stops, and
            the job is requeued.
        fault_tolerance: ft_launcher in place of plain tasks: hung and dead ranks are found, the job restarted in
            place, then requeued.
        saving_seconds: What saving a checkpoint may take.
        script: Whether the task is a command line, which handles the signal itself.

    Raises:
        ConfigurationError: `fault_tolerance` with a command line, or without nvidia-resiliency-ext, which NeMo's containers have; or
            `saving_seconds` that is no time.
    """
    if fault_tolerance and script:
        raise ConfigurationError(
            "fault_tolerance is True, expected False with frontdoor=bridge: its ranks are SLURM's tasks"
        )
    if fault_tolerance and not HAVE_RES:
        raise ConfigurationError(
            "fault_tolerance needs nvidia-resiliency-ext on the machine that launches: not found"
        )
    if type(saving_seconds) is not int or saving_seconds < 1:
        raise ConfigurationError(
            f"saving_seconds is {saving_seconds!r}, expected a whole number of at least 1"
        )
    chosen: list[run.Plugin] = []
    if preemption and script:
        chosen += [SignalPlugin(saving_seconds=saving_seconds), RequeuePlugin(saving_seconds=saving_seconds)]
    elif preemption:
        # The recipes' own callback: the plugin's default would be a second one.
        chosen.append(
            PreemptionPlugin(preempt_time=saving_seconds, callbacks=[run.Config(PreemptionCallback)])
        )
        chosen.append(RequeuePlugin(saving_seconds=saving_seconds))
    if fault_tolerance:
        chosen.append(FaultTolerancePlugin())
    return chosen


def _given(option: str, value: Optional[str], variable: str) -> str:
    found = value or os.environ.get(PREFIX + variable)
    if not found:
        raise _missing(option, variable)
    return found


def _missing(option: str, variable: str) -> ConfigurationError:
    return ConfigurationError(f"{option} is missing, expected it as an option or in {PREFIX}{variable}")
