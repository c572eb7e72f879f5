"""`skymoe inspect`, `convert`, `upcycle` and `verify` as a user meets them."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner, Result

from nemo_skymoe.architecture import SKYWORK_13B, SKYWORK_MOE_146B, Architecture
from nemo_skymoe.checkpoint.description import Description
from nemo_skymoe.checkpoint.formats import form_of
from nemo_skymoe.checkpoint.hugging_face import exported_files
from nemo_skymoe.checkpoint.hugging_face import names as hugging_face_names
from nemo_skymoe.checkpoint.hugging_face.target import HuggingFaceTarget
from nemo_skymoe.cli import app
from nemo_skymoe.config import ConfigurationError
from tests.cases import every
from tests.checkpoint import hf_models

TINY = Architecture(2, 32, 48, 4, vocab_size=300)
PYTHON = [sys.executable, "-c", "import sys; from nemo_skymoe.cli import main; main()"]
# The same, and at its end how many bytes it has read, and that it has imported nothing that takes seconds.
LIGHT = [
    sys.executable,
    "-c",
    """
import re, sys
from nemo_skymoe import cli
code = 0
try:
    cli.app(sys.argv[1:])
except SystemExit as exit:
    code = exit.code
heavy = {"torch", "megatron", "transformers", "nemo"} & set(sys.modules)
assert not heavy, heavy
print(re.search(r"rchar: (\\d+)", open("/proc/self/io").read())[1], file=sys.stderr)
sys.exit(code)
""",
]


def dense(folder: Path, seed: int = 0, base_seed: int = 0) -> Path:
    """A tiny checkpoint in Skywork-13B's layout; with the same base seed all but the MLPs are equal."""
    folder.mkdir()
    tensors = {}
    for number, chunk in enumerate(hugging_face_names.chunks(TINY)):
        chosen = seed if ".mlp." in chunk.tensor else base_seed
        generator = torch.Generator().manual_seed(1000 * chosen + number)
        tensors[chunk.tensor] = torch.randn(chunk.shape, generator=generator).bfloat16()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(exported_files.to_hf_config(Description(TINY))))
    return folder


def skymoe(*arguments: Any) -> Result:
    return CliRunner().invoke(app, [*map(str, arguments)])


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return dense(tmp_path / "dense")


def test_upcycle_convert_and_verify(source: Path, tmp_path: Path):
    moe, nemo = tmp_path / "moe", tmp_path / "nemo"
    made = skymoe(
        "upcycle", source, moe, "--to", "hf", "--num-experts", 4, "--init", "drop", "--drop-ratio", 0.5
    )
    assert made.exit_code == 0 and f"{moe}: " in made.output
    assert skymoe("convert", moe, nemo, "--to", "nemo").exit_code == 0
    for given, written in ((source, moe), (moe, nemo)):
        verified = skymoe("verify", given, written)
        assert (verified.exit_code, "every bit as expected" in verified.output) == (0, True)
    file = next(moe.glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-7] ^= 4
    file.write_bytes(content)
    verified = skymoe("verify", source, moe)
    assert verified.exit_code == 1 and "1 of 9600 elements differ" in verified.output
    assert json.loads(skymoe("verify", source, moe, "--json").output)["problems"]


def test_specialists(source: Path, tmp_path: Path):
    other = dense(tmp_path / "other", seed=1)
    given = [f"base={source}", f"zh={other}"]
    options = ["--to", "nemo", "--num-experts", 4, "--init", "specialized", "--expert-source", "zh:3,base:1"]
    assert skymoe("upcycle", *given, tmp_path / "moe", *options).exit_code == 0
    assert skymoe("verify", *given, tmp_path / "moe").exit_code == 0
    again = skymoe("upcycle", *reversed(given), tmp_path / "moe", *options)
    assert again.exit_code == 0 and "is there already, unchanged" in again.output
    foreign = dense(tmp_path / "foreign", seed=1, base_seed=1)
    refused = skymoe("upcycle", f"base={source}", f"zh={foreign}", tmp_path / "no", *options)
    assert refused.exit_code == 2 and "differs from 'base' in embedding" in refused.output
    assert not list(tmp_path.glob("no*"))


def test_verify_compares_logits(source: Path, tmp_path: Path):
    text = tmp_path / "text"
    text.write_text("def main() -> None:\n    print(0)\n" * 8)
    skymoe("upcycle", source, tmp_path / "moe", "--to", "hf", "--num-experts", 4)
    verified = skymoe("verify", source, tmp_path / "moe", "--logits", text)
    assert verified.exit_code == 0 and "max|difference| / max|logit| = " in verified.output


