"""Values that a user gives an executor arrive byte for byte in SLURM's script and in the processes of this machine.

Upstream: nemo_run/core/execution/slurm.py and nemo_run/run/torchx_backend, NeMo-Run 0.6 to 0.11: environment variables
reach the script unquoted and with their names in capitals, words of srun unquoted; `/nemo_run` and `$$` are replaced in
every value; torchrun's words are quoted for a shell that a local job does not have.
"""

import copy
import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from nemo_skymoe.shell import sbatch_word, word

_RUNNER = "nemo_run.core.runners.fdl_runner"


def apply() -> bool:
    """Quote what NeMo-Run does not, and say whether that was needed and not done yet."""
    from nemo_run.run.torchx_backend.schedulers import local, slurm

    if "'a b'" in _upstream_script(slurm.SlurmBatchRequest):
        return False
    upstream: Any = slurm.SlurmBatchRequest

    class QuotedRequest(upstream):
        def materialize(self) -> str:
            super().materialize()  # for what it leaves in the executor: names and the folder of its logs
            words = _Words()
            given = {field.name: getattr(self, field.name) for field in fields(upstream)}
            environment = words.environment(self.executor.env_vars | self.extra_env)
            executor = words.executor(self.executor)
            return words.filled(
                upstream(**given | {"executor": executor, "extra_env": environment}).materialize()
            )

    slurm.SlurmBatchRequest = QuotedRequest
    _without_macros(slurm.SlurmTunnelScheduler)
    _without_macros(local.PersistentLocalScheduler)
    return True


class _Words:
    """Stand-ins that no shell and no template changes, for values that upstream writes as they are."""

    def __init__(self) -> None:
        self._values: list[str] = []
        self._code: set[int] = set()

    def __call__(self, value: str) -> str:
        self._values.append(value)
        return f"SKYMOEWORD{len(self._values) - 1}X"

    def code(self, value: str) -> str:
        """Return a stand-in for lines of bash, which must not be quoted."""
        self._code.add(len(self._values))
        return self(value)

    def environment(self, variables: Mapping[str, str]) -> dict[str, str]:
        return {self(name): self(str(value)) for name, value in variables.items()}

    def executor(self, executor: Any) -> Any:
        """Return a copy of the executor with a stand-in for every value. `environment` handles its variables."""
        made = copy.copy(executor)
        for name in (*executor.SBATCH_FLAGS, "container_image"):
            if isinstance(value := getattr(executor, name, None), str):
                setattr(made, name, self(value))
        for name in ("container_env", "srun_args"):
            if values := getattr(executor, name, None):
                setattr(made, name, [self(value) for value in values])
        made.container_mounts = [self._mount(mount) for mount in executor.container_mounts]
        more = executor.additional_parameters or {}
        made.additional_parameters = {
            name: self(value) if isinstance(value, str) else value for name, value in more.items()
        }
        made.env_vars = {}
        made.setup_lines = self.code(executor.setup_lines) if executor.setup_lines else None
        made.tunnel = copy.copy(executor.tunnel)
        made.tunnel.job_dir = self(executor.tunnel.job_dir)
        made.job_details = copy.copy(executor.job_details)
        made.job_details.job_name = self(executor.job_details.job_name)
        made.job_details.folder = self(executor.job_details.folder)
        return made

    def _mount(self, mount: str) -> str:
        from nemo_run.config import RUNDIR_SPECIAL_NAME

        start = RUNDIR_SPECIAL_NAME if mount.startswith(RUNDIR_SPECIAL_NAME) else ""
        rest = mount.removeprefix(start)
        return start + self(rest) if rest else start

    def filled(self, script: str) -> str:
        """Return the script with the values in place of the stand-ins, each quoted for the program that reads it."""
        return "\n".join(self._line(line) for line in script.split("\n"))

    def _line(self, line: str) -> str:
        quote = sbatch_word if line.startswith("#SBATCH") else word

        def value(found: re.Match[str]) -> str:
            if found[2] is not None:
                return quote(bytes.fromhex(found[2]).decode())
            number = int(found[1])
            return self._values[number] if number in self._code else quote(self._values[number])

        return re.sub(r"SKYMOEWORD(\d+)X|SKYMOEARGUMENT((?:[0-9a-f]{2})*)X", value, line)


def _argument(value: str) -> str:
    """Return a stand-in that has the value in itself, for a word of a command line on its way to the script."""
    return f"SKYMOEARGUMENT{value.encode().hex()}X"


def _without_macros(scheduler: Any) -> None:
    """Let `scheduler` prepare variables in which nothing is a macro, and torchrun's words as a process takes them."""
    upstream: Callable[..., Any] = scheduler._submit_dryrun

    def _submit_dryrun(self: Any, app: Any, cfg: Any) -> Any:
        if getattr(cfg, "resource_group", None) or (app.metadata or {}):
            return upstream(self, app, cfg)  # groups of jobs and Ray: not launched from here
        literal = copy.deepcopy(app)
        for role in literal.roles:
            role.env = {name: str(value).replace("$", "$$") for name, value in role.env.items()}
            if scheduler.__name__ == "PersistentLocalScheduler":
                words = role.args if role.entrypoint != "torchrun" else shlex.split(" ".join(role.args))
                role.args = [each.replace("$", "$$") for each in words]
            elif _RUNNER not in role.args:  # a command line that a user gave values for
                role.entrypoint = _argument(role.entrypoint)
                role.args = [_argument(each) for each in role.args]
        given, cfg.env_vars = cfg.env_vars, {}
        try:
            info = upstream(self, literal, cfg)
        finally:
            cfg.env_vars = given
        return info

    scheduler._submit_dryrun = _submit_dryrun


def _upstream_script(request: Any) -> str:
    import nemo_run as run

    executor = run.SlurmExecutor(account="a", tunnel=run.LocalTunnel(job_dir="/j"))
    executor.job_dir = "/j/probe"
    return request(
        launch_cmd=[],
        jobs=["probe"],
        command_groups=[["true"]],
        executor=executor,
        max_retries=0,
        extra_env={"probe": "a b"},
    ).materialize()
