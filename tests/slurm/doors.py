"""How the same training is submitted through each front door, and where its run keeps what the tests compare."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_skymoe.checkpoint.run_folder import checkpoint_of
from nemo_skymoe.launch.through_bridge import LOCAL_PYTHON
from tests.slurm.cluster import Cluster
from tests.slurm.jobs import Job, Kept, kept

REPOSITORY = Path(__file__).resolve().parents[2]
BRIDGE_PYTHON = REPOSITORY / LOCAL_PYTHON
# SLURM looks at time limits every 30 seconds: so long must these steps take, and some more.
STEPS, SAVED_EVERY = 80, 20
RECIPE = {
    "max_steps": STEPS,
    "seq_length": 64,
    "global_batch_size": 64,
    "warmup_steps": 1,
    "val_check_interval": STEPS,
    "limit_val_batches": 1,
    "similarity_interval": STEPS,
    "expert_capacity_factor": 1.0,
}
# The coefficients follow the drop rate fast and far enough to tell steps and layers apart.
MODEL = {"moe_adaptive_aux_loss_smoothing": 0.5, "moe_adaptive_aux_loss_maximum": 1.0}


@dataclass(frozen=True)
class Door:
    """A front door."""

    name: str
    parts: dict[str, Any]
    """Options that are no arguments of the recipe: log every step, and save every twentieth."""
    model: str
    """What precedes an option of the model on the training's own command line."""
    launch: tuple[str, ...]
    """Words of `skymoe launch`."""
    environment: Mapping[str, str]
    """Variables of the shell that submits."""
    step: re.Pattern[str]
    """A line in the log after every step, with the step's number."""
    first_step: int
    """The number that the logs give to the first step."""
    logs_the_last_step: bool
    """Whether a run that is told to stop still logs the step after which it does."""
    coefficients: tuple[str, ...]
    """The place of the coefficients in what a checkpoint has beside tensors."""

    def sbatch(self, cluster: Cluster, folder: Path, name: str, nodes: int = 1, devices: int = 2) -> Job:
        """Submit slurm/pretrain.sbatch as a user without Python would."""
        options = ["--account=llm", "--partition=a800", "--time=60", "--signal=B:USR1@60"]
        sizes = [f"--nodes={nodes}", f"--ntasks-per-node={devices}", f"--gpus-per-node={devices}"]
        arguments = {"dir": folder / "runs", "name": name, "corpus": folder / "corpus", **RECIPE}
        parts = [
            f"{option}={value}"
            for option, value in (
                self.parts | {self.model + key: value for key, value in MODEL.items()}
            ).items()
        ]
        number = cluster.run(
            "sbatch", "--parsable", f"--output={folder}/{name}.%j.out", *options, *sizes,
            str(REPOSITORY / "slurm" / "pretrain.sbatch"), *self._recipe(arguments, devices), *parts,
            **self.environment,
        )  # fmt: skip
        return self._job(cluster, int(number), folder / f"{name}.{int(number)}.out")

    def submit(self, cluster: Cluster, folder: Path, name: str) -> tuple[Job, Job]:
        """Submit the same by `skymoe launch`, and an export of what it trains."""
        recipe = {"dir": folder / "runs", "name": name, **RECIPE, **self.parts}
        values = {f"training.{option}": value for option, value in recipe.items()}
        values |= {f"model.{option}": value for option, value in MODEL.items()}
        cluster.run(
            "skymoe", "launch", *self.launch, "jobs=[training,export]", f"export.output_path={folder}/{name}-hf",
            "training=skywork_moe_tiny", "cluster=a800_slurm", "cluster.time=01:00:00",
            "data=corpus", f"data.corpus={folder}/corpus", *(f"{option}={value}" for option, value in values.items()),
            NEMORUN_HOME=str(self.home(folder)),
        )  # fmt: skip
        (scripts,) = (self.home(folder) / "experiments" / "skymoe").iterdir()
        training, export = (
            self._job(
                cluster,
                int(cluster.run("squeue", "--noheader", "--format=%i", f"--name=skymoe.{job}")),
                scripts / job / "log-*.out",
            )
            for job in ("training", "export")
        )
        return training, export

    def kept(self, folder: Path, name: str) -> Kept:
        """Read what a run has left."""
        runs = folder / "runs"
        return kept(runs / name, runs / "tensorboard" / name, self.coefficients, self.first_step)

    def saved_step(self, folder: Path, name: str) -> int:
        """Return the step after which a run saved its last checkpoint, counted from 0. The folder's name says so."""
        [number] = re.findall(r"\d+", checkpoint_of(folder / "runs" / name).name)
        return int(number) - self.first_step

    def home(self, folder: Path) -> Path:
        """Return the folder where NeMo-Run keeps the scripts of what was submitted through this door."""
        return folder / f"home-{self.name}"

    def _recipe(self, arguments: Mapping[str, Any], devices: int) -> list[str]:
        raise NotImplementedError

    def _job(self, cluster: Cluster, number: int, log: Path) -> Job:
        return Job(cluster, number, log, self.step, self.first_step)


class NeMo(Door):
    """The recipe is a factory with its arguments between brackets."""

    def _recipe(self, arguments: Mapping[str, Any], devices: int) -> list[str]:
        words = ",".join(f"{option}={value}" for option, value in {**arguments, "devices": devices}.items())
        return [f"skywork_moe_tiny({words})"]


class Bridge(Door):
    """The recipe is a name, and its arguments are words of their own. Ranks are those of SLURM."""

    def _recipe(self, arguments: Mapping[str, Any], devices: int) -> list[str]:
        return ["skywork_moe_tiny_pretrain_config", *(f"{name}={value}" for name, value in arguments.items())]


NEMO = NeMo(
    name="nemo",
    parts={"trainer.log_every_n_steps": 1, "log.ckpt.every_n_train_steps": SAVED_EVERY},
    model="model.config.",
    launch=(),
    environment={},
    step=re.compile(r"global_step: (\d+)"),
    first_step=0,
    logs_the_last_step=False,  # NeMo's callback leaves before Lightning has printed and logged it
    coefficients=("callbacks", "SkyworkMoECallback", "aux_loss_coefficients"),
)


def bridge(path: str) -> Door:
    """Return the door of Bridge, whose Python comes before `path`, that of a user's commands."""
    return Bridge(
        name="bridge",
        parts={"logger.log_interval": 1, "checkpoint.save_interval": SAVED_EVERY},
        model="model.",
        launch=("frontdoor=bridge", f"frontdoor.python={BRIDGE_PYTHON}"),
        environment={"PATH": f"{BRIDGE_PYTHON.parent}:{path}"},
        step=re.compile(rf"iteration +(\d+)/ +{STEPS} "),
        first_step=1,
        logs_the_last_step=True,
        coefficients=("opt_param_scheduler", "skywork_moe", "aux_loss_coefficients"),
    )