def test_a_layout_of_others_is_written(tmp_path: Path):
    hf_models.skywork_moe(tmp_path / "moe", moe_use_logits_norm=False)
    wrong = skymoe("convert", tmp_path / "moe", tmp_path / "out", "--to", "hf", "--layout", "qwen3_moe")
    assert wrong.exit_code == 2 and "layout is 'qwen3_moe', which cannot express" in wrong.output
    assert not list(tmp_path.glob("out*"))
    skymoe("convert", tmp_path / "moe", tmp_path / "out", "--to", "hf", "--layout", "mixtral")
    assert json.loads((tmp_path / "out/config.json").read_text())["model_type"] == "mixtral"
    assert skymoe("verify", tmp_path / "moe", tmp_path / "out").exit_code == 0


def test_verify_refuses_a_text_that_is_no_file_before_it_compares(source: Path, tmp_path: Path):
    refused = skymoe("verify", source, tmp_path, "--logits", "hello world")
    assert refused.exit_code == 2
    assert refused.output == "skymoe: --logits is 'hello world', expected a file of text\n"


def test_inspect(source: Path, tmp_path: Path):
    skymoe("upcycle", source, tmp_path / "moe", "--to", "nemo", "--num-experts", 4, "--seed", 3)
    shown = skymoe("inspect", tmp_path / "moe")
    assert shown.exit_code == 0 and "NeMo 2 torch_dist" in shown.output
    found = json.loads(skymoe("inspect", tmp_path / "moe", "--json").output)
    sizes = TINY.with_experts(4)
    assert found["parameters"] == sizes.parameters
    assert found["activated_parameters"] == sizes.activated_parameters
    assert (found["architecture"]["vocab_size"], found["vocabulary_rows"]) == (300, 384)
    assert (found["tensors"], found["dtypes"], found["problems"]) == (10, {"bfloat16": 10}, [])
    assert found["bytes"] == 2 * (sizes.parameters + 2 * 84 * 32)
    assert found["options"]["moe_router_logit_norm_scale"] == 1.0
    assert found["receipt"]["upcycling"]["seed"] == 3


def test_inspect_shows_what_is_wrong(source: Path):
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    shown = skymoe("inspect", source)
    assert shown.exit_code == 1 and "problem: " in shown.output and str(file) in shown.output


UPCYCLE = ("upcycle", "{source}", "{output}", "--to", "hf")
REFUSED: dict[str, tuple[str, ...]] = {
    "to is 'onnx', expected one of hf, nemo": ("convert", "{source}", "{output}", "--to", "onnx"),
    "init is 'magic'": (*UPCYCLE, "--init", "magic"),
    "init is noise, expected a value of the option noise": (*UPCYCLE, "--init", "noise"),
    "noise belongs to init noise": (*UPCYCLE, "--noise", "0.1"),
    "granularity is 3, expected a power of two": (*UPCYCLE, "--init", "granular", "--granularity", "3"),
    "expected NAME:COUNT": (*UPCYCLE, "--init", "specialized", "--expert-source", "zh"),
    "there is no source 'zh'": (*UPCYCLE, "--init", "specialized", "--expert-source", "zh:8,base:8"),
    "the source 'zh' is used by no expert": ("upcycle", "{source}", "zh={source}", *UPCYCLE[2:]),
    "there are two sources 'base'": ("upcycle", "{source}", "{source}", *UPCYCLE[2:]),
    "there is no source 'base'": ("upcycle", "zh={source}", *UPCYCLE[2:]),
    "layer_spec belongs to checkpoints of NeMo or Bridge": (*UPCYCLE, "--layer-spec", "te"),
    "shard_size is 'big'": (*UPCYCLE, "--shard-size", "big"),
    "padded_vocab_size is 299": ("convert", "{source}", "{output}", "--to", "nemo", "--vocab-size", "299"),
    "allow_nonfinite does not go with": (
        *UPCYCLE,
        "--allow-nonfinite",
        *["--init", "drop", "--drop-ratio", "0.1"],
    ),
    "is not a folder": ("convert", "{source}/nowhere", "{output}", "--to", "hf"),
    "is no checkpoint": ("inspect", "{empty}"),
    "to repair: leave --repair out to write it": (
        "convert",
        "{source}",
        "{output}",
        *["--to", "hf", "--repair"],
    ),
    "exists: expected a new folder": ("convert", "{source}", "{source}", "--to", "hf"),
}


def test_what_is_there_already_is_not_said_to_be_written(source: Path, tmp_path: Path):
    command = ("convert", source, tmp_path / "output", "--to", "nemo")
    assert "B/s" in skymoe(*command).stdout
    again = skymoe(*command)
    assert (
        again.exit_code == 0 and "is there already, unchanged: " in again.stdout and "B/s" not in again.stdout
    )


