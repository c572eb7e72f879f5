"""The whole experiment at toy scale, on this machine: from a dense Hugging Face checkpoint to an MoE one.

Once without an incident; and once with a training that is killed, and the same experiment launched again.
"""

import os
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from nemo_skymoe.checkpoint.run_folder import last_checkpoint
from nemo_skymoe.checkpoint.verification.verifier import verify
from nemo_skymoe.commands.launch import jobs
from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.data.corpus import build_corpus
from nemo_skymoe.experiments.scales import SCALES
from nemo_skymoe.launch.composition import JOBS, compose_groups
from nemo_skymoe.launch.experiment import submit
from nemo_skymoe.ranks import RankFailed
from tests.waiting import HANG

pytestmark = pytest.mark.long
TOY, VOCABULARY, STEPS = SCALES["toy"], 512, 6
FILES = ("argparse", "typing", "inspect", "pydoc", "shutil", "uuid", "ast", "pickle")


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a corpus, and a dense model with its tokenizer as transformers saves them."""
    folder = tmp_path_factory.mktemp("given")
    corpus = build_corpus(folder / "corpus", VOCABULARY, 0.3, files=[f"{file}.py" for file in FILES])
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=TOY.layers,
        hidden_size=TOY.hidden_size,
        intermediate_size=TOY.ffn_hidden_size,
        num_attention_heads=TOY.heads,
        vocab_size=VOCABULARY,
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder / "dense")
    shutil.copytree(corpus.tokenizer, folder / "dense", dirs_exist_ok=True)
    return folder


@pytest.fixture(autouse=True)
def commands_of_this_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")


def experiment(given: Path, folder: Path) -> Any:
    """All jobs, two of the training's on as many ranks."""
    options = {
        "jobs": f"[{','.join(JOBS)}]",
        "conversion.source": given / "dense",
        "conversion.output_path": folder / "nemo",
        "upcycle.output_path": folder / "upcycled",
        "plan.output_path": folder / "plan.json",
        "training": "skywork_moe_146b",
        "training.scale": "toy",
        "training.edp": 1,
        "training.pipeline_parallelism": 2,
        "training.dir": folder / "runs",
        "training.trainer.max_steps": STEPS,
        "training.optim.lr_scheduler.max_steps": STEPS,
        "training.log.ckpt.every_n_train_steps": 1,
        "data": "corpus",
        "data.corpus": given / "corpus",
        "export.output_path": folder / "exported",
    }
    return jobs(compose_groups([f"{option}={value}" for option, value in options.items()]))


@pytest.fixture(scope="module")
def whole(given: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the experiment that nothing happens to."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nemo_run.config._NEMORUN_HOME", str(folder / "home"))
        patch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        submit(experiment(given, folder))
    return folder


def test_each_job_has_started_from_what_the_one_before_it_wrote(given: Path, whole: Path) -> None:
    run = whole / "runs" / "skywork_moe_146b"
    assert verify({"base": given / "dense"}, whole / "nemo").problems == []
    assert verify({"base": whole / "nemo"}, whole / "upcycled").problems == []
    log = "".join(file.read_text() for file in run.rglob("nemo_log_globalrank-0*"))
    assert str(whole / "upcycled") in log
    model = (last_checkpoint(run) / "context" / "model.yaml").read_text()
    assert "pipeline_model_parallel_size: 2" in model
    assert verify({"base": run}, whole / "exported").problems == []


def test_the_end_is_a_model_of_transformers(whole: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(whole / "exported", trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(whole / "exported")
    experts = [name for name, _ in model.named_parameters() if ".experts." in name]
    assert len(experts) == TOY.layers * 16 * 3
    logits = model(**tokenizer("def main():", return_tensors="pt")).logits
    assert logits.isfinite().all()


class KillTheTraining(threading.Thread):
    """Kills everything that was started from here as soon as there is a checkpoint to go on from."""

    def __init__(self, run: Path) -> None:
        super().__init__(daemon=True)
        self.run_folder, self.over = run, threading.Event()

    def run(self) -> None:
        while not self.over.wait(0.02):
            try:
                last_checkpoint(self.run_folder)
            except ConfigurationError:
                continue
            for process in psutil.Process().children(recursive=True):
                try:
                    process.kill()
                except psutil.NoSuchProcess:
                    continue
            return


def files(folder: Path) -> Iterator[tuple[str, bytes]]:
    for file in sorted(folder.rglob("*")):
        if file.is_file() and "receipt" not in file.name:
            yield file.name, file.read_bytes()


def test_launched_again_after_a_training_was_killed_it_ends_with_the_same_bytes(
    given: Path, whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "runs" / "skywork_moe_146b"
    killer = KillTheTraining(run)
    killer.start()
    with pytest.raises(RankFailed, match="training ended as"):
        submit(experiment(given, tmp_path))
    killer.join(HANG)
    assert not killer.is_alive() and not (tmp_path / "exported").exists()
    reached, written = last_checkpoint(run).name, (tmp_path / "upcycled" / "weights" / "common.pt").stat()

    submit(experiment(given, tmp_path))
    assert reached != last_checkpoint(run).name == last_checkpoint(whole / "runs" / "skywork_moe_146b").name
    assert (tmp_path / "upcycled" / "weights" / "common.pt").stat() == written, (
        "it was not found, but made again"
    )
    assert (tmp_path / "plan.json").read_bytes() == (whole / "plan.json").read_bytes()
    assert dict(files(tmp_path / "exported")) == dict(files(whole / "exported"))
