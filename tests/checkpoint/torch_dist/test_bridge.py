"""Checkpoints of Megatron-Bridge, without Bridge: what is written, which iteration is read, and what is refused."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from nemo_skymoe.architecture import Architecture
from nemo_skymoe.checkpoint import convert
from nemo_skymoe.checkpoint.convert import TargetOptions
from nemo_skymoe.checkpoint.description import Description
from nemo_skymoe.checkpoint.run_folder import checkpoint_of, receipt_folder
from nemo_skymoe.checkpoint.sources import open_source
from nemo_skymoe.checkpoint.torch_dist.options import from_options
from nemo_skymoe.checkpoint.torch_dist.run_config import read_options, run_config
from nemo_skymoe.checkpoint.upcycling.options import Upcycling
from nemo_skymoe.cli import app
from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.durable.receipt import RECEIPT
from tests.cases import every
from tests.checkpoint import hf_models

DENSE = Architecture(2, 48, 20, 8, vocab_size=97, num_query_groups=4)
DESCRIPTION = Description(
    DENSE.with_experts(4),
    rope_theta=5e5,
    rope_scaling={"rope_type": "linear", "factor": 2.0},
    rms_norm_eps=1e-5,
    max_position_embeddings=512,
    dtype="float32",
    moe_router_logit_norm_scale=None,
    moe_router_logit_norm_correction=0,
)
DESCRIBED = {
    "an MoE": DESCRIPTION,
    "a dense model": Description(replace(DENSE, tied_embeddings=True, kv_channels=12), dtype="bfloat16"),
    "layers that differ": replace(
        DESCRIPTION,
        architecture=replace(DENSE.with_experts(4), moe_layer_freq=(0, 1), moe_ffn_hidden_size=12),
    ),
}
TOKENIZER = {
    "tokenizer.json": {"model": {"vocab": {"s": 1, "e": 2, "b": 418}}, "added_tokens": []},
    "tokenizer_config.json": {"bos_token": "s", "eos_token": "e"},
}
REFUSED: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "another provider": (
        lambda config: config["model"].update(_target_="megatron.bridge.models.gemma.gemma_provider.Gemma"),
        "is made by 'megatron.bridge.models.gemma.gemma_provider.Gemma', expected GPTModelProvider",
    ),
    "a builder": (
        lambda config: config["model"].update(_builder_="megatron.training.models.gpt.GPTModelBuilder"),
        "is made by 'megatron.training.models.gpt.GPTModelBuilder', expected GPTModelProvider",
    ),
    "no model": (lambda config: config.pop("model"), "has no 'model'"),
    "an adapter": (lambda config: config.update(peft={"dim": 8}), "an adapter was trained (peft)"),
    "a quantised model": (
        lambda config: config["model"].update(restore_modelopt_state=True),
        "belongs to a model that ModelOpt has quantised, pruned or distilled",
    ),
    "latent attention": (
        lambda config: config["model"].update(multi_latent_attention=True),
        "multi_latent_attention is True, expected False",
    ),
    "normalised queries": (
        lambda config: config["model"].update(qk_l2_norm=True),
        "qk_l2_norm is True, expected False",
    ),
    "a size that is none": (
        lambda config: config["model"].update(num_layers="two"),
        "num_layers is 'two', expected a positive integer",
    ),
}


def skymoe(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MoE with its tokenizer, for Bridge."""
    folder = tmp_path_factory.mktemp("written")
    hf_models.skywork_moe(folder / "hf", tie_word_embeddings=True)
    for name, content in TOKENIZER.items():
        (folder / "hf" / name).write_text(json.dumps(content))
    target = TargetOptions("bridge", layer_spec="local")
    convert.plan({"base": open_source(folder / "hf")}, target).run(folder / "bridge")
    return folder / "bridge"


@pytest.fixture
def trained(written: Path, tmp_path: Path) -> Path:
    """What Bridge leaves of two saves: no config.json, and no receipt."""
    run = tmp_path / "run"
    shutil.copytree(written, run / "checkpoints")
    (run / "checkpoints" / RECEIPT).unlink()
    iteration = (run / "checkpoints/iter_0000000").rename(run / "checkpoints/iter_0000009")
    shutil.rmtree(iteration / "context")
    shutil.copytree(iteration, iteration.with_name("iter_0000010"))
    (run / "checkpoints/latest_checkpointed_iteration.txt").write_text("10\n")
    return run


