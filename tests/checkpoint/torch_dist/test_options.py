"""What a checkpoint says of its model: a damaged `model.yaml` is one sentence."""

from pathlib import Path

from typer.testing import CliRunner

from nemo_skymoe.checkpoint.torch_dist.options import from_options, megatron_lm_options
from nemo_skymoe.cli import app
from tests.checkpoint.megatron_files import save

DAMAGED = {
    "a bracket that is open": "config: {num_layers: 2,\n  hidden_size: [16\n",
    "a tab": "config:\n\tnum_layers: 2\n",
    "a tag of Python": "config: !!python/object:os.system\n  command: ls\n",
    "an anchor that is not there": "config: *model\n",
    "bytes that are no text": "config: \x00\n",
    "two documents": "config: {}\n---\nconfig: {}\n",
    "a date that is none": "config: 2020-99-99\n",
}


def test_a_damaged_model_yaml_is_one_sentence(tmp_path: Path) -> None:
    import torch

    save(tmp_path, {"module.embedding.word_embeddings.weight": torch.zeros(40, 16)})
    (tmp_path / "context").mkdir()
    for name, text in DAMAGED.items():
        (tmp_path / "context" / "model.yaml").write_text(text)
        refused = CliRunner().invoke(app, ["convert", str(tmp_path), str(tmp_path / "out"), "--to", "hf"])
        assert (refused.exit_code, refused.exception.__class__) == (2, SystemExit), name
        (line,) = refused.stderr.splitlines()
        assert f"'{tmp_path}/context/model.yaml' is not YAML of plain values: " in line, line
        assert "  " not in line, line


SIZES = {
    "num_layers": 2,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "ffn_hidden_size": 32,
    "vocab_size": 40,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_slow": 1.0}


def test_yarn_as_an_embedding_of_its_own_is_the_same_scaling() -> None:
    """As Megatron-Bridge imports a Qwen, where None is Megatron's default, and as Megatron-LM's arguments have it."""
    by_bridge = dict.fromkeys(("yarn_beta_fast", "yarn_beta_slow", "yarn_mscale", "yarn_mscale_all_dim"))
    by_bridge |= {"yarn_rotary_scaling_factor": 4.0, "yarn_original_max_position_embeddings": 64}
    by_bridge |= {"seq_length": 256, "position_embedding_type": "yarn", **SIZES}
    assert from_options(by_bridge, "float32", "there").rope_scaling == YARN | {"beta_fast": 32.0}
    arguments = {"rotary_scaling_factor": 4.0, "mscale": 1.0, "mscale_all_dim": 1.0, "yarn_beta_fast": 24.0}
    arguments |= {"yarn_original_max_position_embeddings": 64, "max_position_embeddings": 256, **SIZES}
    for kind, scaling in (
        ("yarn", YARN | {"beta_fast": 24.0, "attention_factor": 1.0}),
        ("rope", None),  # where these arguments belong to latent attention, which the model has not
    ):
        options = megatron_lm_options(arguments | {"position_embedding_type": kind})
        assert from_options(options, "float32", "there").rope_scaling == scaling
