"""Every value that a user gives reaches SLURM and the ranks byte for byte: the scripts are run, with SLURM's commands replaced."""

import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

import fiddle as fdl
import nemo_run as run
import pytest

from nemo_skymoe.commands import tasks as commands
from nemo_skymoe.commands.launch import jobs
from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.launch.composition import compose_groups
from nemo_skymoe.launch.experiment import dry_run
from nemo_skymoe.launch.jobs import Job
from nemo_skymoe.recipes.executors import a800_slurm, local_torchrun

MARKERS = ("$(touch marker)", "`touch marker`", ";touch marker", "x; touch marker #", "&& touch marker", "| touch marker", "> marker")  # fmt: skip
HOSTILE = (
    *MARKERS, "a b  c", "'", '"', "a'b\"c", "it's", "$HOME ${PATH}", "$$", "$$$", "${app_id}", "$head_node_ip_var",
    "${head_node_ip_var}", "{{ 7 * 7 }} {% raw %} {# x #}", "\\", "a\\nb \\' \\\" \\", "~", "*", "!x", "/nemo_run/x", "/$nemo_run/x",
    "-n", "é — ü", " lead", "trail ", "# x", "SKYMOEWORD0X", "hetjob", "a" * 90 + " --b -m c  python d", "--x=y",
    "'; touch marker; '", '"; touch marker; "', "\\'; touch marker", "training",
)  # fmt: skip
LINES = ("two\nlines", "x\ntouch marker", "\n\n\n\nexport HF_HUB_OFFLINE=9", "tab\there\r\x1b")
SBATCH = ("account", "partition", "qos", "constraint", "comment", "exclude", "gres", "mem")
TASK = run.Partial(commands.inspect, source="/data/x")


