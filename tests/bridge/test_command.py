"""`python -m nemo_skymoe.bridge` answers without the 20 seconds of Bridge's import what needs no Bridge."""

import subprocess
import sys

from nemo_skymoe.experiments import catalogue
from tests.cases import every
from tests.docs.pages import ROOT

TINY = "skywork_moe_tiny_pretrain_config"


def command(*words: str) -> tuple[int, str, str, set[str]]:
    """Exit status, what was printed, what was said, and the packages that were imported."""
    ended = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "nemo_skymoe.bridge", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    lines = ended.stderr.splitlines()
    imported = {line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")}
    said = "\n".join(line for line in lines if not line.startswith("import time:"))
    return ended.returncode, ended.stdout, said, imported


@every(
    ("words", "message"),
    [
        ((), "--recipe is missing, expected a name"),
        (("--recipe", "skywork_moe_tiny_pretrain_confg"), "did you mean skywork_moe_tiny_pretrain_config?"),
        (("--recipe", TINY, "corpse=x"), "option corpse is unknown: did you mean corpus?"),
        (("--recipe", TINY, "max_steps=three"), "max_steps is 'three', expected int"),
        (("--recipe", TINY, "scale=toi"), "scale"),
        (("--recipe", TINY, "trian.train_iters=3"), "option trian.train_iters is unknown"),
    ],
)
def test_a_mistake_is_named_without_bridge(words: tuple[str, ...], message: str) -> None:
    status, printed, said, imported = command(*words)
    assert (status, printed) == (1, "") and message in said and said.count("\n") == 0, said
    assert "nemo_skymoe.experiments.catalogue" in imported and not imported & {"torch", "megatron"}


def test_the_recipes_are_listed_without_bridge() -> None:
    status, printed, said, imported = command("--list")
    assert (status, said) == (0, "") and not imported & {"torch", "megatron"}
    assert all(name in printed for name in (*catalogue.RECIPES, *catalogue.SHORT_NAMES))