def test_the_same_command_after_damage(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "linked").symlink_to("dense")
    tokenizer = {"model": {"vocab": {"a": 0}}, "added_tokens": []}
    (source / "tokenizer.json").write_text(json.dumps(tokenizer))
    for command in ("convert", "upcycle"):
        for to, names in (
            ("hf", ["model-00002-of-*", "model.safetensors.index.json", "tokenizer.json", "config.json"]),
            ("nemo", ["weights/__1_0.distcp", "weights/.metadata", "weights/common.pt", "context/io.json"]),
        ):
            output = Path(f"{command}-{to}")
            options = ["--to", to, *(["--shard-size", "30KB"] if to == "hf" else [])]
            assert skymoe(command, "dense", output, *options).exit_code == 0
            expected = {file: file.read_bytes() for file in output.rglob("*") if file.is_file()}
            for name in names:
                (file,) = output.glob(name)
                file.write_bytes(expected[file][:-1] + bytes([expected[file][-1] ^ 1]))
                (file := next(output.glob(names[0]))).unlink()
                damaged = {file: file.read_bytes() for file in output.rglob("*") if file.is_file()}
                refused = skymoe(command, f"linked/../{'linked'}/", output, *options)
                assert refused.exit_code == 2 and refused.stderr.count("skymoe: ") == 1, refused.output
                assert (
                    f"'{file.absolute()}' is missing" in refused.stderr
                    and "--repair writes th" in refused.stderr
                )
                assert name == names[0] or f"{next(output.glob(name))}' is not the bytes" in refused.stderr
                assert damaged == {file: file.read_bytes() for file in output.rglob("*") if file.is_file()}
                again = skymoe(command, f"linked/../{'linked'}/", output, *options, "--repair")
                assert again.exit_code == 0, again.output
                assert f"'{file}' is missing" in again.stderr and "files written anew" in again.stdout
                assert expected == {file: file.read_bytes() for file in output.rglob("*") if file.is_file()}
            (output / "skymoe_receipt.json").unlink()
            assert "has no skymoe_receipt.json" in skymoe(command, source, output, *options).stderr
            assert skymoe(command, source, output, *options, "--repair").exit_code == 0
            assert expected == {file: file.read_bytes() for file in output.rglob("*") if file.is_file()}
            assert "is there already, unchanged" in skymoe(command, source, output / ".", *options).stdout
            assert list(tmp_path.glob("*.unfinished")) == []


