"""A secret is passed by name: no script, log, saved configuration or message ever holds its value."""

import io
import traceback
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import fiddle as fdl
import nemo_run as run
import pytest
from typer.testing import CliRunner

from nemo_skymoe.cli import app
from nemo_skymoe.commands import tasks as commands
from nemo_skymoe.commands.launch import jobs
from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.launch.composition import compose_groups
from nemo_skymoe.launch.experiment import dry_run, submit
from nemo_skymoe.recipes.executors import a800_slurm, local_torchrun

SECRET = "swordfish0123456789"
SENTENCE = "secrets are passed by name from the environment, never by value"
URL = f"https://me:{SECRET}@host/x"
TASK = run.Partial(commands.inspect, source="/data/x")
CONVERSION = ["jobs=[conversion]", "conversion.source=/data/a", "conversion.output_path=/data/b"]
GIVEN = (
    f"cluster.env_vars={{WANDB_API_KEY: {SECRET}}}",
    f"+cluster.env_vars={{A: b, HF_TOKEN: {SECRET}}}",
    f"cluster.env_vars.MY_PASSWORD={SECRET}",
    f"cluster.env_vars={{AWS_SECRET_ACCESS_KEY: {SECRET}, B: [}}",  # not hydra's grammar either
    f"cluster.env_vars={{X: hf_{SECRET}}}",
    f"cluster.container_image='docker://me:{SECRET}@nvcr.io#nvidia/nemo'",
    f"cluster.container_image='me:{SECRET}@nvcr.io#nvidia/nemo'",
    f"cluster.setup_lines='export HF_TOKEN={SECRET}'",
    f"cluster.srun_args=[--export=ALL,NGC_API_KEY={SECRET}]",
    f"cluster.comment=sk-{SECRET}",
    f"cluster.additional_parameters={{comment: ghp_{SECRET}}}",
    f"conversion.source={URL}",
    f"training.wandb_api_key={SECRET}",
    f"cluster.WANDB_API_KEY={SECRET}",
)


def test_a_value_is_refused_before_it_is_written_or_printed(tmp_path: Path) -> None:
    for override in GIVEN:
        for more in (["--dry-run"], ["--cfg", "job"], []):
            answer = CliRunner().invoke(app, ["launch", *CONVERSION, "cluster=a800_slurm", override, *more])
            assert answer.exit_code == 2 and SENTENCE in answer.stderr, override
            assert SECRET not in answer.output and answer.stderr.count("\n") == 1
    assert not holding(tmp_path)


def test_a_site_s_file_and_an_interpolation_are_no_way_around(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    (site := tmp_path / "site" / "cluster").mkdir(parents=True)
    for value in (SECRET, "${oc.env:HF_TOKEN}"):
        (site / "ours.yaml").write_text(f"defaults: [a800_slurm]\nenv_vars: {{HF_TOKEN: '{value}'}}\n")
        with pytest.raises(ConfigurationError, match=SENTENCE) as refused:
            jobs(compose_groups([*CONVERSION, "cluster=ours"], tmp_path / "site"))
        assert SECRET not in str(refused.value)


def test_an_executor_that_was_changed_by_hand_is_refused_where_it_joins(tmp_path: Path) -> None:
    changes: list[tuple[Any, dict[str, Any]]] = [
        (factory, {"env_vars": {"WANDB_API_KEY": SECRET}}) for factory in (a800_slurm, local_torchrun)
    ]
    changes += [
        (a800_slurm, change)
        for change in (
            {"container_image": f"me:{SECRET}@nvcr.io#x"},
            {"container_mounts": [f"{URL}:/x"]},
            {"setup_lines": f"wandb login\nexport WANDB_API_KEY='{SECRET}'"},
            {"comment": f"hf_{SECRET}"},
            {"srun_args": [f"--export=HF_TOKEN={SECRET}"]},
            {"additional_parameters": {"export": f"HF_TOKEN={SECRET}"}},
        )
    ]
    for factory, change in changes:
        executor = fdl.build(factory())
        for name, value in change.items():
            setattr(executor, name, value)
        with (
            pytest.raises(ConfigurationError, match=SENTENCE) as refused,
            redirect_stdout(out := io.StringIO()),
            run.Experiment("x") as experiment,
        ):
            experiment.add(TASK, executor=executor, name="training")
        assert SECRET not in "".join(traceback.format_exception(refused.value)) + out.getvalue(), change
    for factory in (a800_slurm, local_torchrun):
        with pytest.raises(ConfigurationError, match=SENTENCE) as refused:
            factory(env_vars={"HF_TOKEN": SECRET})
        assert SECRET not in "".join(traceback.format_exception(refused.value))
    assert not holding(tmp_path)


def test_a_name_hands_the_value_on_and_leaves_it_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_name = [*CONVERSION, "cluster.env_vars={WANDB_API_KEY: null, NCCL_SOCKET_IFNAME: bond0}"]
    with pytest.raises(ConfigurationError, match=r"env_vars names WANDB_API_KEY .* export WANDB_API_KEY"):
        jobs(compose_groups([*by_name, "cluster=a800_slurm"]))
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    script = dry_run(jobs(compose_groups([*by_name, "cluster=a800_slurm"])))
    assert "--container-env WANDB_API_KEY" in script and SECRET not in script
    assert "export NCCL_SOCKET_IFNAME=bond0\n" in script and "export WANDB_API_KEY" not in script
    script = dry_run(jobs(compose_groups([*by_name, "cluster=a800_slurm", "cluster.container_image=none"])))
    assert "WANDB_API_KEY" not in script  # sbatch and srun hand the environment on
    assert "WANDB_API_KEY" not in dry_run(jobs(compose_groups([*by_name, "cluster=local"])))

    (folder := tmp_path / "bin").mkdir()
    (folder / "sbatch").write_text(f'#!/bin/bash\nprintf %s "$WANDB_API_KEY" > {tmp_path}/seen\necho 41\n')
    (folder / "squeue").write_text("#!/bin/bash\n")
    for command in folder.iterdir():
        command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    out = io.StringIO()
    with redirect_stdout(out), redirect_stderr(out):
        submit(jobs(compose_groups([*by_name, "cluster=a800_slurm"])))
    assert (tmp_path / "seen").read_text() == SECRET
    assert SECRET not in out.getvalue() and [file.name for file in holding(tmp_path)] == ["seen"]


def holding(folder: Path) -> list[Path]:
    """Files that hold the secret; NeMo-Run's are compressed in part, so a config is read as well."""
    from nemo_run.core.serialization.zlib_json import ZlibJSONSerializer

    found = []
    for file in (file for file in folder.rglob("*") if file.is_file()):
        text = file.read_text(errors="replace")
        if file.name == "_CONFIG" or file.name.endswith(("_packager", "_fn_or_script")):
            text += repr(ZlibJSONSerializer().deserialize(text))
        if SECRET in text:
            found.append(file)
    return found