@pytest.fixture
def bash(tmp_path: Path) -> Any:
    """Run a script in an empty folder; every call of srun or torchrun becomes its words, its environment."""
    (folder := tmp_path / "bin").mkdir()
    for name in ("srun", "torchrun", "scontrol", "squeue", "sbatch"):
        text = f'#!/bin/bash\nn=$(ls {tmp_path} | grep -c words)\nprintf "%s\\0" {name} "$@" > {tmp_path}/words$n\nenv -0 > {tmp_path}/env$n\n'
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)

    def run_script(script: str) -> tuple[list[str], dict[str, str]]:
        for old in [*tmp_path.glob("words*"), *tmp_path.glob("env*")]:
            old.unlink()
        (place := tmp_path / "empty").mkdir(exist_ok=True)
        env = {"PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1"}
        done = subprocess.run(["bash", "-c", script], cwd=place, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert list(place.iterdir()) == []
        last = len(list(tmp_path.glob("words*"))) - 1
        words = (tmp_path / f"words{last}").read_bytes().decode().split("\0")[:-1]
        pairs = (tmp_path / f"env{last}").read_bytes().decode().split("\0")[:-1]
        return words, dict(pair.split("=", 1) for pair in pairs)

    return run_script


def sbatch_options(script: str) -> dict[str, str]:
    """By SLURM's own rules (src/sbatch/opt.c, _get_argument): unlike in bash, a backslash escapes within quotes too."""
    options = {}
    for line in script.splitlines():
        if not line.startswith("#SBATCH "):
            continue
        assert "hetjob" not in line.lower() and "packjob" not in line.lower()
        found, quoted, escaped = "", "", False
        for character in line.removeprefix("#SBATCH "):
            if escaped:
                escaped = False
            elif character == "\\":
                escaped = True
                continue
            elif quoted:
                if character == quoted:
                    quoted = ""
                    continue
            elif character in "'\"":
                quoted = character
                continue
            elif character == "#" or character.isspace():
                break
            found += character
        name, _, value = found.removeprefix("--").partition("=")
        assert name not in options
        options[name] = value
    return options


def script_of(executor: Any, task: Any = TASK) -> str:
    return dry_run([Job("training", "what it is", task, executor, [])])


def test_what_is_given_arrives_byte_for_byte_and_nothing_is_run(bash: Any) -> None:
    variables: dict[str, str | None] = {
        f"v{n}_Mixed": value for n, value in enumerate((*HOSTILE, *LINES, ""))
    }
    for value in HOSTILE:
        mount = f"/host{value.replace(',', '')}:/data"
        executor = fdl.build(
            a800_slurm(container_image=value, container_mounts=[mount], env_vars=variables, time="1:00:00")
        )
        prefix = value.replace("/", "_") + "."
        executor.job_name_prefix, executor.srun_args = prefix, [value, "--mpi", value]
        executor.additional_parameters = {"mail-user": value, "nodelist": value}
        for name in SBATCH:
            setattr(executor, name, value)
        script = script_of(executor)
        options = sbatch_options(script)
        given = dict.fromkeys((*SBATCH, "mail-user", "nodelist"), value)
        assert {name: options[name] for name in given} == given
        assert options["job-name"] == f"{prefix}training" and "/sbatch_" + prefix in options["output"]
        words, environment = bash(script)
        assert words[words.index("--container-image") + 1] == value
        assert words[words.index("--container-mounts") + 1].startswith(f"{mount},")
        assert words[words.index("--kill-on-bad-exit=1") + 1 :][:3] == [value, "--mpi", value]
        assert f"/log-{prefix}training_%j_0.out" in words[words.index("--output") + 1]
        assert words[-3:] == ["-n", "training", "/nemo_run/configs/training_fn_or_script"]
        assert {name: environment[name] for name in variables} == variables


def test_on_this_machine(bash: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun as it is printed, and as NeMo-Run starts it: words and environment of a process."""
    from nemo_run import config
    from torchx.schedulers.local_scheduler import LocalScheduler

    started: list[Any] = []
    monkeypatch.setattr(
        LocalScheduler, "schedule", lambda self, dryrun_info: started.append(dryrun_info) or "id"
    )
    monkeypatch.setattr(config, "_NEMORUN_HOME", str(tmp_path / "a $(touch marker) 'home"))
    variables: dict[str, str | None] = {
        f"v{n}_Mixed": value for n, value in enumerate((*HOSTILE, *LINES, ""))
    }
    executor = fdl.build(local_torchrun(gpus_per_node=2, env_vars=variables))
    words, environment = bash(script_of(executor))
    assert words[0] == "torchrun" and words[-1].startswith(str(tmp_path / "a $(touch marker) 'home"))
    assert {name: environment[name] for name in variables} == variables
    with run.Experiment("x") as experiment:
        experiment.add(TASK, executor=executor, name="training")
        experiment.dryrun(log=False)
        jobs: list[Any] = experiment.jobs
    ((rank,),) = jobs[0]._dryrun_info.request.role_params.values()
    assert rank.args[-1] == str(
        tmp_path
        / f"a $(touch marker) 'home/experiments/x/{experiment._id}/training/configs/training_fn_or_script"
    )
    assert {name: rank.env[name] for name in variables} == variables


def test_through_hydra_and_with_code_of_a_site(bash: Any) -> None:
    """`setup_lines` are bash, by their meaning; a comment of the printed script stays one."""
    given = ["jobs=[conversion]", "cluster=a800_slurm", "conversion.output_path=/data/b"]
    source = "/data/a\ntouch marker\n$(touch marker) 'b"
    made = jobs(
        compose_groups(
            [
                *given,
                f"conversion.source={quoted(source)}",
                f"cluster.env_vars={{foo: {quoted('a b $(touch marker)')}}}",
                f"cluster.comment={quoted('; touch marker')}",
                f"cluster.setup_lines={quoted('export AGAIN=$foo.; EMPTY=/nemo_run')}",
                "cluster.container_image=none",
            ]
        )
    )
    assert made[0].task.source == source
    script = dry_run(made)
    _, environment = bash(script)
    assert environment["foo"] == "a b $(touch marker)" and environment["AGAIN"] == "a b $(touch marker)."
    assert "EMPTY=/nemo_run\n" in script and "FOO" not in environment
    assert sbatch_options(script)["comment"] == "; touch marker"


def quoted(value: str) -> str:
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"


@pytest.mark.parametrize("bad", ["a\nb", "a\rb", "a\0b", "a\x7f"])
def test_what_cannot_be_quoted_is_refused_by_name(bad: str) -> None:
    for name in (*SBATCH, "container_image", "job_name_prefix", "reservation"):
        executor = fdl.build(a800_slurm())
        if name == "reservation":
            executor.additional_parameters = {name: bad}
        else:
            setattr(executor, name, bad)
        refused(executor, f"{name} is .*, expected no line break")
    for name, value in {"container_mounts": [f"{bad}:/x"], "srun_args": ["--x", bad]}.items():
        executor = fdl.build(a800_slurm())
        setattr(executor, name, value)
        refused(executor, f"{name} is .*, expected no line break")
    with pytest.raises(ConfigurationError, match=r"account is .*, expected no line break"):
        a800_slurm(account=bad)


def test_names_and_places_that_a_shell_would_read_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a b", "1x", "a-b", "x;touch marker", "$(touch marker)", "", "ä", "a=b", "A\nB"):
        for factory in (a800_slurm, local_torchrun):
            with pytest.raises(ConfigurationError, match="env_vars has a variable called"):
                factory(env_vars={name: "x"})
    with pytest.raises(ConfigurationError, match=r"env_vars.A has a null character"):
        a800_slurm(env_vars={"A": "a\0b"})
    for place in ("/a b", "/a;touch marker", "/$(touch marker)", "/a%j", "/a\nb", "/a'"):
        with pytest.raises(ConfigurationError, match=r"job_dir is .*, expected letters"):
            a800_slurm(job_dir=place)
        with monkeypatch.context() as patch:
            patch.setattr("nemo_run.config._NEMORUN_HOME", place)
            refused(fdl.build(a800_slurm()), "NEMORUN_HOME, or the name of the job, is")
        for name, value in {
            "tunnel": run.SSHTunnel(host=place, user="me", job_dir="/a"),
            "dependency_type": place,
        }.items():
            executor = fdl.build(a800_slurm())
            setattr(executor, name, value)
            refused(executor, "expected letters")
    executor = fdl.build(a800_slurm())
    executor.container_env = ["A,B"]
    refused(executor, "container_env has a variable called")


def refused(executor: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message), run.Experiment("x") as experiment:
        experiment.add(TASK, executor=executor, name="training")


def test_shlex_reads_what_is_printed_as_bash_does() -> None:
    """A plain value is left plain: scripts are for reading."""
    script = script_of(fdl.build(a800_slurm(env_vars={"NCCL_SOCKET_IFNAME": "bond0", "X": "a b"})))
    assert "\nexport NCCL_SOCKET_IFNAME=bond0\n" in script and f"\nexport X={shlex.quote('a b')}\n" in script