@every("message", REFUSED)
def test_refusals_are_one_sentence_and_leave_nothing(message: str, source: Path, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    before = [sorted(folder.rglob("*")) for folder in (tmp_path, source)]
    places = {"source": source, "output": tmp_path / "output", "empty": tmp_path / "empty"}
    refused = skymoe(*(argument.format(**places) for argument in REFUSED[message]))
    assert refused.exit_code == 2
    assert refused.output.startswith("skymoe: ") and message in refused.output
    assert [sorted(folder.rglob("*")) for folder in (tmp_path, source)] == before


def test_weights_is_another_path_of_its_checkpoint(source: Path, tmp_path: Path):
    (source / "generation_config.json").write_text("{}")
    assert skymoe("convert", source, tmp_path / "nemo", "--to", "nemo").exit_code == 0
    for path in (tmp_path / "nemo/weights", tmp_path / "nemo/context/../weights/", tmp_path / "nemo"):
        assert skymoe("convert", path, tmp_path / "back", "--to", "hf").exit_code == 0, path
    assert (tmp_path / "back/generation_config.json").read_text() == "{}"


def test_a_dry_run_refuses_the_output_that_the_run_would(source: Path, tmp_path: Path):
    command = ("convert", source, tmp_path / "out", "--to", "nemo")
    assert skymoe(*command).exit_code == 0
    assert skymoe(*command, "--dry-run").exit_code == 0
    for other in ((*command, "--vocab-size", 512), ("convert", source, source, "--to", "hf")):
        refused = skymoe(*other, "--dry-run")
        assert refused.exit_code == 2 and "exists: expected a new folder" in refused.output


def test_an_moe_is_not_upcycled_again(source: Path, tmp_path: Path):
    skymoe("upcycle", source, tmp_path / "moe", "--to", "hf", "--num-experts", 4)
    refused = skymoe("upcycle", tmp_path / "moe", tmp_path / "again", "--to", "hf")
    assert refused.exit_code == 2 and "'base' is an MoE already, expected a dense model" in refused.output


@pytest.fixture(scope="module")
def skywork_13b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Skywork-13B's headers before files of holes: 27.7 GB that take no room."""
    folder = tmp_path_factory.mktemp("skywork") / "13b"
    folder.mkdir()
    description = Description(SKYWORK_13B)
    chunks = hugging_face_names.chunks(SKYWORK_13B)
    target = HuggingFaceTarget(chunks, dict.fromkeys((chunk.tensor for chunk in chunks), "bfloat16"))
    sizes = {}
    for file in target.files():
        header = target._header(file)
        sizes[file.name] = len(header) + sum(target._chunk_bytes(chunk) for chunk in file.chunks)
        with (folder / file.name).open("wb") as shard:
            shard.write(header)
            shard.truncate(sizes[file.name])
    files = exported_files.extras(description, None) | target.last_files(sizes)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


@every("to, tensors", [("hf", 2863), ("nemo", 10)])
def test_dry_run_of_146b(to: str, tensors: int, skywork_13b: Path, tmp_path: Path):
    options = ["--to", to, "--dry-run", "--json", *(["--layer-spec", "te"] if to == "nemo" else [])]
    command = [*LIGHT, "upcycle", str(skywork_13b), str(tmp_path / "moe"), *options]
    answer = subprocess.run(command, capture_output=True, text=True)
    found = json.loads(answer.stdout)
    assert answer.returncode == (found["bytes_needed"] > found["bytes_free"])
    assert len(found["tensors"]) == tensors
    rows = 65536 if to == "nemo" else 65519
    vocabulary = 2 * 4608 * (rows - 65536)
    assert sum(tensor["bytes"] for tensor in found["tensors"]) == 2 * (
        SKYWORK_MOE_146B.parameters + vocabulary
    )
    assert 0 < found["bytes_needed"] - 2 * (SKYWORK_MOE_146B.parameters + vocabulary) < 1e7
    assert list(tmp_path.iterdir()) == []
    # Of 28 GB of weights nothing but the headers; the rest is Python's own modules.
    assert int(answer.stderr) < 50_000_000


def test_dry_run_does_not_import_torch(source: Path, tmp_path: Path):
    for arguments in (
        ("upcycle", str(source), str(tmp_path / "moe"), "--to", "nemo", "--dry-run"),
        ("convert", str(source), str(tmp_path / "copy"), "--to", "hf", "--dry-run"),
        ("inspect", str(source)),
    ):
        subprocess.run([*LIGHT, *arguments], check=True, capture_output=True)


def test_dry_run_lists_names_shapes_and_room(source: Path, tmp_path: Path):
    shown = skymoe("upcycle", source, tmp_path / "moe", "--to", "hf", "--num-experts", 4, "--dry-run").output
    assert "model.layers.1.block_sparse_moe.experts.3.w2.weight  bfloat16  [32, 48]" in shown
    assert "41 tensors; " in shown and "needed" in shown and "free" in shown


def test_a_dry_run_that_finds_too_little_room_fails(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Room to the byte is enough, a byte less is not; whatever is there already need not fit again."""
    for command, to in (("convert", "nemo"), ("convert", "hf"), ("upcycle", "nemo"), ("upcycle", "hf")):
        job = (command, source, tmp_path / f"{command}-{to}", "--to", to)
        needed = json.loads(skymoe(*job, "--dry-run", "--json").output)["bytes_needed"]
        for missing in (0, 1):
            with monkeypatch.context() as patch:
                free = SimpleNamespace(free=needed - missing)
                patch.setattr("shutil.disk_usage", lambda _, free=free: free)
                assert skymoe(*job, "--dry-run", "--json").exit_code == missing
                shown = skymoe(*job, "--dry-run")
                assert (shown.exit_code, "NOT ENOUGH" in shown.stdout) == (missing, bool(missing))
        assert skymoe(*job).exit_code == 0
        with monkeypatch.context() as patch:
            patch.setattr("shutil.disk_usage", lambda _, free=needed // 4: SimpleNamespace(free=free))
            assert skymoe(*job, "--dry-run").exit_code == 0


@every("change", [lambda job: job, lambda job: [*job, "--workers", "2"]])
def test_the_same_command_continues(
    change: Callable[[list[Any]], list[Any]], source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    job = [
        "upcycle",
        source,
        tmp_path / "moe",
        "--to",
        "nemo",
        *["--num-experts", "4", "--init", "noise", "--noise", "0.1"],
    ]

    def full(*_: Any) -> None:
        raise ConfigurationError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr("nemo_skymoe.checkpoint.job.conversion._finish", full)
        assert skymoe(*job).exit_code == 2
    assert not (tmp_path / "moe").exists()
    refused = skymoe(*job, "--seed", 1)
    assert refused.exit_code == 2 and "holds the unfinished work of another command" in refused.output
    assert skymoe(*change(job)).exit_code == 0
    assert skymoe("verify", source, tmp_path / "moe").exit_code == 0


def test_form_of_a_folder(tmp_path: Path):
    for name, form in (("config.json", "hf"), (".metadata", "megatron")):
        folder = tmp_path / form
        folder.mkdir()
        (folder / name).touch()
        assert form_of(folder) == form