def test_what_bridge_wants_beside_the_tensors(written: Path):
    files = {path.relative_to(written).as_posix() for path in written.rglob("*") if path.is_file()}
    iteration = {name.removeprefix("iter_0000000/") for name in files if name.startswith("iter_0000000/")}
    assert {name for name in iteration if not name.endswith(".distcp")} == {
        *(".metadata", "metadata.json", "common.pt", "run_config.yaml", "train_state.pt"),
        *("context/config.json", "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"),
    }
    above = files - {f"iter_0000000/{name}" for name in iteration}
    assert above == {"latest_train_state.pt", "latest_checkpointed_iteration.txt", RECEIPT}
    state = torch.load(written / "latest_train_state.pt", weights_only=True)
    assert state["step"] == 0 and state["do_train"].dtype == torch.bool
    names = open_source(written).weights.storage.tensors
    assert "decoder.layers.self_attention.linear_qkv.weight" in names
    assert not [name for name in names if name.startswith("module.")]


@every("description", DESCRIBED.values(), ids=DESCRIBED)
def test_the_options_say_what_the_description_does(description: Description, tmp_path: Path):
    """What Bridge writes after a training has no copy of the source's config.json."""
    file = tmp_path / "run_config.yaml"
    file.write_bytes(run_config(description, padded_vocab_size=128, tokenizer=()))
    model = yaml.safe_load(file.read_text())["model"]
    options = read_options(file) | {"vocab_size": model["unpadded_vocab_size"]}
    assert model["vocab_size"] == 128 and from_options(options, description.dtype, str(file)) == description
    assert model["bf16"] == (description.dtype == "bfloat16")
    assert model["params_dtype"]["_target_"] == f"torch.{description.dtype}"


def test_a_rotary_embedding_that_megatron_lacks_is_refused(written: Path, tmp_path: Path):
    shutil.copytree(written.parent / "hf", tmp_path / "hf")
    config = json.loads((tmp_path / "hf/config.json").read_text())
    config["rope_scaling"] = {"rope_type": "dynamic", "factor": 2.0}
    (tmp_path / "hf/config.json").write_text(json.dumps(config))
    refused = skymoe("convert", tmp_path / "hf", tmp_path / "out", "--to", "bridge")
    assert refused.exit_code == 2 and "'dynamic'" in refused.stderr, refused.output
    assert not list(tmp_path.glob("out*"))


def test_the_last_iteration_stands_for_the_run(trained: Path):
    last = trained / "checkpoints/iter_0000010"
    for folder in (trained, trained / "checkpoints", last):
        assert checkpoint_of(folder) == last
    shown = skymoe("inspect", trained)
    assert shown.exit_code == 0 and "Megatron-Bridge torch_dist" in shown.output, shown.output
    assert checkpoint_of(trained / "checkpoints/iter_0000009").name == "iter_0000009"


def test_a_run_without_its_last_iteration_is_refused(trained: Path):
    tracker = trained / "checkpoints/latest_checkpointed_iteration.txt"
    (trained / "checkpoints/iter_0000010/run_config.yaml").unlink()
    with pytest.raises(ConfigurationError, match=r"iter_0000010' has no run_config.yaml, .*interrupted"):
        open_source(trained)
    for text, said in (("11", "names iteration 11"), ("release", "holds 'release'"), ("", "holds ''")):
        tracker.write_text(text)
        with pytest.raises(ConfigurationError, match=said):
            open_source(trained)
    tracker.unlink()
    with pytest.raises(ConfigurationError, match="is missing, expected the number of an iteration"):
        open_source(trained)


def test_the_receipt_of_an_iteration_lies_above_it(written: Path, trained: Path):
    iteration = written / "iter_0000000"
    assert receipt_folder(iteration) == written
    assert skymoe("verify", written.parent / "hf", iteration).exit_code == 0
    # A training that went on in the same folder is none of this job's.
    assert receipt_folder(trained / "checkpoints/iter_0000010").name == "iter_0000010"
    shutil.copy(written / RECEIPT, trained / "checkpoints")
    assert receipt_folder(trained / "checkpoints/iter_0000010").name == "iter_0000010"


