"""What `skymoe inspect` says of a checkpoint: nothing that the model does not have, and what was not looked at."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from nemo_skymoe.checkpoint import convert
from nemo_skymoe.checkpoint.convert import TargetOptions
from nemo_skymoe.checkpoint.sources import open_source
from nemo_skymoe.cli import app
from tests.checkpoint import hf_models
from tests.checkpoint.simple_formats import flip

SMALL = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 8, "num_attention_heads": 2}
BESIDE = {
    "tokenizer": ["merges.txt", "quaint.py", "tokenizer_config.json", "vocab.json"],
    "chat templates": ["additional_chat_templates/tool.jinja", "chat_template.jinja"],
    "generation": ["generation_config.json"],
    "processors": ["preprocessor_config.json"],
    "terms": ["LICENSE", "README.md"],
}
CONTENT = {
    "tokenizer_config.json": '{"auto_map": {"AutoTokenizer": ["quaint.Quaint", null]}}',
    "vocab.json": '{"a": 0}',
}


@pytest.fixture(params=["hf", "nemo", "bridge"])
def form(request: pytest.FixtureRequest) -> str:
    return request.param


def made(kind: str, form: str, folder: Path) -> Path:
    """A checkpoint of one layer, dense or an MoE, with companions of every kind."""
    make = hf_models.skywork_dense if kind == "dense" else hf_models.skywork_moe
    make(folder / "hf", **SMALL, num_key_value_heads=2, vocab_size=40)
    for name in (name for names in BESIDE.values() for name in names):
        (folder / "hf" / name).parent.mkdir(exist_ok=True)
        (folder / "hf" / name).write_text(CONTENT.get(name, "{}"))
    if form != "hf":
        source = {"base": open_source(folder / "hf")}
        convert.plan(source, TargetOptions(form, layer_spec="local")).run(folder / form)
    return folder / form


def inspect(folder: Path, *options: str) -> tuple[int, str, Any]:
    """Exit code, text and JSON."""
    shown = CliRunner().invoke(app, ["inspect", str(folder)])
    found = CliRunner().invoke(app, ["inspect", str(folder), "--json"])
    assert shown.exit_code == found.exit_code
    return shown.exit_code, shown.output, json.loads(found.output)


def test_a_dense_model_has_no_options_of_an_moe(form: str, tmp_path: Path) -> None:
    _, shown, found = inspect(made("dense", form, tmp_path / "dense"))
    assert not re.search(
        r"\bmoe_|num_moe|expert|gate|router", shown.replace(str(tmp_path), "").split("convert to")[0]
    )
    assert not [name for name in (*found["architecture"], *found["options"]) if "moe" in name]
    # Four projections, an MLP's three, two norms and the last one, embedding and head.
    assert found["parameters"] == found["activated_parameters"] == 4 * 256 + 3 * 128 + 3 * 16 + 2 * 640
    _, shown, found = inspect(made("moe", form, tmp_path / "moe"))
    assert "num_moe_experts 4, moe_router_topk 2" in shown and "moe_router_logit_norm_scale 1.0" in shown
    assert found["parameters"] == 4 * 256 + 4 * 3 * 128 + 4 * 16 + 3 * 16 + 2 * 640
    assert found["activated_parameters"] == 4 * 256 + 2 * 3 * 128 + 4 * 16 + 3 * 16 + 2 * 640


def test_every_file_beside_the_weights_is_called_what_it_is(form: str, tmp_path: Path) -> None:
    _, shown, found = inspect(made("dense", form, tmp_path))
    assert {"tokenizer": found["tokenizer"], **found["other_files"]} == BESIDE
    (line,) = [line for line in shown.splitlines() if line.startswith("tokenizer ")]
    assert "generation_config.json" not in line and "vocab.json" in line
    assert "generation generation_config.json" in shown and "terms LICENSE, README.md" in shown


def test_what_was_not_checked_is_said(form: str, tmp_path: Path) -> None:
    """A flipped bit is not seen, and so it is not said that all is well; a size is."""
    folder = made("dense", form, tmp_path)
    code, shown, found = inspect(folder)
    assert code == 0 and found["problems"] == []
    written = sum(file.is_file() for file in folder.rglob("*")) - 1
    says = "the values of the weights: headers"
    if form != "hf":
        says = f"the bytes of the {written} files: their sizes alone"
    assert found["not_checked"].startswith(says) and f"not checked           {says}" in shown
    weights = next(folder.glob("model.safetensors" if form == "hf" else "*/__0_0.distcp"))
    flip(weights, -40 if form == "hf" else weights.stat().st_size // 2)
    assert inspect(folder)[0] == 0
    weights.write_bytes(weights.read_bytes()[:-1])
    code, shown, found = inspect(folder)
    assert code == 1 and str(weights) in found["problems"][0] and f"problem: {found['problems'][0]}" in shown


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_every_command_that_is_proposed_works(kind: str, form: str, tmp_path: Path, monkeypatch: Any) -> None:
    folder = made(kind, form, tmp_path / "it's a model")
    monkeypatch.chdir(tmp_path)
    code, text, found = inspect(folder)
    assert code == 0 and all(f"{what:22}{command}\n" in text for what, command in found["next"].items())
    assert ("make an MoE of it" in found["next"]) == (kind == "dense") and len(found["next"]) >= 3
    trainings = found["next"].pop("check its training", None)  # tests of the front doors run them
    assert (trainings is not None) == (form == "bridge")  # NeMo's command line cannot say this folder
    for command in found["next"].values():
        skymoe, *words = shlex.split(command)
        dry = [] if words[0] == "plan" else ["--dry-run"]
        done = CliRunner().invoke(app, [*words, *dry])
        assert skymoe == "skymoe" and done.exit_code == 0, (command, done.output)
