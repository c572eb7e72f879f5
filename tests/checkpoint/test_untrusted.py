"""Every command on hostile files: it ends in one sentence, and nothing that they name is run."""

import importlib
import importlib.util
import json
import pickle
import shutil
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from nemo_skymoe.architecture import Architecture
from nemo_skymoe.checkpoint import convert
from nemo_skymoe.checkpoint.convert import TargetOptions
from nemo_skymoe.checkpoint.hugging_face.exported_files import extras
from nemo_skymoe.checkpoint.hugging_face.opening import open_hugging_face
from nemo_skymoe.checkpoint.hugging_face.remote_code import check_code
from nemo_skymoe.checkpoint.sources import open_source
from nemo_skymoe.checkpoint.untrusted.allowed_classes import VARIABLE
from nemo_skymoe.checkpoint.upcycling.options import BASE
from nemo_skymoe.cli import app
from nemo_skymoe.config import ConfigurationError
from tests.checkpoint import hf_models, hostile, megatron_files
from tests.checkpoint.fakes import random_weights

DENSE = Architecture(num_layers=2, hidden_size=64, ffn_hidden_size=96, num_attention_heads=4, vocab_size=100)
PLAN = ["--hardware", "A800-80G", "--num-gpus", "8", "--seq-length", "128", "--global-batch-size", "8"]
SIZES = "num_layers=2,hidden_size=64,ffn_hidden_size=96,num_attention_heads=4,vocab_size=419"
WRONG_PLACES = ("../outside.safetensors", "/outside.safetensors", "a/../../outside.safetensors", "..")


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`hf` and its conversions `hf.nemo` and `hf.hf`; `moe` with modeling files; `nemo`; `megatron` without a context."""
    folder = tmp_path_factory.mktemp("good")
    hf_models.llama(folder / "hf")
    hf_models.skywork_moe(folder / "moe")
    for name, content in extras(open_hugging_face(folder / "moe")[1], None).items():
        (folder / "moe" / name).write_bytes(content)
    for to in ("nemo", "hf"):
        plan = convert.plan({BASE: open_source(folder / "hf")}, TargetOptions(to, shard_bytes=100_000))
        plan.run(folder / f"hf.{to}")
    megatron_files.write(folder / "nemo", random_weights(DENSE), torch.float32)
    megatron_files.write_context(folder / "nemo", DENSE)
    megatron_files.write(folder / "megatron", random_weights(DENSE), torch.float32)
    (folder / "text").write_text("some text")
    return folder


@pytest.fixture
def with_harness(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if lm-evaluation-harness were installed: what is refused is refused before it is imported."""
    find: Callable[..., object] = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: object() if name == "lm_eval" else find(name, *more)
    )


def change_index(folder: Path, place: str) -> None:
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    shards = sorted(set(content["weight_map"].values()))
    outside = folder.parent / "outside.safetensors"
    shutil.copy(folder / shards[0], outside)
    for name, shard in content["weight_map"].items():
        if shard == shards[0]:
            content["weight_map"][name] = place if not place.startswith("/") else str(outside)
    index.write_text(json.dumps(content))


def change_json(file: Path, **values: object) -> None:
    file.write_text(json.dumps((json.loads(file.read_text()) if file.exists() else {}) | values))


def twice(file: Path, first: bytes, second: bytes) -> None:
    """An archive with two entries of one name."""
    with warnings.catch_warnings(), zipfile.ZipFile(file, "w") as archive:
        warnings.simplefilter("ignore")
        for content in (first, second):
            archive.writestr("archive/data.pkl", content)