def test_a_trained_checkpoint_describes_itself(written: Path, trained: Path):
    source = open_source(trained)
    expected = open_source(written)
    assert source.description == expected.description
    assert source.tokenizer == trained / "checkpoints/iter_0000010/tokenizer"
    assert source.weights.keys() == expected.weights.keys()
    for key in source.weights.keys():  # noqa: SIM118
        assert torch.equal(source.weights.read(key), expected.weights.read(key))


def test_the_vocabulary_has_no_padding(trained: Path):
    """Our provider may count the padding in vocab_size, Bridge's own never do."""
    iteration = trained / "checkpoints/iter_0000010"

    def vocabulary(**changes: Any) -> int:
        config = yaml.safe_load((iteration / "run_config.yaml").read_text())
        config["model"] |= changes
        (iteration / "run_config.yaml").write_text(yaml.safe_dump(config))
        return open_source(trained).description.architecture.vocab_size

    assert vocabulary() == 419
    assert vocabulary(unpadded_vocab_size=400) == 400
    assert vocabulary(should_pad_vocab=True, vocab_size=500) == 500, "Bridge took the tokenizer's"
    assert vocabulary(should_pad_vocab=False) == 400
    assert vocabulary(unpadded_vocab_size=None) == 419, "the tokenizer's"
    assert vocabulary(should_pad_vocab=False, vocab_size=512) == 419
    assert vocabulary(_target_="megatron.bridge.models.gpt_provider.GPTModelProvider") == 512
    shutil.rmtree(iteration / "tokenizer")
    assert vocabulary(_target_="nemo_skymoe.bridge.provider.SkyworkProvider") == 512


@every("change, said", REFUSED.values(), ids=REFUSED)
def test_another_model_is_one_sentence(
    change: Callable[[dict[str, Any]], Any], said: str, written: Path, tmp_path: Path
):
    iteration = tmp_path / "iter_0000010"
    shutil.copytree(written / "iter_0000000", iteration, ignore=shutil.ignore_patterns("context"))
    config = yaml.safe_load((iteration / "run_config.yaml").read_text())
    change(config)
    (iteration / "run_config.yaml").write_text(yaml.safe_dump(config))
    refused = skymoe("convert", iteration, tmp_path / "out", "--to", "hf")
    assert (refused.exit_code, refused.exception.__class__) == (2, SystemExit), refused.output
    (line,) = refused.stderr.splitlines()
    assert said in line and "run_config.yaml" in line, line
    assert not list(tmp_path.glob("out*"))


def test_a_file_that_would_run_code_is_not_read(trained: Path, tmp_path: Path):
    file = trained / "checkpoints/iter_0000010/run_config.yaml"
    touched = tmp_path / "touched"
    file.write_text(f"model: !!python/object/apply:os.system ['touch {touched}']\n")
    refused = skymoe("inspect", trained)
    assert refused.exit_code == 1 and "is not YAML of plain values" in refused.output
    assert not touched.exists()


def test_without_run_config_it_is_megatron_lms(trained: Path):
    iteration = trained / "checkpoints/iter_0000010"
    (iteration / "run_config.yaml").unlink()
    shown = skymoe("inspect", iteration)
    assert shown.exit_code == 1 and "Megatron-LM torch_dist" in shown.output, shown.output
    assert "expected --config with a config.json" in shown.output


def test_another_backend_is_refused(trained: Path):
    (trained / "checkpoints/iter_0000010/metadata.json").unlink()
    shown = skymoe("inspect", trained)
    assert shown.exit_code == 1 and "checkpoint.ckpt_format=torch_dist" in shown.output


def test_upcycled_for_bridge_is_upcycled_for_nemo(tmp_path: Path):
    """The same bytes of tensors, whichever of the two they are for."""
    hf_models.skywork_dense(tmp_path / "dense")
    for to in ("nemo", "bridge"):
        source = {"base": open_source(tmp_path / "dense")}
        target = TargetOptions(to, layer_spec="te", vocab_size=448)
        convert.plan(source, target, Upcycling(4, init="drop", drop_ratio=0.5)).run(tmp_path / to)
    nemo, bridge = tmp_path / "nemo/weights", tmp_path / "bridge/iter_0000000"
    names = sorted(path.name for path in nemo.glob("*.distcp"))
    assert names == sorted(path.name for path in bridge.glob("*.distcp"))
    assert all((nemo / name).read_bytes() == (bridge / name).read_bytes() for name in names)
