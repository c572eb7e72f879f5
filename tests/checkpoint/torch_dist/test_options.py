"""What a checkpoint says of its model: a damaged `model.yaml` is one sentence."""

from pathlib import Path

from typer.testing import CliRunner

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