def changes(marker: Path) -> dict[str, tuple[str, Callable[[Path], object]]]:
    """Hostile changes to a checkpoint, by the file that they are in: which checkpoint, and the change."""
    bad, tag = hostile.payload(marker), f"!!python/object/apply:os.system ['touch {marker}']\n"
    code = {"auto_map": {"AutoConfig": "evil.Made", "AutoModelForCausalLM": "evil.Made"}}
    call = hostile.context(hostile.configured("subprocess.call", {"args": f"touch {marker}"}))

    def with_code(folder: Path, file: str) -> None:
        change_json(
            folder / file, **(code | {"auto_map": code["auto_map"] | {"AutoTokenizer": ["evil.Made", None]}})
        )
        (folder / "evil.py").write_text(hostile.code(marker))

    def without_safetensors(folder: Path) -> None:
        for file in folder.glob("*.safetensors*"):
            file.unlink()
        (folder / "pytorch_model.bin").write_bytes(bad)

    def modeling(folder: Path) -> None:
        file = folder / "modeling_skywork.py"
        file.write_text(file.read_text() + hostile.code(marker))

    return {
        ".metadata": ("nemo", lambda folder: (folder / "weights/.metadata").write_bytes(bad)),
        "common.pt": ("nemo", lambda folder: (folder / "weights/common.pt").write_bytes(hostile.archived(bad))),
        "common.pt of Megatron-LM": (
            "megatron", lambda folder: (folder / "weights/common.pt").write_bytes(hostile.archived(bad)),
        ),
        "common.pt with two pickles": (
            "megatron", lambda folder: twice(folder / "weights/common.pt", bad, pickle.dumps({})),
        ),
        "common.pt in an archive": (
            "megatron",
            lambda folder: (folder / "weights/common.pt").write_bytes(
                hostile.archived(b"N.", **{"archive/constants.pkl": hostile.archived(bad)})
            ),
        ),
        "io.json": ("hf.nemo", lambda folder: (folder / "context/io.json").write_bytes(call)),
        "model.yaml": ("nemo", lambda folder: (folder / "context/model.yaml").write_text(f"config: {tag}")),
        "model.yaml by its root": ("nemo", lambda folder: (folder / "context/model.yaml").write_text(tag)),
        "metadata.json": (
            "nemo", lambda folder: change_json(folder / "weights/metadata.json", sharded_backend="zarr"),
        ),
        "a state": ("nemo", lambda folder: (folder / "weights/modelopt_state.pt").write_bytes(bad)),
        "config.json": ("hf", lambda folder: with_code(folder, "config.json")),
        "config.json of an export": ("moe", lambda folder: with_code(folder, "config.json")),
        "tokenizer_config.json": ("hf", lambda folder: with_code(folder, "tokenizer_config.json")),
        "pytorch_model.bin": ("hf", without_safetensors),
        "modeling_skywork.py": ("moe", modeling),
        "custom_generate": ("moe", lambda folder: (folder / "custom_generate").mkdir()),
        "a kernel": ("hf", lambda folder: change_json(folder / "config.json", attn_implementation="a/b")),
        "adapters": ("hf", lambda folder: change_json(folder / "adapter_config.json", base_model_name_or_path="a")),
    } | {
        f"index with '{place}'": ("hf.hf", lambda folder, place=place: change_index(folder, place))
        for place in WRONG_PLACES
    }  # fmt: skip


NOT_READ = {
    "common.pt": ("inspect", "convert", "upcycle", "verify"),
    "io.json": ("inspect", "convert", "upcycle", "verify"),
    "a state": ("inspect", "convert", "upcycle", "verify"),
    "config.json": ("inspect", "convert", "upcycle", "verify", "verify --logits"),
    "config.json of an export": ("inspect", "convert", "verify"),
    "tokenizer_config.json": ("inspect", "convert", "upcycle", "verify", "verify --logits"),
    "modeling_skywork.py": ("inspect", "convert", "verify"),
    "custom_generate": ("inspect", "convert", "verify"),
    "a kernel": ("inspect", "convert", "upcycle", "verify", "verify --logits"),
}
"""What reads weights and sizes alone does not look at these; nothing of them is run all the same."""


def commands(folder: Path, good: Path, output: Path) -> dict[str, list[str]]:
    to = "nemo" if (folder / "config.json").exists() else "hf"
    return {
        "inspect": ["inspect", str(folder)],
        "convert": ["convert", str(folder), str(output), "--to", to],
        "upcycle": ["upcycle", str(folder), str(output), "--to", to],
        "verify": ["verify", str(folder), str(good / "hf.hf")],
        "verify --logits": ["verify", str(folder), str(good / "hf.hf"), "--logits", str(good / "text")],
        "verify of a target": ["verify", str(good / "hf"), str(folder)],
        "evaluate": ["evaluate", str(folder)],
    }


def test_no_command_runs_what_a_checkpoint_names(good: Path, tmp_path: Path, with_harness: None) -> None:
    marker, output = tmp_path / "marker", tmp_path / "output"
    pickle.loads(hostile.payload(marker))
    assert marker.exists(), "not hostile"
    marker.unlink()
    wrong: list[str] = []
    for change, (base, make) in changes(marker).items():
        folder = tmp_path / "given" / base
        shutil.copytree(good / base, folder)
        make(folder)
        for name, arguments in commands(folder, good, output).items():
            answer = CliRunner().invoke(app, arguments)
            lines = [line for line in answer.output.strip().splitlines() if line.startswith("skymoe: ")]
            refused = answer.exit_code != 0 or name in NOT_READ.get(change, ())
            ended = answer.exception is None or isinstance(answer.exception, SystemExit)
            if marker.exists() or not refused or not ended or (answer.exit_code == 2 and len(lines) != 1):
                wrong.append(f"{name} on {change}: {answer.exit_code}, {answer.exception!r}, {lines[-3:]}")
            if answer.exit_code and output.exists():
                wrong.append(f"{name} on {change} left an output")
            shutil.rmtree(output, ignore_errors=True)
        shutil.rmtree(tmp_path / "given")
    assert not wrong, "\n".join(wrong)


