"""What the pages take as given, small: dense checkpoints, a tokenizer, text, and the logs of a run."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from nemo_skymoe.architecture import Architecture
from nemo_skymoe.checkpoint.description import Description
from nemo_skymoe.checkpoint.hugging_face import exported_files
from nemo_skymoe.checkpoint.hugging_face import names as hugging_face_names

TINY = Architecture(2, 32, 48, 4, vocab_size=300)


def checkpoint(folder: Path, sizes: Architecture = TINY, mlp_seed: int = 0) -> None:
    """In the released layout; those of different `mlp_seed` differ in their MLPs alone."""
    folder.mkdir()
    tensors = {}
    for number, chunk in enumerate(hugging_face_names.chunks(sizes)):
        seed = mlp_seed if ".mlp." in chunk.tensor else 0
        generator = torch.Generator().manual_seed(1000 * seed + number)
        tensors[chunk.tensor] = torch.randn(chunk.shape, generator=generator).bfloat16()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(exported_files.to_hf_config(Description(sizes))))


def without_weights(folder: Path, config: dict[str, Any], sizes: Architecture) -> None:
    """A checkpoint in Hugging Face's form with a config.json and headers; its bytes are holes in the file."""
    folder.mkdir(parents=True)
    header: dict[str, Any] = {}
    end = 0
    for chunk in hugging_face_names.chunks(sizes):
        start, end = end, end + 2 * math.prod(chunk.shape)
        header[chunk.tensor] = {"dtype": "BF16", "shape": list(chunk.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    (folder / "config.json").write_text(json.dumps(config))


def tokenizer(folder: Path) -> None:
    """A byte-level one with an end of document."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder.mkdir()
    tokens = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    made: Any = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.add_special_tokens(tokens[:3])
    made.save(str(folder / "tokenizer.json"))


def text(folder: Path) -> None:
    """SkyPile's form in files and in a folder, compressed or not."""
    import gzip

    (folder / "code").mkdir(parents=True)
    lines = "".join(json.dumps({"text": f"document {number}"}) + "\n" for number in range(8))
    (folder / "web.jsonl").write_text(lines)
    (folder / "skypile.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (folder / "code" / "part0.jsonl").write_text(lines)


def run_logs(folder: Path) -> None:
    """Ten steps of a Skywork-MoE of two layers, as the callback logs them."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder / "tensorboard")) as writer:
        for step in range(10):
            writer.add_scalar("reduced_train_loss", 5 - step / 10, step)
            for layer in (1, 2):
                for metric in ("drop_rate", "aux_loss_coefficient", "max1_over_max2", "load_max_over_mean"):
                    writer.add_scalar(f"moe/{metric}_layer_{layer}", layer / (step + 10), step)


def prepare(page: str) -> None:
    """Lay out in the working directory what a page takes as given."""
    here = Path()
    if page in ("convert", "upcycle", "export"):
        checkpoint(here / "skywork-13b")
    if page == "export":
        checkpoint(here / "skywork-moe", TINY.with_experts(16))
    if page == "upcycle":
        for seed, name in enumerate(("zh", "en", "code"), start=1):
            checkpoint(here / f"skywork-1p3b-{name}", mlp_seed=seed)
        checkpoint(here / "skywork-1p3b")
    if page == "data":
        tokenizer(here / "skywork-13b")
        text(here / "text")
    if page == "monitor":
        run_logs(here / "runs" / "skywork_moe_146b")