def nemo_is_importable() -> bool:
    """NeMo may be absent, or be of another time than the Megatron-Core of `make versions`."""
    try:
        importlib.import_module("nemo.collections.llm")
    except ImportError:
        return False
    return True


def other_files(folder: Path, good: Path, marker: Path) -> dict[str, list[str]]:
    """Commands on hostile files that are no checkpoints."""
    bad, tag = hostile.payload(marker), f"!!python/object/apply:os.system ['touch {marker}']"
    contents: dict[str, bytes | str] = {
        "profile.json": bad,
        "a.jsonl": bad,
        "a.parquet": bad,
        "a.jsonl.gz": bad,
        "a.jsonl.zst": bad,
        "good.jsonl": '{"text": "some text"}\n',
        "bad/tokenizer.json": bad,
        "model/tokenizer.model": bad,
        "remote/tokenizer_config.json": json.dumps({"auto_map": {"AutoTokenizer": ["evil.Made", None]}}),
        "remote/evil.py": hostile.code(marker),
        "run/events.out.tfevents.1": bad,
        "pickles/state.pkl": bad,
        "conf/cluster/tagged.yaml": f"executor: {tag}\n",
        "conf/cluster/target.yaml": f"executor: local\nlauncher: {{_target_: os.system, command: touch {marker}}}\n",
        "conf/cluster/named.yaml": "executor: os.system\n",
        "task.yaml": f"task: {tag}\n",
        "function.yaml": "task: a\ndoc_to_text: !function evil.run\n",
        "included.yaml": "task: a\ninclude: function.yaml\n",
        "template.yaml": "task: a\ndoc_to_text: \"{{ ''.__class__ }}\"\n",
        "remote.yaml": "task: a\ndataset_kwargs: {trust_remote_code: true}\n",
        "evil.py": hostile.code(marker),
    }
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    output = str(folder / "output")
    made = {"plan": ["plan", "--model", SIZES, *PLAN, "--profile", str(folder / "profile.json")]}
    for name in ("run", "pickles"):
        made[f"report {name}"] = ["report", str(folder / name), "--output", output]
    for name in ("bad", "model", "remote", "bad/tokenizer.json"):
        made[f"preprocess with {name}"] = [
            *("preprocess", str(folder / "good.jsonl"), output), "--tokenizer", str(folder / name),
        ]  # fmt: skip
    for name in ("tagged", "target", "named") if nemo_is_importable() else ():
        made[f"launch {name}"] = [
            *("launch", f"cluster={name}", "training=skywork_moe_tiny", "jobs=[training]"),
            *("--config-dir", str(folder / "conf"), "--dry-run"),
        ]
    for name in ("task", "function", "included", "template", "remote"):
        made[f"evaluate {name}"] = ["evaluate", str(good / "moe"), "--tasks", str(folder / f"{name}.yaml")]
    return made


def test_no_command_runs_what_other_files_name(good: Path, tmp_path: Path, with_harness: None) -> None:
    marker, wrong = tmp_path / "marker", []
    for name, arguments in other_files(tmp_path, good, marker).items():
        answer = CliRunner().invoke(app, arguments)
        lines = [line for line in answer.output.strip().splitlines() if line.startswith("skymoe: ")]
        ended = isinstance(answer.exception, SystemExit) and len(lines) == 1
        if marker.exists() or not answer.exit_code or not ended or (tmp_path / "output").exists():
            wrong.append(f"{name}: {answer.exit_code}, {answer.exception!r}, {answer.output[-300:]}")
            shutil.rmtree(tmp_path / "output", ignore_errors=True)
    assert not wrong, "\n".join(wrong)


def test_only_the_modeling_files_of_an_export_are_run(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert check_code(good / "moe") and not check_code(good / "hf")
    shutil.copytree(good / "hf", tmp_path / "vouched")
    auto_map = {"AutoTokenizer": ["tokenization_skywork.SkyworkTokenizer", None]}
    change_json(tmp_path / "vouched/tokenizer_config.json", auto_map=auto_map)
    sentence = "names 'tokenization_skywork.SkyworkTokenizer', code that transformers would run: .*set SKYMOE_ALLOWED"
    with pytest.raises(ConfigurationError, match=sentence):
        check_code(tmp_path / "vouched")
    monkeypatch.setenv(VARIABLE, "tokenization_skywork.SkyworkTokenizer")
    assert check_code(tmp_path / "vouched")
